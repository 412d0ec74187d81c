"""Tells the world how training goes: metrics file, TensorBoard, progress display, and whoever observes."""

from collections.abc import Callable
from typing import Any

from megatron_jet.training.job import TrainJob
from megatron_jet.training.metrics import MetricsLog, memory_mib
from megatron_jet.training.progress import TrainingProgress
from megatron_jet.training.train_state import Progress

Observer = Callable[[dict[str, Any]], None]


class Recorder:
    """Rank 0 records; on the other ranks every method does nothing.

    Args:
        job: what is trained.
        progress: how far earlier processes got.
        enabled: whether this is rank 0.
        observer: called with every row.
    """

    def __init__(self, job: TrainJob, progress: Progress, *, enabled: bool, observer: Observer | None = None):
        self.job, self.enabled, self.observer = job, enabled, observer
        if not enabled:
            return
        self.metrics = MetricsLog(job.out, progress.step)
        self.display = TrainingProgress(job.name, job.training.steps, progress.step)
        self.display.start()
        self._tokens, self._seconds = progress.tokens, progress.step_seconds
        if progress.step:
            self.say(f"going on after step {progress.step}")

    def train(self, progress: Progress, losses: dict[str, float], grad_norm: float, lr: float) -> None:
        """Record a training step, every `log_interval` steps."""
        if not self.enabled:
            return
        speed = (progress.tokens - self._tokens) / max(progress.step_seconds - self._seconds, 1e-9)
        self.display.step(progress.step, losses, speed)
        if progress.step % self.job.training.log_interval and progress.step != self.job.training.steps:
            return
        self._tokens, self._seconds = progress.tokens, progress.step_seconds
        self._write("train", progress, {**losses, "grad_norm": grad_norm, "lr": lr, "tokens_per_second": speed})

    def validation(self, progress: Progress, losses: dict[str, float]) -> None:
        """Record held-out losses."""
        if self.enabled:
            self._write("validation", progress, losses)
            self.say(f"validation at step {progress.step}: loss {losses['loss']:.4f}")

    def say(self, text: str) -> None:
        """Show one line."""
        if self.enabled:
            self.display.say(text)

    def close(self) -> None:
        if self.enabled:
            self.display.stop()
            self.metrics.close()

    def _write(self, split: str, progress: Progress, figures: dict[str, float]) -> None:
        row = {
            "step": progress.step,
            "total_steps": self.job.training.steps,
            **figures,
            "tokens": progress.tokens,
            "memory_mib": round(memory_mib(), 1),
            "run": self.job.name,
            "split": split,
        }
        self.metrics.write(row)
        if self.observer is not None:
            self.observer(row)
