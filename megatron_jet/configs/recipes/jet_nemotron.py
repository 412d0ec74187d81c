"""The paper's runs (Jet-Nemotron 2B and 4B) on 32 H100s.

Published: tokens per stage, what is frozen, the search grid, the budget of two full-attention layers (2B) and the
H100-hours. Everything else (optimiser, learning rates, batch, sequence length, beam width, path distribution, loss
weights) is unpublished; values here follow the related work named in docs/recipes.md and are meant to be overridden.
"""

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
# Paper, appendix: hardware-aware grid at constant state size 294,912 (d_k, d_v, heads).
PAPER_GRID = (
    (256, 288, 4),
    (192, 384, 4),
    (128, 576, 4),
    (256, 144, 8),
    (192, 192, 8),
    (128, 288, 8),
    (128, 192, 12),
    (96, 256, 12),
    (64, 384, 12),
)


def _training(
    tokens: float, lr: float, loss: LossConfig, trainable: tuple[str, ...], micro_batch_size: int = 2
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
        checkpoint_interval=250,
        log_interval=10,
        recompute=True,
    )


# H100-hours of the 2B run by stage (paper, appendix); the paper gives none for 4B.
PAPER_HOURS_2B = {
    "placement": 808.0,
    "block_selection": 3120.0,
    "new_block": 624.0,
    "hardware_search": 5616.0,
    "stage1": 624.0,
    "stage2": 7536.0,
}


def _recipe(
    name: str,
    teacher: str,
    budget: int,
    swa_budget: int,
    window: int,
    heads: tuple[int, int],
    paper_hours: dict[str, float],
) -> RunConfig:
    """Both published models differ in teacher, placement budget, window and JetBlock heads only."""
    num_heads, head_dim = heads

    def resources(stage: str) -> StageResources:
        return StageResources(nodes=4, paper_gpu_hours=paper_hours.get(stage))

    distill = LossConfig(feature=1.0, kl=1.0)
    generation = ThroughputConfig(
        contexts=(65536,), batch_size=128, prefill_chunk=2048, new_tokens=128, iterations=10, dropped=3
    )
    return RunConfig(
        recipe=name,
        teacher=TeacherConfig(path=teacher),
        data=DataConfig(path="${JET_DATA}"),
        mixers={
            "gla": GLAConfig(num_heads=4, head_dim=192, expand_v=2.0),
            "gated_delta_net": GatedDeltaNetConfig(num_heads=4, head_dim=192, expand_v=2.0),
            "jet": JetBlockConfig(num_heads=num_heads, head_dim=head_dim, expand_v=256 / head_dim),
        },
        nproc=8,
        parallel=ParallelConfig(),
        dtype="bf16",
        placement=PlacementConfig(
            resources=resources("placement"),
            training=_training(50e9, 1e-3, LossConfig(feature=1.0), LINEAR_ONLY, micro_batch_size=1),
            full_layers={0: 1, 1: 2, 2: 3, 3: 2, 4: 1},
            budget=budget,
            beam_width=4,
            swa_budget=swa_budget,
            swa_window=window,
            eval=EvalConfig(samples=512),
        ),
        block_selection=CandidateStageConfig(
            resources=resources("block_selection"),
            training=_training(50e9, 1e-3, distill, LINEAR_ONLY),
            candidates=("gla", "gated_delta_net", "jet"),
            throughput=generation,
        ),
        new_block=CandidateStageConfig(
            resources=resources("new_block"),
            training=_training(50e9, 1e-3, distill, LINEAR_ONLY),
            candidates=("gated_delta_net", "jet"),
            throughput=generation,
        ),
        hardware_search=HardwareSearchConfig(
            resources=resources("hardware_search"),
            training=_training(50e9, 1e-3, distill, LINEAR_ONLY),
            grid=tuple(GridPoint(d_k=d_k, d_v=d_v, heads=n) for d_k, d_v, n in PAPER_GRID),
            throughput=generation,
        ),
        stage1=TrainStageConfig(
            resources=resources("stage1"), training=_training(50e9, 1e-4, distill, ("*.self_attention.*",))
        ),
        stage2=TrainStageConfig(
            resources=resources("stage2"),
            training=_training(350e9, 1e-4, LossConfig(cross_entropy=1.0), ("*",)),
        ),
        export=ExportConfig(dtype="bf16"),
        evaluate=EvaluateConfig(throughput=generation),
    )


def jet_nemotron_2b() -> RunConfig:
    """Recipe `jet_nemotron_2b`: Qwen2.5-1.5B, two full-attention and two sliding-window layers (window 1152)."""
    return _recipe("jet_nemotron_2b", "${JET_TEACHERS}/Qwen2.5-1.5B", 2, 2, 1152, (12, 96), PAPER_HOURS_2B)


def jet_nemotron_4b() -> RunConfig:
    """Recipe `jet_nemotron_4b`: Qwen2.5-3B, three full-attention and seven sliding-window layers (window 2048)."""
    return _recipe("jet_nemotron_4b", "${JET_TEACHERS}/Qwen2.5-3B", 3, 7, 2048, (16, 128), {})
