"""Write a trained teacher as a Hugging Face directory with everything one needs to judge it."""

import json
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import matplotlib.figure
import torch
from transformers import Qwen2ForCausalLM

from megatron_jet.configs.directories import replaced_directory
from megatron_jet.configs.files import hash_json, write_json, write_text
from megatron_jet.data.prepare import prepare_bundled
from megatron_jet.data.stdlib import SPLITS, read_stdlib
from megatron_jet.teacher.model import save_tokenizer
from megatron_jet.teacher.scores import knock_outs, score_split

SAMPLES = 256  # sequences per evaluation set


@dataclass(frozen=True)
class Origin:
    """Where a teacher comes from: the command that trained it, its seed, and a remark for the card."""

    command: str
    seed: int
    note: str = ""


def publish(model: Qwen2ForCausalLM, curve: Path, out: Path, origin: Origin) -> dict:
    """Writes weights, tokenizer, scores.json, manifest.json, curve.jsonl, curve.png and README.md into `out`.

    Args:
        model: the trained teacher.
        curve: its curve.jsonl.
        out: directory, made anew; an earlier one stays until this one is whole.
        origin: how it was trained.

    Returns:
        what scores.json holds.
    """
    with replaced_directory(out) as folder:
        return _write(model, curve, folder, origin)


def _write(model: Qwen2ForCausalLM, curve: Path, out: Path, origin: Origin) -> dict:
    """All files, into an empty folder."""
    model.save_pretrained(out)
    save_tokenizer(out)
    shutil.copyfile(curve, out / "curve.jsonl")
    rows = [json.loads(line) for line in curve.read_text().splitlines()]
    draw_curve(rows, out / "curve.png")
    data = curve.parent / "data"
    prepare_bundled(data, out)
    scores = {split: score_split(model, data, split, SAMPLES).to_dict() for split in ("search", "heldout")}
    scores["without_attention_of_layer"] = [knocked.to_dict() for knocked in knock_outs(model, data, "search")]
    write_json(out / "scores.json", scores)
    write_json(out / "manifest.json", manifest(origin, rows[-1]))
    write_text(out / "README.md", card(model, scores, rows[-1], origin))
    return scores


def manifest(origin: Origin, last: dict) -> dict:
    """Returns how the teacher was made: command, versions, and the checksum of every text file by split."""
    documents = {split: {file.path: file.sha256 for file in read_stdlib(split)} for split in SPLITS}
    return {
        "command": origin.command,
        "seed": origin.seed,
        "note": origin.note,
        "steps": last["step"],
        "tokens": last["tokens"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "text": "source files of the Python standard library, split by a hash of their path",
        "text_sha256": hash_json(documents),
        "documents": {split: {"files": len(files), "sha256": hash_json(files)} for split, files in documents.items()},
        "files": documents,
        "measured": {"seconds": last["seconds"], "processor": platform.processor() or platform.machine()},
    }


def draw_curve(rows: list[dict], path: Path) -> None:
    """Draws accuracies and the text loss over training tokens."""
    figure = matplotlib.figure.Figure(figsize=(7, 3.2), layout="constrained")
    accuracy, loss = figure.subplots(1, 2)
    for name in ("recall", "alternating", "choice", "repeated", "copy"):
        points = [(row["tokens"] / 1e6, row[name]["accuracy"]) for row in rows if name in row]
        accuracy.plot(*zip(*points, strict=True), label=name)
    accuracy.set(xlabel="million tokens", ylabel="training accuracy", ylim=(0, 1.02))
    accuracy.legend(frameon=False)
    points = [(row["tokens"] / 1e6, row["text"]["loss"]) for row in rows if "text" in row]
    loss.plot(*zip(*points, strict=True), color="tab:purple")
    loss.set(xlabel="million tokens", ylabel="text loss (nats per byte)")
    figure.savefig(path, dpi=110)


def card(model: Qwen2ForCausalLM, scores: dict, last: dict, origin: Origin) -> str:
    """Returns README.md of the teacher."""
    config = model.config
    lines = [
        "# Tiny teacher",
        "",
        f"A Qwen2 model of {model.num_parameters():,} parameters ({config.num_hidden_layers} layers, width "
        f"{config.hidden_size}, {config.num_attention_heads} heads, {config.num_key_value_heads} KV heads, tied "
        "embeddings), trained from random weights by",
        "",
        f"    {origin.command}",
        "",
        f"with seed {origin.seed}: {last['step']:,} steps, {last['tokens'] / 1e6:.1f}M tokens, "
        f"{last['seconds'] / 60:.0f} minutes on one CPU core. Time is the budget, so another machine takes another",
        "number of steps.",
        "Text is the source of Python's standard library as bytes, split by a hash of the file's path; `manifest.json`",
        "has the checksum of every file. The synthetic tasks are drawn anew for every batch. `curve.jsonl` is the",
        "training curve.",
        *([origin.note] if origin.note else []),
        "",
        "![training curve](curve.png)",
        "",
        "## Scores on data it was not trained on",
        "",
        f"{SAMPLES} sequences of 256 tokens each; the recipe's search and held-out splits.",
        "",
        "| ability | search accuracy | search loss | held-out accuracy | held-out loss |",
        "|---|---|---|---|---|",
        *(_score_row(name, scores) for name in scores["heldout"]["loss"]),
        "",
        "- recall: multi-query associative recall, 16 to 48 pairs of 64 keys and 64 values, independent queries",
        "- choice: which of four options is the attribute of an entity; facts in the weights, options in the context",
        "- copy: second copies of random strings and of text from elsewhere, inserted into text",
        "- text: nats per byte",
        "",
        "## Without the attention of one layer",
        "",
        "The output of one attention layer is set to zero. Accuracy on the search split; loss for text.",
        "",
        "| layer | " + " | ".join(scores["search"]["loss"]) + " |",
        "|---|" + "---|" * len(scores["search"]["loss"]),
    ]
    for layer, row in enumerate(scores["without_attention_of_layer"]):
        cells = [f"{row['accuracy'].get(name, loss):.3f}" for name, loss in row["loss"].items()]
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "## Licence",
        "",
        "Apache-2.0, as the project. The text is under the Python Software Foundation License.",
    ]
    return "\n".join(lines) + "\n"


def _score_row(name: str, scores: dict) -> str:
    cells = []
    for split in ("search", "heldout"):
        accuracy = scores[split]["accuracy"].get(name)
        cells += ["" if accuracy is None else f"{accuracy:.3f}", f"{scores[split]['loss'][name]:.3f}"]
    return f"| {name} | " + " | ".join(cells) + " |"
