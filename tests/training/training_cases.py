"""What the training tests share: tiny models, a loader of random tokens, jobs, full gradients by checkpoint key."""

import random
from pathlib import Path

import torch

from megatron_jet.configs.mixers.gated_delta_net import GatedDeltaNetConfig
from megatron_jet.configs.mixers.gla import GLAConfig
from megatron_jet.configs.mixers.jet_block import JetBlockConfig
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.training import DataConfig, LossConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from megatron_jet.model.builder import build_model
from megatron_jet.model.state import gather_tensors, load_tensors
from megatron_jet.training.job import TrainJob
from megatron_jet.training.sampling import PathSampling

SEQ = 16
VOCAB = 64
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "rope_theta": 1e4,
}
MIXERS = {
    "gla": GLAConfig(num_heads=2, head_dim=8, expand_v=1.0),
    "jet": JetBlockConfig(num_heads=2, head_dim=8, expand_v=1.0),
    "gated_delta_net": GatedDeltaNetConfig(num_heads=2, head_dim=8, expand_v=1.0),
}
DISTILL = LossConfig(feature=1.0, kl=0.7, cross_entropy=0.3)
LINEAR_ONLY = ("*.self_attention.*", "!*.paths.attn.*", "!*.linear_qkv.*", "!*.linear_proj.*")
ONE = ParallelConfig()


def teacher_config() -> ModelConfig:
    return ModelConfig(**SIZES, layer_plan=("attn",) * 4)


def student_config(plan: tuple[str, ...] = ("jet", "attn", "gla", "jet"), **changes) -> ModelConfig:
    return ModelConfig(**(SIZES | {"mixers": MIXERS} | changes), layer_plan=plan)


class RandomLoader:
    """The interface of the real loader on random tokens. A fixed global order is dealt out to the ranks in turn.

    The number of scored tokens differs between samples, and so between ranks.
    """

    def __init__(self, data, split, *, seq_length, micro_batch_size, dp_rank, dp_size, seed):
        self.rows, self.seq_length = micro_batch_size, seq_length
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.key = f"{split}:{seed}"
        self.position = 0  # samples dealt out to all ranks
        self.sources = ["text"]

    def __iter__(self):
        while True:
            first = self.position + self.dp_rank * self.rows
            self.position += self.rows * self.dp_size
            yield self._batch(range(first, first + self.rows))

    def _batch(self, indices) -> dict[str, torch.Tensor]:
        rows, masks = [], []
        for index in indices:
            generator = random.Random(f"{self.key}:{index}")
            rows.append([generator.randrange(VOCAB) for _ in range(self.seq_length + 1)])
            scored = generator.randrange(1, self.seq_length + 1)
            masks.append([0.0] * (self.seq_length - scored) + [1.0] * scored)
        tokens = torch.tensor(rows)
        return {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "loss_mask": torch.tensor(masks),
            "source": torch.zeros(len(rows), dtype=torch.long),
        }

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]


def batches_for(dp_rank: int, dp_size: int, count: int, rows: int = 2) -> list[dict[str, torch.Tensor]]:
    """Micro-batches of one rank; the union over ranks does not depend on dp_size."""
    loader = iter(
        RandomLoader(None, "train", seq_length=SEQ, micro_batch_size=rows, dp_rank=dp_rank, dp_size=dp_size, seed=0)
    )
    return [next(loader) for _ in range(count)]


def built(model: ModelConfig, parallel: ParallelConfig = ONE, seed: int = 1, dtype: str = "fp32", **kwargs) -> list:
    """A model with random weights that do not depend on the layout."""
    return build_model(model, parallel, dtype=dtype, init_seed=seed, **kwargs)


def full_gradients(chunks: list) -> dict[str, torch.Tensor] | None:
    """Gradients of a model without the distributed optimiser, in full, by checkpoint key (rank 0).

    Parameters lend their place to their gradients while the model's own gathering runs. Frozen ones are left out.
    """
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    weights = [p.data for p in parameters]
    frozen = float("nan")
    for p in parameters:
        p.data = p.main_grad if p.requires_grad else torch.full_like(p.data, frozen)
    try:
        gathered = gather_tensors(chunks)
    finally:
        for p, weight in zip(parameters, weights):
            p.data = weight
    return None if gathered is None else {k: v for k, v in gathered.items() if not v.isnan().all()}


def job(out: Path, **changes) -> TrainJob:
    """A distillation job of a few steps. `training` changes go to the TrainingConfig."""
    training = TrainingConfig(
        **{
            "steps": 6,
            "micro_batch_size": 1,
            "global_batch_size": 4,
            "seq_length": SEQ,
            "optimizer": OptimizerConfig(lr=3e-3, warmup_steps=1, weight_decay=0.1),
            "loss": DISTILL,
            "checkpoint_interval": 2,
            **changes.pop("training", {}),
        }
    )
    fields = {
        "name": "test",
        "model": student_config(),
        "init": out / "init",
        "training": training,
        "parallel": ONE,
        "dtype": "fp32",
        "data": DataConfig(path="none"),
        "seed": 0,
        "out": out / "run",
        "teacher": teacher_config(),
        "teacher_checkpoint": out / "teacher",
    }
    return TrainJob(**fields | changes)


def supernet(changes: dict | None = None) -> dict:
    """Changes that make `job` a supernet job."""
    choices = (("attn", "gla"),) * 4
    return {
        "model": student_config(("attn",) * 4),
        "sampling": PathSampling(choices, {0: 1.0, 1: 2.0, 2: 1.0}, seed=0),
        "training": {"trainable": LINEAR_ONLY, **(changes or {})},
    }


def write_models(job: TrainJob) -> None:
    """The checkpoints a job starts from. Inside an initialised layout."""
    from megatron_jet.training.checkpoint import save_model

    choices = job.sampling.choices if job.sampling else None
    save_model(built(job.teacher, job.parallel, seed=1), job.teacher_checkpoint)
    save_model(built(job.model, job.parallel, seed=2, choices=choices), job.init)


def run_job(job: TrainJob, observer=None):
    """`train` with random tokens."""
    from megatron_jet.training import trainer

    trainer.DataLoader = RandomLoader
    return trainer.train(job, observer)


def copy_weights(source: list, target: list) -> None:
    """Tensors that both models have, from one to the other (single process)."""
    load_tensors(target, gather_tensors(source), strict=False)
