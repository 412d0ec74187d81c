"""The trainer: one loop for distillation, supernets and plain training, at any layout."""

import gc
import math
import time

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_jet.configs.attempts import SupersededError, superseded
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.signals import Interrupted, StopRequest
from megatron_jet.data.loader import DataLoader
from megatron_jet.model.builder import build_model
from megatron_jet.model.paths import idle_parameters, set_paths
from megatron_jet.model.transformer_config import DTYPES
from megatron_jet.training.checkpoint import load_model
from megatron_jet.training.checkpoint_folder import CheckpointFolder
from megatron_jet.training.collectives import any_rank, from_rank_0, on_rank_0
from megatron_jet.training.distill import DistillationModel, share_frozen_tensors
from megatron_jet.training.freezing import freeze
from megatron_jet.training.job import TrainJob, TrainResult
from megatron_jet.training.optimizer import Optimizer, wrap_data_parallel
from megatron_jet.training.recorder import Observer, Recorder
from megatron_jet.training.schedule import learning_rate
from megatron_jet.training.steps import named_terms, normalizer, run_microbatches, take_batches
from megatron_jet.training.train_state import Progress


def train(job: TrainJob, observer: Observer | None = None) -> TrainResult:
    """Train, from wherever an earlier process of the same job got to. Collective over all ranks.

    Args:
        job: what to train. `parallel_session(job.parallel, ...)` must be open.
        observer: called on rank 0 with every row that goes to metrics.jsonl.

    Raises:
        Interrupted: a stop signal came; everything is saved.
        UserError: the job cannot run, its checkpoints are unusable, the disk is full, or losses stay non-finite.
    """
    finished = from_rank_0(TrainResult.load(job) if dist.get_rank() == 0 else None)
    if finished is not None:
        return finished
    with StopRequest() as stop, Trainer(job, observer) as trainer:
        while trainer.progress.step < job.training.steps:
            stopping = trainer.train_step(stop)
            if trainer.due(job.training.validation_interval):
                trainer.validate()
            if stopping:
                trainer.save()
                raise Interrupted(f"{job.name}: stopped after step {trainer.progress.step}, checkpoint saved")
            if trainer.due(job.training.checkpoint_interval):
                trainer.save()
        result = trainer.finish()
        if any_rank(stop.requested):  # in the last validation or save: no step came that would have looked at it
            raise Interrupted(f"{job.name}: stopped after its last step, result saved")
        return result


class Trainer:
    """Models, optimiser, data and records of one job. Use as a context manager."""

    def __init__(self, job: TrainJob, observer: Observer | None = None):
        job.check()
        self.job, self.observer = job, observer
        self.is_main = dist.get_rank() == 0
        self.started = time.monotonic()
        self.dp_size = parallel_state.get_data_parallel_world_size()
        self.microbatches = job.training.microbatches(self.dp_size)
        self.student = self._build_student()
        self.models = self._wrap(self.student, self._build_teacher())
        training = job.training
        self.optimizer = Optimizer(
            self.models,
            training.optimizer,
            dtype=DTYPES[job.dtype],
            distributed=training.distributed_optimizer,
            undrawn=job.sampling is not None,
        )
        self.loader = self._loader(job.data.train_split)
        self.folder = CheckpointFolder(job.out / "checkpoints", job.config_hash(), job.model.to_dict())
        self.progress = self._resume()
        self.batches = iter(self.loader)
        self.validation_batches = self._validation_batches()

    def __enter__(self) -> "Trainer":
        self.seconds_before = self.progress.seconds
        self.recorder = Recorder(self.job, self.progress, enabled=self.is_main, observer=self.observer)
        return self

    def __exit__(self, *exc) -> None:
        self.recorder.close()
        if torch.cuda.is_available():
            # Hooks tie the models into reference cycles; without this the next job starts with their memory taken.
            del self.student, self.models, self.optimizer
            gc.collect()
            torch.cuda.empty_cache()

    def train_step(self, stop: StopRequest) -> bool:
        """Forward, backward and update on one global batch. Returns whether some rank was asked to stop."""
        started = time.monotonic()
        step, training = self.progress.step, self.job.training
        batches = take_batches(self.batches, self.microbatches)
        if self.job.sampling is not None:
            set_paths(self.student, self.job.sampling.draw(step))
        self.optimizer.zero_grad()
        terms = named_terms(run_microbatches(self.models, batches, normalizer(batches), forward_only=False))
        losses = self._losses(terms)
        grad_norm = self.optimizer.gradient_norm()
        lr = learning_rate(training.optimizer, step, training.steps)
        problem = first_non_finite({**terms, "grad_norm": grad_norm})
        if problem is None:
            self.optimizer.apply(lr, undrawn=idle_parameters(self.student))
        self._count(losses, problem, time.monotonic() - started)
        self.recorder.train(self.progress, losses, grad_norm, lr)
        return any_rank(stop.requested)

    @torch.no_grad()
    def validate(self) -> None:
        """Held-out losses; of a supernet, those of its all-linear member."""
        if self.job.sampling is not None:
            set_paths(self.student, self.job.sampling.all_linear())
        norm = normalizer(self.validation_batches)
        terms = run_microbatches(self.models, self.validation_batches, norm, forward_only=True)
        losses = self._losses(named_terms(terms))
        progress = self.progress
        progress.validation.append({"step": progress.step, **losses})
        self.recorder.validation(progress, losses)
        best = math.inf if progress.best_loss is None else progress.best_loss
        better = losses["loss"] < best  # never where it is not a number
        if self.job.training.keep_best and better:
            progress.best_step, progress.best_loss = progress.step, losses["loss"]
            self.folder.save_best(self.student, progress.step)

    def due(self, interval: int) -> bool:
        """Whether something done every `interval` steps (0: never) comes after the current step."""
        return interval > 0 and self.progress.step % interval == 0

    def save(self) -> None:
        """Write a checkpoint and delete the old ones, unless another attempt at this job has taken over."""
        self._leave_if_superseded()
        progress = self.progress
        progress.seconds = self.seconds_before + time.monotonic() - self.started
        # Clocks differ between ranks, which Megatron reports for what all ranks save in common.
        progress.seconds, progress.step_seconds = from_rank_0((progress.seconds, progress.step_seconds))
        self.folder.save(self.student, self.optimizer, progress, self.loader.state_dict())
        self.folder.prune(progress.step, progress.best_step)

    def finish(self) -> TrainResult:
        """Save the end, unless it is saved already, and sum up. A damaged one that was passed over is made anew."""
        progress, job = self.progress, self.job
        if not self.folder.holds(progress.step):
            self.save()
        progress.seconds = self.seconds_before + time.monotonic() - self.started
        best = self.folder.best_directory(progress.best_step) if progress.best_step is not None else None
        result = TrainResult(
            checkpoint=self.folder.directory(progress.step) / "model",
            best_checkpoint=best,
            steps=progress.step,
            tokens=progress.tokens,
            final_losses=progress.final_losses,
            validation=progress.validation,
            seconds=progress.seconds,
            tokens_per_second=progress.tokens / max(progress.step_seconds, 1e-9),
        )
        self._leave_if_superseded()
        on_rank_0(lambda: result.save(job))
        return result

    def _leave_if_superseded(self) -> None:
        """Raise SupersededError on all ranks where another attempt at this job has started since."""
        by = from_rank_0(superseded() if self.is_main else None)
        if by is not None:
            raise SupersededError(by)

    def _build_student(self) -> list:
        job = self.job
        choices = job.sampling.choices if job.sampling is not None else None
        student = build_model(
            job.model,
            job.parallel,
            dtype=job.dtype,
            choices=choices,
            recompute=job.training.recompute,
            init_seed=None,
        )
        load_model(student, job.init)
        freeze(student, job.training.trainable)
        return student

    def _build_teacher(self) -> list:
        job = self.job
        if not job.distills:
            return [None] * len(self.student)
        teacher = build_model(job.teacher, job.parallel, dtype=job.dtype, init_seed=None)
        load_model(teacher, job.teacher_checkpoint)
        share_frozen_tensors(self.student, teacher)
        return teacher

    def _wrap(self, student: list, teacher: list) -> list:
        job, loss = self.job, self.job.training.loss
        pairs = [DistillationModel(s, t, loss, job.model.num_layers) for s, t in zip(student, teacher)]
        return wrap_data_parallel(
            pairs,
            distributed_optimizer=job.training.distributed_optimizer,
            overlap=self.dp_size > 1 and job.sampling is None and loss.needs_logits,
        )

    def _loader(self, split: str) -> DataLoader:
        job = self.job
        return DataLoader(
            job.data,
            split,
            seq_length=job.training.seq_length,
            micro_batch_size=job.training.micro_batch_size,
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=self.dp_size,
            seed=job.seed,
        )

    def _validation_batches(self) -> list:
        """The same held-out batches every time, taken once; `validation_batches` global batches of them."""
        training = self.job.training
        if not training.validation_interval:
            return []
        loader = self._loader(self.job.data.heldout_split)
        return take_batches(iter(loader), training.validation_batches * self.microbatches)

    def _resume(self) -> Progress:
        restored = self.folder.load_latest(self.student, self.optimizer)
        if restored is None:
            return Progress()
        progress, data_states = restored
        self.loader.load_state_dict(self._own_data_state(data_states))
        return progress

    def _own_data_state(self, states: list):
        """This rank's place in the data. With another number of ranks it must be a place in the global order."""
        if len(states) == self.dp_size:
            return states[parallel_state.get_data_parallel_rank()]
        if any(state != states[0] for state in states):
            raise UserError(
                f"{self.job.name}: the checkpoint is of {len(states)} data-parallel ranks and this data cannot be "
                f"dealt out anew to {self.dp_size}"
            )
        return states[0]

    def _losses(self, terms: dict[str, float]) -> dict[str, float]:
        loss = self.job.training.loss
        total = loss.feature * terms["feature"] + loss.kl * terms["kl"] + loss.cross_entropy * terms["cross_entropy"]
        return {"loss": total, **terms}

    def _count(self, losses: dict[str, float], problem: str | None, seconds: float) -> None:
        """Count the step; fail when too many had to be skipped."""
        progress, training = self.progress, self.job.training
        progress.count_step(training, None if problem else losses, seconds)
        if problem is None:
            return
        self.recorder.say(f"step {progress.step} skipped: {problem}")
        if progress.skipped > training.nan_limit:
            raise UserError(
                f"{self.job.name}: step {progress.step}: {problem}; {progress.skipped} steps skipped, more than "
                f"nan_limit={training.nan_limit}. Lower optimizer.lr or look at the data"
            )


def first_non_finite(values: dict[str, float]) -> str | None:
    """ "kl is nan" for the first term that is not finite."""
    return next((f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)), None)
