"""What to train, and what came out."""

import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_jet.configs.checksums import verify
from megatron_jet.configs.directories import one_line
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import hash_json, read_written, write_checked
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.training import DataConfig, ParallelConfig, TrainingConfig
from megatron_jet.training.checkpoint import check_complete
from megatron_jet.training.sampling import PathSampling

log = logging.getLogger(__name__)

RESULT_FILE = "train_result.json"


@dataclass(frozen=True)
class TrainJob:
    """One training run.

    Attributes:
        name: shown in progress and logs.
        model: the student.
        init: model checkpoint that the student starts from, of any layout.
        training: steps, batch, optimiser, losses.
        parallel: layout; must be initialised already.
        dtype: "fp32" or "bf16".
        data: prepared directory and blend.
        seed: of the data order.
        out: gets metrics.jsonl, tensorboard/, checkpoints/ and train_result.json.
        teacher: frozen model to distil from; needed by feature and KL losses.
        teacher_checkpoint: its weights.
        sampling: supernet training: a path per layer and step.
    """

    name: str
    model: ModelConfig
    init: Path
    training: TrainingConfig
    parallel: ParallelConfig
    dtype: str
    data: DataConfig
    seed: int
    out: Path
    teacher: ModelConfig | None = None
    teacher_checkpoint: Path | None = None
    sampling: PathSampling | None = None

    def check(self) -> None:
        """Raise UserError when the parts do not fit together."""
        if self.training.loss.needs_teacher and (self.teacher is None or self.teacher_checkpoint is None):
            raise UserError(f"{self.name}: feature and KL losses need a teacher; give one or set their weights to 0")
        if self.teacher is not None:
            for field in ("hidden_size", "num_layers", "vocab_size"):
                if getattr(self.teacher, field) != getattr(self.model, field):
                    raise UserError(
                        f"{self.name}: {field} is {getattr(self.teacher, field)} in the teacher "
                        f"and {getattr(self.model, field)} in the student; they must be equal"
                    )
        if self.sampling is not None and len(self.sampling.choices) != self.model.num_layers:
            raise UserError(
                f"{self.name}: path choices for {len(self.sampling.choices)} layers, "
                f"the model has {self.model.num_layers}"
            )

    @property
    def distills(self) -> bool:
        """Whether a teacher runs along."""
        return self.teacher is not None and self.training.loss.needs_teacher

    def config_hash(self) -> str:
        """Of everything that decides the result; not of paths, nor of the layout, which a resumed run may change."""
        training = self.training.to_dict()
        for key in ("checkpoint_interval", "log_interval", "recompute"):
            training.pop(key)
        return hash_json(
            {
                "model": self.model.to_dict(),
                "training": training,
                "dtype": self.dtype,
                "data": self.data.to_dict() | {"path": None},
                "seed": self.seed,
                "teacher": self.teacher.to_dict() if self.distills else None,
                "sampling": _plain(asdict(self.sampling)) if self.sampling else None,
            }
        )


@dataclass(frozen=True)
class TrainResult:
    """What training gave.

    Attributes:
        checkpoint: weights after the last step.
        best_checkpoint: weights with the lowest validation loss, with `keep_best`.
        steps: optimiser steps, skipped ones included.
        tokens: seen in training.
        final_losses: means over the last tenth of the steps: total, feature, kl, cross_entropy (nats per token).
        validation: step and held-out losses of each validation.
        seconds: in the trainer, over all restarts.
        tokens_per_second: in training steps alone.
    """

    checkpoint: Path
    best_checkpoint: Path | None
    steps: int
    tokens: int
    final_losses: dict[str, float]
    validation: list[dict[str, float]]
    seconds: float
    tokens_per_second: float

    def save(self, job: TrainJob) -> None:
        """Write train_result.json; paths are kept relative to the job's directory, which may move."""
        plain = asdict(self)
        for key in ("checkpoint", "best_checkpoint"):
            plain[key] = None if plain[key] is None else str(plain[key].relative_to(job.out))
        measured = {key: plain.pop(key) for key in ("seconds", "tokens_per_second")}
        write_checked(job.out / RESULT_FILE, {"config_hash": job.config_hash(), **plain, "measured": measured})

    @classmethod
    def load(cls, job: TrainJob) -> "TrainResult | None":
        """The result of an earlier, finished run of the same job, if there is one that can be used. Rank 0 only.

        Where its weights are damaged, they are set aside with a line that says so, and the job starts over.
        """
        path = job.out / RESULT_FILE
        if not path.exists():
            return None
        try:
            result = cls._parse(job, read_written(path))
        except UserError as error:
            log.warning("%s; the end of %s is done again", error, job.name)
            return None
        if result is None or not result.checkpoint.exists():
            return None
        damaged = [problem for weights in result._weights() if (problem := _set_aside(weights)) is not None]
        for problem in damaged:
            log.warning("%s; %s is trained again", problem, job.name)
        return None if damaged else result

    def _weights(self) -> list[Path]:
        return [path for path in (self.checkpoint, self.best_checkpoint) if path is not None]

    @classmethod
    def _parse(cls, job: TrainJob, plain: dict[str, Any]) -> "TrainResult | None":
        """A result of this very job. Raises UserError for content that is none."""
        if plain.pop("config_hash", None) != job.config_hash():
            return None
        try:
            plain.pop("schema_version")
            measured = plain.pop("measured")
            best = plain.pop("best_checkpoint")
            return cls(
                checkpoint=_weights_of(job, plain.pop("checkpoint")),
                best_checkpoint=None if best is None else _weights_of(job, best),
                **plain,
                **measured,
            )
        except (KeyError, TypeError) as error:
            raise UserError(f"{job.out / RESULT_FILE}: is no training result ({one_line(error)})") from None


def _weights_of(job: TrainJob, stored: str) -> Path:
    """A checkpoint that a result names. Raises UserError when it is none of the job's: it may get set aside."""
    inner = Path(stored).parts
    if Path(stored).is_absolute() or ".." in inner or inner[:1] != ("checkpoints",) or not 2 <= len(inner) <= 3:
        raise UserError(f"{job.out / RESULT_FILE}: names {stored!r}, which is no checkpoint of this job")
    return job.out / stored


def _set_aside(weights: Path) -> str | None:
    """What is wrong with finished weights. If anything is, they get another name: nobody takes them for good, and their
    place is free. What is saved next removes them."""
    try:
        check_complete(weights)
        verify(weights)
    except UserError as error:
        own = weights.parent if weights.name == "model" else weights
        shutil.rmtree(own.with_name(f"damaged-{own.name}"), ignore_errors=True)
        if own.exists():
            os.rename(own, own.with_name(f"damaged-{own.name}"))
        return str(error)
    return None


def _plain(value: Any) -> Any:
    """Tuples to lists and keys to strings, as JSON has them."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
