"""Training of the tiny teacher on one CPU core: text and synthetic tasks, a curriculum, Muon and AdamW."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Qwen2ForCausalLM

from megatron_jet.configs.directories import one_line
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.signals import Interrupted, StopRequest
from megatron_jet.data.stdlib import SourceFile, read_stdlib
from megatron_jet.tasks import vocabulary as vocab
from megatron_jet.teacher.curriculum import Batch, Curriculum
from megatron_jet.teacher.model import build_teacher
from megatron_jet.teacher.muon import Muon

MUON_LR, ADAM_LR = 0.02, 3e-3
WARMUP_STEPS = 30
DECAY_START, FINAL_LR = 0.5, 0.02  # constant rate for half of the training, then linear to 2%
CHECKPOINT_SECONDS = 120
LOG_STEPS = 25
STATE = ("seed", "model", "optimizers", "curriculum", "rng", "clock")  # what a checkpoint holds
SOURCES = ("recall", "alternating", "choice", "repeated", "copy", "text")


@dataclass(frozen=True)
class TeacherRun:
    """One training run.

    Attributes:
        out: directory; gets checkpoints/ and curve.jsonl.
        minutes: processor time to train for, so that a busy machine does not shorten training; time spent before an
            interruption counts.
        seed: of initial weights and batches.
    """

    out: Path
    minutes: float
    seed: int


class Training:
    """Model, optimisers, curriculum and clock; everything a checkpoint holds."""

    def __init__(self, run: TeacherRun):
        self.run = run
        self.model = build_teacher(run.seed)
        self.rng = np.random.default_rng(run.seed)
        self.curriculum = Curriculum()
        self.text = encode_documents(read_stdlib("train"))
        embeddings = self.model.get_input_embeddings().weight
        matrices = [p for p in self.model.parameters() if p.dim() == 2 and p is not embeddings]
        others = [p for p in self.model.parameters() if p.dim() < 2 or p is embeddings]
        self.optimizers = [
            Muon(matrices, MUON_LR),
            torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        ]
        self.step, self.tokens, self.seconds = 0, 0, 0.0

    @property
    def progress(self) -> float:
        """Share of the training time spent."""
        return self.seconds / (60 * self.run.minutes)

    def train_step(self) -> dict[str, dict[str, float]]:
        """Takes one step; returns loss and accuracy of every source in the batch."""
        started = time.process_time()
        rate = learning_rate_factor(self.step, self.progress)
        for optimizer, base in zip(self.optimizers, (MUON_LR, ADAM_LR), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * rate
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        stats = {}
        for batch in self.curriculum.batches(self.rng, self.text):
            loss, stats[batch.source] = batch_loss(self.model, batch)
            (batch.weight * loss).backward()
            self.tokens += batch.tokens.size
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        self.seconds += time.process_time() - started
        self.curriculum.update({name: s["accuracy"] for name, s in stats.items()})
        return stats

    def save(self) -> None:
        """Writes checkpoints/last.pt atomically."""
        path = self.run.out / "checkpoints" / "last.pt"
        bad = [name for name, tensor in self.model.named_parameters() if not tensor.isfinite().all()]
        if bad:
            raise UserError(f"{path}: not written, {bad[0]} holds NaN or infinite values; the one before is intact")
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "seed": self.run.seed,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "curriculum": self.curriculum.state(),
            "rng": json.dumps(self.rng.bit_generator.state),
            "clock": [self.step, self.tokens, self.seconds],
        }
        temporary = path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, path)

    def load(self) -> None:
        """Goes on from checkpoints/last.pt. Raises UserError when it is missing or of another seed."""
        state = read_checkpoint(self.run)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.curriculum = Curriculum(**state["curriculum"])
        self.rng.bit_generator.state = json.loads(state["rng"])
        self.step, self.tokens, self.seconds = state["clock"]


def read_checkpoint(run: TeacherRun) -> dict:
    """Returns the state of a run's last checkpoint. Raises UserError when there is none, or one of another seed."""
    path = run.out / "checkpoints" / "last.pt"
    if not path.is_file():
        raise UserError(f"{path}: no checkpoint there; train without --resume first")
    try:
        state = torch.load(path, weights_only=True)
    except Exception as error:  # torch raises many kinds
        raise UserError(f"{path}: is damaged, or no checkpoint of this tool ({one_line(error)})") from None
    if isinstance(state, dict) and state.get("seed", run.seed) != run.seed:
        raise UserError(f"{path} was trained with --seed {state['seed']}, not {run.seed}")
    missing = [key for key in STATE if key not in state] if isinstance(state, dict) else list(STATE)
    if missing:
        raise UserError(f"{path}: is no checkpoint of this tool (it has no {missing[0]})")
    bad = [name for name, tensor in state["model"].items() if not torch.isfinite(tensor).all()]
    if bad:
        raise UserError(f"{path}: {bad[0]} holds NaN or infinite values; train without --resume")
    return state


def load_teacher(run: TeacherRun) -> Qwen2ForCausalLM:
    """Returns the model of a run's last checkpoint. Raises UserError as read_checkpoint does."""
    model = build_teacher(run.seed)
    model.load_state_dict(read_checkpoint(run)["model"])
    return model


def learning_rate_factor(step: int, progress: float) -> float:
    """Returns the factor on both learning rates: linear warm-up, constant, linear decay."""
    decay = min(1.0, FINAL_LR + (1 - FINAL_LR) * (1 - progress) / (1 - DECAY_START))
    return min(1.0, (step + 1) / WARMUP_STEPS) * max(FINAL_LR, decay)


def batch_loss(model: Qwen2ForCausalLM, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
    """Returns the mean cross-entropy in nats over learned tokens, and it with the accuracy over scored tokens."""
    tokens = torch.from_numpy(batch.tokens)
    learned, scored = torch.from_numpy(batch.learned)[:, 1:], torch.from_numpy(batch.scored)[:, 1:]
    targets = tokens[:, 1:]
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits  # [b, s, v]
    loss = F.cross_entropy(logits[learned], targets[learned])
    correct = (logits.detach()[scored].argmax(-1) == targets[scored]).float()
    return loss, {"loss": loss.item(), "accuracy": correct.mean().item()}


def encode_documents(files: list[SourceFile]) -> np.ndarray:
    """Returns the files' bytes as tokens, `[m]` uint16, each document followed by the end-of-text token."""
    end = np.array([vocab.END_OF_TEXT], np.uint16)
    parts = [part for file in files for part in (np.frombuffer(file.content, np.uint8).astype(np.uint16), end)]
    return np.concatenate(parts)


def train_teacher(run: TeacherRun, *, resume: bool = False, log: Callable[[str], None] = print) -> Qwen2ForCausalLM:
    """Trains a teacher for `run.minutes` and writes curve.jsonl and checkpoints as it goes.

    Returns:
        the trained model.

    Raises:
        UserError: when resuming without a fitting checkpoint, or this Python has no standard library source.
        Interrupted: stopped by a signal, with a checkpoint to go on from.
    """
    with StopRequest() as stop:
        model = _train(run, resume, log, stop)
        if stop.requested:
            raise Interrupted("stopped after the last step, checkpoint saved")
        return model


def _train(run: TeacherRun, resume: bool, log: Callable[[str], None], stop: StopRequest) -> Qwen2ForCausalLM:
    """The loop of the above; a request to stop is looked at after every step."""
    torch.manual_seed(run.seed)
    training = Training(run)
    run.out.mkdir(parents=True, exist_ok=True)
    curve = run.out / "curve.jsonl"
    if resume:
        training.load()
        keep_rows(curve, training.step)
    else:
        curve.unlink(missing_ok=True)
        log(f"text: {len(training.text):,} tokens of Python's standard library")
    saved = time.monotonic()
    window: list[dict[str, dict[str, float]]] = []
    while training.progress < 1:
        window.append(training.train_step())
        if training.step % LOG_STEPS == 0:
            row = log_row(training, window)
            window = []
            with open(curve, "a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")
            log(progress_line(row, run.minutes))
        if stop.requested or time.monotonic() - saved > CHECKPOINT_SECONDS:
            training.save()
            saved = time.monotonic()
        if stop.requested:
            raise Interrupted(f"stopped after step {training.step}, checkpoint saved; go on with --resume")
    training.save()
    return training.model


def keep_rows(curve: Path, step: int) -> None:
    """Drops the rows of a curve that lie after the checkpoint from which training goes on."""
    if curve.is_file():
        rows = [line for line in curve.read_text().splitlines() if json.loads(line)["step"] <= step]
        curve.write_text("".join(row + "\n" for row in rows))


def log_row(training: Training, window: list[dict[str, dict[str, float]]]) -> dict:
    """Returns a row of the curve: means over the steps since the last row."""
    row = {"step": training.step, "tokens": training.tokens, "seconds": round(training.seconds, 1)}
    curriculum = training.curriculum
    row |= {"hint": curriculum.hint, "keys": curriculum.keys, "pairs": curriculum.pairs}
    for name in SOURCES:
        stats = [s[name] for s in window if name in s]
        if stats:
            row[name] = {key: round(sum(s[key] for s in stats) / len(stats), 4) for key in ("loss", "accuracy")}
    return row


def progress_line(row: dict, minutes: float) -> str:
    """Returns one line that a person follows."""
    scores = " ".join(
        f"{name} {row[name]['loss']:.3f}" if name == "text" else f"{name} {row[name]['accuracy']:.3f}"
        for name in SOURCES
        if name in row
    )
    return (
        f"step {row['step']} {row['seconds'] / 60:.1f}/{minutes:g} min hint {row['hint']:.1f} keys {row['keys']} "
        f"pairs {row['pairs']} | {scores} | {row['tokens'] / row['seconds']:.0f} tokens/s"
    )
