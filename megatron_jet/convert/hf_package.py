"""Ships the Hugging Face modeling code with a checkpoint, and loads such checkpoints with the code in this tree."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import read_json
from megatron_jet.convert.companions import modeling_files
from megatron_jet.convert.hf import configuration_megatron_jet, modeling_megatron_jet
from megatron_jet.convert.hf.modeling_megatron_jet import (
    JetNemotronForCausalLM,
    JetNemotronModel,
    MegatronJetForCausalLM,
    MegatronJetModel,
)

MODELS: dict[str, type[PreTrainedModel]] = {
    "jet_nemotron": JetNemotronForCausalLM,
    "megatron_jet": MegatronJetForCausalLM,
}
BASE_MODELS: dict[str, type[PreTrainedModel]] = {"jet_nemotron": JetNemotronModel, "megatron_jet": MegatronJetModel}


def write_modeling_code(out_dir: Path | str) -> list[Path]:
    """Copies the modeling code into a checkpoint directory, as plain files that need torch and transformers only.

    In this tree the recurrences are links to the kernels' reference files; the copies are real files.

    Args:
        out_dir: an existing directory.

    Returns:
        The files written.
    """
    return [Path(shutil.copyfile(path, Path(out_dir) / path.name)) for path in modeling_files()]


def auto_map(model_type: str) -> dict[str, str]:
    """The entry of config.json that tells transformers' Auto classes where the shipped code is.

    Raises:
        UserError: not one of this project's model types.
    """
    if model_type not in MODELS:
        raise UserError(f"model_type '{model_type}' has no modeling code here; known: {', '.join(MODELS)}")
    model_class = MODELS[model_type]
    configuration = configuration_megatron_jet.__name__.rpartition(".")[2]
    modeling = modeling_megatron_jet.__name__.rpartition(".")[2]
    return {
        "AutoConfig": f"{configuration}.{model_class.config_class.__name__}",
        "AutoModel": f"{modeling}.{BASE_MODELS[model_type].__name__}",
        "AutoModelForCausalLM": f"{modeling}.{model_class.__name__}",
    }


def hf_config(hf_dir: Path | str) -> dict[str, Any]:
    """config.json of a Hugging Face directory. Raises UserError when there is none, or it is no mapping."""
    path = Path(hf_dir) / "config.json"
    if not path.is_file():
        raise UserError(f"{hf_dir}: no config.json there; give a Hugging Face checkpoint directory")
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path}: holds no mapping of settings")
    return config


def load_for_causal_lm(hf_dir: Path | str, dtype: torch.dtype | str = "auto", **options: Any) -> PreTrainedModel:
    """Loads a Hugging Face checkpoint in eval mode, without running code from its directory.

    Args:
        hf_dir: with config.json and safetensors; a hybrid of ours, or a model that transformers itself knows.
        dtype: of the weights; by default as saved.
        options: for `from_pretrained`, such as attn_implementation.

    Raises:
        UserError: no such model, or files that do not make up one (a tensor too few, too many or misshapen).
    """
    model_type = hf_config(hf_dir).get("model_type")
    model_class = MODELS.get(model_type) if isinstance(model_type, str) else None
    if model_class is None:
        if model_type not in list(CONFIG_MAPPING):
            raise UserError(
                f"{hf_dir}: model_type '{model_type}' is neither ours ({', '.join(MODELS)}) nor transformers'"
            )
        model_class = AutoModelForCausalLM
    try:
        model, found = model_class.from_pretrained(
            hf_dir,
            dtype=dtype,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            **options,
        )
    except Exception as error:  # transformers and its validators raise what they like about what a file holds
        raise UserError(f"{hf_dir}: {reason(error)}") from error
    for name, in_file, expected in found["mismatched_keys"]:
        raise UserError(f"{hf_dir}: {name} has shape {list(in_file)}, the config asks for {list(expected)}")
    for problem in ("missing", "unexpected"):
        names = sorted(found[f"{problem}_keys"])
        if names:
            raise UserError(f"{hf_dir}: {len(names)} {problem} tensors, such as {', '.join(names[:3])}")
    return model.eval()


def reason(error: Exception) -> str:
    """The last line of a message: transformers puts the reason below its heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].removeprefix("ValueError: ") if lines else type(error).__name__
