"""The whole of PostNAS on two CPU cores in about ten minutes, from the bundled teacher (hidden size 128, 8 layers)."""

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
    ThroughputConfig,
    TrainStageConfig,
)
from megatron_jet.configs.training import DataConfig, LossConfig, OptimizerConfig, TrainingConfig

SEQ_LENGTH = 256
BATCH = 8
DISTILL = LossConfig(feature=1.0, kl=1.0)
# Search steps train the linear mixers only: MLPs, norms, embeddings and softmax attention stay the teacher's.
LINEAR_ONLY = ("*.self_attention.*", "!*.paths.attn.*", "!*.linear_qkv.*", "!*.linear_proj.*")
ALL_MIXERS = ("*.self_attention.*",)


def _training(steps: int, lr: float = 2e-3, trainable: tuple[str, ...] = LINEAR_ONLY, **changes) -> TrainingConfig:
    base = TrainingConfig(
        steps=steps,
        micro_batch_size=BATCH // 2,
        global_batch_size=BATCH,
        seq_length=SEQ_LENGTH,
        optimizer=OptimizerConfig(lr=lr, warmup_steps=min(10, steps // 4), beta2=0.98, min_lr_ratio=0.05),
        loss=DISTILL,
        trainable=trainable,
        checkpoint_interval=25,
    )
    return base.replace(**changes)


def tiny() -> RunConfig:
    """Recipe `tiny`: every stage, real, at sizes that a laptop finishes while one watches."""
    # Ranked by formulas: on a laptop or a shared host, timing picks another winner in every run.
    generation = ThroughputConfig(
        mode="analytic",
        also_timed=True,
        contexts=(2048,),
        batch_size=4,
        prefill_chunk=512,
        new_tokens=16,
        iterations=3,
    )
    return RunConfig(
        recipe="tiny",
        seed=0,
        teacher=TeacherConfig(path="bundled:tiny"),
        data=DataConfig(path="bundled", blend={"text": 0.35, "recall": 0.4, "choice": 0.15, "copy": 0.1}),
        mixers={
            "gla": GLAConfig(num_heads=4, head_dim=32, expand_v=1.0),
            "gated_delta_net": GatedDeltaNetConfig(num_heads=4, head_dim=32, expand_v=1.0),
            "jet": JetBlockConfig(num_heads=4, head_dim=32, expand_v=1.0),
        },
        placement=PlacementConfig(
            training=_training(120),
            # Gated DeltaNet, not the paper's GLA: its short convolutions look at the previous token. GLA takes far more
            # than these tokens to learn that, and without it no placement of two layers can recall anything.
            linear="gated_delta_net",
            full_layers={0: 1, 1: 2, 2: 3, 3: 1, 4: 1},
            budget=2,
            swa_budget=1,
            swa_window=32,
            compare_training=_training(20),
            eval=EvalConfig(samples=16),
        ),
        block_selection=CandidateStageConfig(
            training=_training(32), candidates=("gla", "gated_delta_net", "jet"), throughput=generation
        ),
        new_block=CandidateStageConfig(
            training=_training(32), candidates=("gated_delta_net", "jet", "jet_static"), throughput=generation
        ),
        hardware_search=HardwareSearchConfig(
            training=_training(16),
            grid=tuple(
                GridPoint(d_k=d_k, d_v=d_v, heads=heads)
                for d_k, d_v, heads in ((16, 64, 4), (32, 32, 4), (64, 16, 4), (32, 64, 2), (16, 32, 8))
            ),
            throughput=generation,
        ),
        stage1=TrainStageConfig(init="search", training=_training(100, trainable=ALL_MIXERS, validation_interval=40)),
        stage2=TrainStageConfig(
            training=_training(
                48, lr=3e-4, trainable=("*",), loss=LossConfig(kl=0.5, cross_entropy=1.0), validation_interval=20
            )
        ),
        export=ExportConfig(dtype="fp32"),
        evaluate=EvaluateConfig(
            eval=EvalConfig(samples=64),
            throughput=ThroughputConfig(
                contexts=(1024, 4096, 8192), batch_size=1, prefill_chunk=512, new_tokens=16, iterations=4
            ),
        ),
    )
