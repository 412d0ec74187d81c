"""The paper's runs (Jet-Nemotron 2B and 4B) on 32 H100s.

Published: tokens per stage, what is frozen, the search grid of the 2B model, the budgets and windows, and the
H100-hours of the 2B run. Everything else (optimiser, learning rates, batch, sequence length, beam width, path
distribution, loss weights) is unpublished; values here follow the related work named in docs/recipes.md and are meant
to be overridden.
"""

from dataclasses import dataclass
from functools import partial

from megatron_jet.configs.mixers.gated_delta_net import GatedDeltaNetConfig
from megatron_jet.configs.mixers.gla import GLAConfig
from megatron_jet.configs.mixers.jet_block import JetBlockConfig
from megatron_jet.configs.run import RunConfig, TeacherConfig
from megatron_jet.configs.stages import (
    CandidateStageConfig,
    EvalConfig,
    EvaluateConfig,
    ExportConfig,
    GridPoint,
    HardwareSearchConfig,
    PlacementConfig,
    StageResources,
    ThroughputConfig,
    TrainStageConfig,
)
from megatron_jet.configs.training import DataConfig, LossConfig, OptimizerConfig, ParallelConfig, TrainingConfig

SEQ_LENGTH = 4096
BATCH = 512
LINEAR_ONLY = ("*.self_attention.*", "!*.paths.attn.*", "!*.linear_qkv.*", "!*.linear_proj.*")
# Enough for a standard error of about two points of accuracy. Four sequences at a time: their logits over Qwen's
# vocabulary take 10 GB in fp32.
EVAL = EvalConfig(samples=512, batch_size=4)
# Four days of training see single bad batches; a run that diverges still ends within minutes.
TOLERATED_SHARE = 1e-3


@dataclass(frozen=True)
class Sizes:
    """What differs between the published models beside the teacher.

    Attributes:
        budget: full-attention layers.
        swa_budget, swa_window: sliding-window layers and their window in tokens.
        block: d_k, d_v and heads of the published JetBlock, which the paper's hardware-aware search ended with.
        plain: the same of every block before that search, JetBlock among them. Blocks are compared at one size: with
            the published one JetBlock would have twice the parameters of the others and win by them.
        grid: the same of the hardware-aware search, all of one state size, the two above among them.
        checkpoint_interval: steps; about 20 minutes at the speed forecast. Signals save in between.
        paper_hours: H100-hours by stage in the paper; it gives none for 4B.
        recompute_search: block stages recompute activations: the widest block of the grid has no room to keep them. All
            of them, as one's candidates count for the next only if they trained alike.
    """

    budget: int
    swa_budget: int
    swa_window: int
    block: tuple[int, int, int]
    plain: tuple[int, int, int]
    grid: tuple[tuple[int, int, int], ...]
    checkpoint_interval: int
    paper_hours: dict[str, float]
    recompute_search: bool = False


SIZES_2B = Sizes(
    budget=2,
    swa_budget=2,
    swa_window=1152,
    block=(96, 256, 12),
    plain=(192, 384, 4),
    # Paper, table 2: state size 294,912.
    grid=(
        (256, 288, 4),
        (192, 384, 4),
        (128, 576, 4),
        (256, 144, 8),
        (192, 192, 8),
        (128, 288, 8),
        (128, 192, 12),
        (96, 256, 12),
        (64, 384, 12),
    ),
    checkpoint_interval=500,
    paper_hours={
        "placement": 808.0,
        "block_selection": 3120.0,
        "new_block": 624.0,
        "hardware_search": 5616.0,
        "stage1": 624.0,
        "stage2": 7536.0,
    },
)
SIZES_4B = Sizes(
    budget=3,
    swa_budget=7,
    swa_window=2048,
    block=(128, 256, 16),
    plain=(256, 512, 4),
    # Not in the paper: the 2B grid's shapes at the state size of the published block, 524,288.
    grid=(
        (256, 512, 4),
        (128, 1024, 4),
        (256, 256, 8),
        (128, 512, 8),
        (256, 128, 16),
        (128, 256, 16),
        (64, 512, 16),
        (128, 128, 32),
        (64, 256, 32),
    ),
    checkpoint_interval=250,
    paper_hours={},
    recompute_search=True,
)


def _training(
    tokens: float,
    lr: float,
    loss: LossConfig,
    trainable: tuple[str, ...],
    *,
    checkpoint_interval: int,
    micro_batch_size: int = 2,
) -> TrainingConfig:
    steps = round(tokens / (BATCH * SEQ_LENGTH))
    return TrainingConfig(
        steps=steps,
        micro_batch_size=micro_batch_size,
        global_batch_size=BATCH,
        seq_length=SEQ_LENGTH,
        optimizer=OptimizerConfig(lr=lr, warmup_steps=min(1000, steps // 20), schedule="wsd", weight_decay=0.1),
        loss=loss,
        trainable=trainable,
        validation_interval=500,
        checkpoint_interval=checkpoint_interval,
        log_interval=10,
        nan_limit=round(steps * TOLERATED_SHARE),
    )


def _path_distribution(budget: int) -> dict[int, float]:
    """Full layers per supernet step: from none to twice the budget, the budget most often."""
    return {count: budget + 1 - abs(count - budget) for count in range(2 * budget + 1)}


def _point(point: tuple[int, int, int]) -> GridPoint:
    d_k, d_v, heads = point
    return GridPoint(d_k=d_k, d_v=d_v, heads=heads)


def _sizes(point: tuple[int, int, int]) -> dict[str, float]:
    d_k, d_v, heads = point
    return {"num_heads": heads, "head_dim": d_k, "expand_v": d_v / d_k}


def _recipe(name: str, teacher: str, sizes: Sizes) -> RunConfig:
    def resources(stage: str) -> StageResources:
        return StageResources(nodes=4, paper_gpu_hours=sizes.paper_hours.get(stage))

    def blocks(stage: str, candidates: tuple[str, ...]) -> CandidateStageConfig:
        return CandidateStageConfig(
            resources=resources(stage), training=search, candidates=candidates, throughput=generation, eval=EVAL
        )

    training = partial(_training, checkpoint_interval=sizes.checkpoint_interval)
    distill = LossConfig(feature=1.0, kl=1.0)
    search = training(50e9, 1e-3, distill, LINEAR_ONLY).replace(recompute=sizes.recompute_search)
    generation = ThroughputConfig(
        contexts=(65536,), batch_size=128, prefill_chunk=2048, new_tokens=128, iterations=10, dropped=3
    )
    return RunConfig(
        recipe=name,
        teacher=TeacherConfig(path=teacher),
        data=DataConfig(path="${JET_DATA}"),
        mixers={
            "gla": GLAConfig(**_sizes(sizes.plain)),
            "gated_delta_net": GatedDeltaNetConfig(**_sizes(sizes.plain)),
            "jet": JetBlockConfig(**_sizes(sizes.plain)),
        },
        nproc=8,
        parallel=ParallelConfig(),
        dtype="bf16",
        placement=PlacementConfig(
            resources=resources("placement"),
            training=training(50e9, 1e-3, LossConfig(feature=1.0), LINEAR_ONLY, micro_batch_size=1),
            full_layers=_path_distribution(sizes.budget),
            budget=sizes.budget,
            # The paper places full attention by retrieval and the windows by MMLU: two sources with answers, which
            # tools/prepare_data.py makes of retrieval=FILE.jsonl and knowledge=FILE.jsonl.
            objective="retrieval_qa",
            beam_width=4,
            swa_budget=sizes.swa_budget,
            swa_window=sizes.swa_window,
            swa_objective="knowledge_qa",
            eval=EVAL,
        ),
        block_selection=blocks("block_selection", ("gla", "gated_delta_net", "jet")),
        new_block=blocks("new_block", ("gated_delta_net", "jet")),
        hardware_search=HardwareSearchConfig(
            resources=resources("hardware_search"),
            training=search,
            # mixer=None: the winner goes into the model, so it is the winner that is sized. The paper's table 2 is of
            # Gated DeltaNet: docs/recipes.md.
            grid=tuple(_point(point) for point in sizes.grid),
            expected=_point(sizes.block).name,
            throughput=generation,
            eval=EVAL,
        ),
        # The winner's weights have had the search's 50B tokens at 1e-3. From the teacher again, at a tenth of that
        # rate, stage 1 could end below the candidate that won.
        stage1=TrainStageConfig(
            resources=resources("stage1"),
            init="search",
            training=training(50e9, 1e-4, distill, ("*.self_attention.*",)),
            eval=EVAL,
        ),
        stage2=TrainStageConfig(
            resources=resources("stage2"),
            training=training(350e9, 1e-4, LossConfig(cross_entropy=1.0), ("*",)),
            eval=EVAL,
        ),
        export=ExportConfig(dtype="bf16"),
        evaluate=EvaluateConfig(eval=EVAL, throughput=generation),
    )


def jet_nemotron_2b() -> RunConfig:
    """Recipe `jet_nemotron_2b`: Qwen2.5-1.5B, two full-attention and two sliding-window layers (window 1152)."""
    return _recipe("jet_nemotron_2b", "${JET_TEACHERS}/Qwen2.5-1.5B", SIZES_2B)


def jet_nemotron_4b() -> RunConfig:
    """Recipe `jet_nemotron_4b`: Qwen2.5-3B, three full-attention and seven sliding-window layers (window 2048)."""
    return _recipe("jet_nemotron_4b", "${JET_TEACHERS}/Qwen2.5-3B", SIZES_4B)
