"""Is a Megatron checkpoint the same model as a Hugging Face directory? Compares both, layer by layer, in fp32."""

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from safetensors.torch import load_file
from torch import Tensor
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.hf_format import model_from_hf, model_to_hf
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.training import ParallelConfig
from megatron_jet.convert.global_checkpoint import GlobalCheckpoint
from megatron_jet.convert.hf_export import checkpoint_config
from megatron_jet.convert.hf_import import weights_of
from megatron_jet.convert.hf_package import hf_config, load_for_causal_lm, reason
from megatron_jet.convert.verify import worker
from megatron_jet.convert.verify.worker import VerifyJob
from megatron_jet.model.param_table import param_table

SEQUENCES, LENGTH = 2, 96  # longer than one chunk of the chunked recurrences
EMBEDDING = "embedding.word_embeddings.weight"
EMBEDDING_ROWS = 8192  # compared at a time, to keep the fp32 copies small
SIZES = ("vocab_size", "hidden_size", "num_layers")  # named first: the rest follows from them
# Compared layer by layer, or without effect on what a model computes.
NOT_COMPARED = {"layer_plan", "mixers", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id"}


@dataclass(frozen=True)
class LayerDifference:
    """How much one layer's output (or the logits) differ.

    Attributes:
        name: "embedding", "layer 3 (jet)" or "logits".
        ratio: norm of the difference over norm of the Hugging Face tensor; of the embedding, that of its worst row.
        largest: largest absolute difference.
    """

    name: str
    ratio: float
    largest: float


def verify(hf_dir: str | Path, checkpoint: str | Path, parallel: ParallelConfig) -> list[LayerDifference]:
    """Run both models on the same random tokens.

    Args:
        hf_dir: Hugging Face directory.
        checkpoint: model checkpoint with model_config.json.
        parallel: layout of the Megatron side; tensor * pipeline processes are started on this machine.

    Returns:
        One row for the embedding, one per layer, in order, and one for the logits.

    Raises:
        UserError: either model cannot be loaded, their configs say different models, or the checkpoint does not fit the
            layout.
    """
    model = checkpoint_config(checkpoint)
    model.check_parallel(parallel.tensor, parallel.pipeline)
    check_same_model(hf_dir, model)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.vocab_size, (SEQUENCES, LENGTH), generator=generator)
    reference = hf_activations(hf_dir, tokens)
    with tempfile.TemporaryDirectory() as directory:
        run_megatron(VerifyJob(str(checkpoint), model, parallel, tokens, directory))
        found: dict[str, Tensor] = {}
        for path in Path(directory).glob("*.safetensors"):
            found |= load_file(path)
    embedding = _embedding_difference(hf_dir, checkpoint, model)
    names = {str(i): f"layer {i} ({entry})" for i, entry in enumerate(model.layer_plan)} | {"logits": "logits"}
    return [embedding, *(_difference(name, found[key], reference[key]) for key, name in names.items())]


def _embedding_difference(hf_dir: str | Path, checkpoint: str | Path, model: ModelConfig) -> LayerDifference:
    """Of the row of the embedding that differs most: the tokens of a comparison are few of the vocabulary's."""
    row = next(row for row in param_table(model) if row.key == EMBEDDING)
    parts = (GlobalCheckpoint(checkpoint).read(EMBEDDING), weights_of(Path(hf_dir), model).read(row.hf[0]))
    ratio = largest = 0.0
    for found, reference in zip(*(part.split(EMBEDDING_ROWS) for part in parts), strict=True):
        difference = found.float() - reference.float()
        norms = difference.norm(dim=-1) / reference.float().norm(dim=-1).clamp_min(1e-30)
        ratio = max(ratio, float(norms.nan_to_num(torch.inf).max()))
        largest = max(largest, float(difference.abs().nan_to_num(torch.inf).max()))
    return LayerDifference("embedding", ratio, largest)


def check_same_model(hf_dir: str | Path, model: ModelConfig) -> None:
    """Raise UserError when the Hugging Face directory's config says another model, and name what differs first.

    The tokens compared are fewer than a window may hold and rounding may hide an epsilon, so outputs cannot tell.
    """
    other = model_from_hf(hf_config(hf_dir), str(Path(hf_dir) / "config.json"))
    model = model_from_hf(model_to_hf(model))  # what no config.json says is not compared
    for name in SIZES:
        _same(hf_dir, name, getattr(other, name), getattr(model, name))
    for layer in range(model.num_layers):
        _same(hf_dir, f"layer {layer}", other.layer_plan[layer], model.layer_plan[layer])
        theirs, ours = other.mixer(layer).to_dict(), model.mixer(layer).to_dict()
        for key in ours:
            _same(hf_dir, f"layer {layer} ({model.layer_plan[layer]}): {key}", theirs[key], ours[key])
    for name in type(model).model_fields:
        if name not in NOT_COMPARED:
            _same(hf_dir, name, getattr(other, name), getattr(model, name))


def _same(hf_dir: str | Path, name: str, theirs: object, ours: object) -> None:
    if theirs != ours:
        raise UserError(f"{hf_dir}: {name} is {theirs}, in the checkpoint {ours}; these are different models")


def first_different(rows: list[LayerDifference], tolerance: float) -> LayerDifference | None:
    """The first row whose ratio is above the tolerance or is not a number."""
    return next((row for row in rows if not row.ratio <= tolerance), None)


def hf_activations(hf_dir: str | Path, tokens: Tensor) -> dict[str, Tensor]:
    """Output of every layer and the logits of a Hugging Face model: "0", "1", ..., "logits"."""
    model = load_for_causal_lm(hf_dir, dtype=torch.float32)
    check_as_loaded(hf_dir, model.config.to_dict())
    outputs: dict[str, Tensor] = {}

    def keep(index: int):
        def hook(module, inputs, output) -> None:
            outputs[str(index)] = output[0] if isinstance(output, tuple) else output

        return hook

    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(keep(index))
    try:
        with torch.no_grad():
            outputs["logits"] = model(input_ids=tokens, use_cache=False).logits
    except Exception as error:  # whatever its code makes of a config that it could load
        raise UserError(f"{hf_dir}: transformers cannot run this model: {reason(error)}") from error
    return {name: tensor.float().cpu() for name, tensor in outputs.items()}


def check_as_loaded(hf_dir: str | Path, loaded: dict[str, Any]) -> None:
    """Raise UserError when the config that transformers loaded is not what we read in the file.

    The tokens compared may be fewer than a window holds, so a gate read in another way would not show in the outputs.
    """
    where = str(Path(hf_dir) / "config.json")
    ours = model_from_hf(hf_config(hf_dir), where)
    theirs = model_from_hf(loaded | {"architectures": None, "auto_map": None}, f"{where} as loaded by transformers")
    for name in type(ours).model_fields:
        if name not in NOT_COMPARED - {"layer_plan"}:
            found, read = getattr(theirs, name), getattr(ours, name)
            if found != read:
                raise UserError(f"{where}: transformers loads {name} as {found}, here it is read as {read}")


def _difference(name: str, found: Tensor, reference: Tensor) -> LayerDifference:
    if found.shape != reference.shape:
        raise UserError(
            f"output {name} has shape {list(found.shape)}, in the Hugging Face model {list(reference.shape)}"
        )
    difference = found - reference
    ratio = float(difference.norm() / reference.norm().clamp_min(1e-30))
    return LayerDifference(name, ratio, float(difference.abs().max()))


def run_megatron(job: VerifyJob) -> None:
    """Run the Megatron side: here when one process is enough, else in processes of their own."""
    processes = job.parallel.tensor * job.parallel.pipeline
    if processes == 1:
        worker.run(0, job)
        return
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # it warns of each process that it ends
    try:
        # As daemons they end with this process, also when a signal ends it.
        torch.multiprocessing.spawn(worker.run, args=(job,), nprocs=processes, daemon=True)
    except (ProcessRaisedException, ProcessExitedException) as error:
        kind, _, message = _last_line(error).partition(": ")
        if kind.endswith(UserError.__name__):  # as text: the exception itself stayed in its process
            raise UserError(message) from None
        raise UserError(f"{job.checkpoint}: the Megatron model failed: {_last_line(error)}") from None


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
