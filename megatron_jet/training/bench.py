"""Times the trainer's own step on random weights and random tokens: nothing is loaded, saved or read."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.signals import StopRequest
from megatron_jet.configs.training import DataConfig, ParallelConfig, TrainingConfig
from megatron_jet.model.builder import build_model
from megatron_jet.training.distill import share_frozen_tensors
from megatron_jet.training.freezing import freeze
from megatron_jet.training.job import TrainJob
from megatron_jet.training.metrics import memory_mib
from megatron_jet.training.train_state import Progress
from megatron_jet.training.trainer import Trainer

NOWHERE = Path("random-weights")  # where a job's checkpoints would be


@dataclass(frozen=True)
class StepTimes:
    """Seconds of every step, and peak memory of this rank's GPU (None without one)."""

    seconds: list[float]
    memory_mib: float | None


class RandomTokens:
    """The loader's interface, on random tokens of which all are scored."""

    sources = ("random",)

    def __init__(self, vocab_size: int, rows: int, seq_length: int, seed: int) -> None:
        self.vocab_size, self.size = vocab_size, (rows, seq_length + 1)
        self._generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            tokens = torch.randint(0, self.vocab_size, self.size, generator=self._generator)
            inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
            yield {"tokens": inputs, "labels": labels, "loss_mask": torch.ones(inputs.shape)}


class BenchTrainer(Trainer):
    """The trainer, with models and data made up. Its step is untouched."""

    def _build_student(self) -> list:
        job = self.job
        student = build_model(job.model, job.parallel, dtype=job.dtype, recompute=job.training.recompute, init_seed=0)
        freeze(student, job.training.trainable)
        return student

    def _build_teacher(self) -> list:
        job = self.job
        if not job.distills:
            return [None] * len(self.student)
        teacher = build_model(job.teacher, job.parallel, dtype=job.dtype, init_seed=0)
        share_frozen_tensors(self.student, teacher)
        return teacher

    def _loader(self, split: str) -> RandomTokens:
        training = self.job.training
        return RandomTokens(self.job.model.vocab_size, training.micro_batch_size, training.seq_length, self.job.seed)

    def _resume(self) -> Progress:
        return Progress()


def bench_job(
    name: str,
    model: ModelConfig,
    teacher: ModelConfig,
    training: TrainingConfig,
    parallel: ParallelConfig,
    dtype: str,
    out: Path,
) -> TrainJob:
    """A job for `time_steps`: no validation, no checkpoints, no files to start from."""
    return TrainJob(
        name=name,
        model=model,
        init=NOWHERE,
        training=training.replace(validation_interval=0, checkpoint_interval=0, keep_best=False),
        parallel=parallel,
        dtype=dtype,
        data=DataConfig(path=str(NOWHERE)),
        seed=0,
        out=out,
        teacher=teacher,
        teacher_checkpoint=NOWHERE,
    )


def time_steps(job: TrainJob) -> StepTimes:
    """Run all steps of a job made by `bench_job`, each timed with the device idle before and after. Collective."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    with BenchTrainer(job) as trainer, StopRequest() as stop:
        for _ in range(job.training.steps):
            start = _now()
            trainer.train_step(stop)
            seconds.append(_now() - start)
            if stop.requested:
                raise KeyboardInterrupt
    return StepTimes(seconds, memory_mib() if torch.cuda.is_available() else None)


def _now() -> float:
    """The wall clock, once the GPU has nothing left to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
