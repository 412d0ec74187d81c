"""Models to time: loaded from a directory, or of some shape with random weights, which run equally fast."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import read_json
from megatron_jet.configs.hf_format import model_from_hf, model_to_hf
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.recipes.known_models import KNOWN_MODELS
from megatron_jet.convert.hf_package import MODELS, load_for_causal_lm

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ATTENTIONS = ("auto", "sdpa", "flash_attention_2", "eager")


@dataclass(frozen=True)
class Subject:
    """A model under test.

    Attributes:
        name: in tables and files.
        shape: what the cost formulas need.
        model: in eval mode, on its device.
        random: whether its weights are random.
    """

    name: str
    shape: ModelConfig
    model: PreTrainedModel
    random: bool


def open_subjects(specs: Sequence[str], **options) -> list[Subject]:
    """Several models with the options of `open_subject`; two of one name are told apart by a number."""
    subjects = []
    for what in specs:
        subject = open_subject(what, **options)
        alike = sum(other.name.partition(" (")[0] == subject.name for other in subjects)
        subjects.append(replace(subject, name=f"{subject.name} ({alike + 1})") if alike else subject)
    return subjects


def open_subject(
    what: str, *, dtype: str, attention: str, device: torch.device, longest: int, beyond_positions: bool = False
) -> Subject:
    """Load or make a model.

    Args:
        what: a directory with weights; or, for random weights, a config.json or a published model's name.
        dtype: "fp32", "bf16" or "fp16".
        attention: one of ATTENTIONS; auto takes flash attention on a GPU where it is installed, else SDPA.
        longest: tokens a sequence will have at most.
        beyond_positions: let sequences be longer than the model was made for. Speed does not depend on it.

    Raises:
        UserError: no such model, one the cost formulas do not know, or too few positions.
    """
    path = Path(what)
    attention = choose_attention(attention, device)
    random = what in KNOWN_MODELS or path.suffix == ".json"
    config_file = path if random else path / "config.json"
    if not random and not config_file.is_file():
        known = ", ".join(KNOWN_MODELS)
        raise UserError(f"{what}: no config.json there; give a directory with weights, a config.json or one of {known}")
    shape = KNOWN_MODELS[what]() if what in KNOWN_MODELS else model_from_hf(read_json(config_file), str(config_file))
    if beyond_positions:
        shape = shape.replace(max_position_embeddings=max(longest, shape.max_position_embeddings))
    check_positions(shape.max_position_embeddings, longest, what, " or add --beyond-positions")
    if random:
        model = random_model(shape, dtype, device, attention)
    else:
        model = load_for_causal_lm(path, dtype=DTYPES[dtype], attn_implementation=attention).to(device)
    return Subject(display_name(what), shape, model.eval(), random)


def display_name(what: str) -> str:
    """A name without the path: the directory's or, of a config.json, its own or its directory's."""
    path = Path(what)
    if what in KNOWN_MODELS:
        return what
    named = path.resolve().parent if path.name == "config.json" else path.resolve()
    name = named.stem if named.suffix == ".json" else named.name
    return f"{named.parent.name}/{name}" if name == "export" else name  # exports of runs are all called that


def choose_attention(wanted: str, device: torch.device) -> str:
    """Raises UserError when flash attention is asked for and cannot run."""
    flash = device.type == "cuda" and is_flash_attn_2_available()
    if wanted == "auto":
        return "flash_attention_2" if flash else "sdpa"
    if wanted == "flash_attention_2" and not flash:
        raise UserError("flash_attention_2 needs a GPU and the package flash-attn (pip install flash-attn); use sdpa")
    return wanted


def check_positions(positions: int, longest: int, where: str, advice: str = "") -> None:
    """Raises UserError when a sequence would have more tokens than the model has positions."""
    if longest > positions:
        raise UserError(
            f"{where}: {longest} tokens (context and new ones) are more than the model's {positions} positions; "
            f"choose shorter contexts{advice}"
        )


def random_model(model: ModelConfig, dtype: str, device: torch.device, attention: str = "sdpa") -> PreTrainedModel:
    """A Hugging Face model of this shape, weights as initialised."""
    config = model_to_hf(model, str(DTYPES[dtype]).removeprefix("torch."))
    model_type = config.pop("model_type")
    with torch.device(device):
        if model_type in MODELS:
            model_class = MODELS[model_type]
            made = model_class._from_config(model_class.config_class(**config), attn_implementation=attention)
        else:
            made = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(model_type, **config), attn_implementation=attention
            )
        return made.to(DTYPES[dtype]).eval()
