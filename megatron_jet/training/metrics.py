"""metrics.jsonl and TensorBoard: one row per logged step, written by rank 0."""

import json
import logging
import math
import resource
from pathlib import Path
from typing import Any, TextIO

import torch

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import remove, write_text

log = logging.getLogger(__name__)

TENSORBOARD_KEYS = (
    "loss",
    "feature",
    "kl",
    "cross_entropy",
    "grad_norm",
    "lr",
    "tokens_per_second",
    "memory_mib",
)


class MetricsLog:
    """Appends rows. After a resume, rows of steps that are about to be done again are cut first.

    Args:
        out: directory that gets metrics.jsonl and tensorboard/.
        first_step: rows of later steps than this many finished ones are removed.
        tensorboard: also write TensorBoard events.
    """

    def __init__(self, out: Path, first_step: int, *, tensorboard: bool = True):
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / "metrics.jsonl"
        cut_rows(self.path, first_step)
        self._file: TextIO = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        self._events = _event_writer(out / "tensorboard", first_step) if tensorboard else None

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; non-finite numbers become null, which every JSON reader accepts."""
        clean = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        try:
            self._file.write(json.dumps(clean) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from None
        if self._events is not None:
            for key in TENSORBOARD_KEYS:
                if clean.get(key) is not None:
                    self._events.add_scalar(f"{row['split']}/{key}", clean[key], row["step"])

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


def cut_rows(path: Path, steps: int) -> None:
    """Keep the rows of the first `steps` steps. A line that a kill cut in half is dropped as well; more that cannot be
    read are dropped with a line that says so."""
    if path.is_dir():
        remove(path)
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found = [_step_of(line) for line in lines]
    kept = [line for line, step in zip(lines, found) if step is not None and step <= steps]
    if None in found[:-1]:
        log.warning("%s: some rows cannot be read; the curves lack them", path)
    write_text(path, "".join(f"{line}\n" for line in kept))


def _step_of(line: str) -> int | None:
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if isinstance(step, int) else None


def memory_mib() -> float:
    """Peak memory of this process: of the GPU where there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _event_writer(path: Path, first_step: int):
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(path), purge_step=first_step + 1 if first_step else None, flush_secs=30)
