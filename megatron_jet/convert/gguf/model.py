"""A GGUF file as a Hugging Face model: its config.json, and its tensors under their Hugging Face names."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_jet.configs.errors import UserError
from megatron_jet.convert.gguf.container import FLOATS, GgufFile

# llama.cpp's name -> Hugging Face's, of a whole model and of a layer.
MODEL_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
ROPE_FACTORS = "rope_freqs.weight"  # per pair of channels; Llama 3's scaling is nowhere else in the file


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp writes a family.

    Attributes:
        hf: class name of the Hugging Face model.
        config: keys of config.json that all models of the family have.
        interleaved: whether rows of Q and K were put in pairs for llama.cpp's rotary embedding, which turns channels
            2i and 2i + 1; Hugging Face turns i and i + d/2.
    """

    hf: str
    config: dict[str, Any]
    interleaved: bool


ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", {"attention_bias": False, "mlp_bias": False}, interleaved=True),
    "qwen2": Architecture("Qwen2ForCausalLM", {"use_sliding_window": False}, interleaved=False),
    "qwen3": Architecture(
        "Qwen3ForCausalLM", {"attention_bias": False, "use_sliding_window": False}, interleaved=False
    ),
}
# Fields that change a model and have no counterpart here, below the architecture's name; zero means "not used".
REFUSED = ("expert_count", "attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
REFUSED += ("logit_scale", "residual_scale", "embedding_scale", "attention.scale")
LLAMA3_FACTORS = (8.0, 32.0)  # Llama 3.1 and 3.2
LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class GgufModel:
    """Read access to a GGUF file's tensors by Hugging Face name, as `HfTensors` gives it.

    Attributes:
        directory: the file; named as in `HfTensors`, for messages.
        config: content of config.json.

    Raises:
        UserError: a family, tensor type or setting that is not read; the message names it.
    """

    def __init__(self, path: str | Path):
        self.file = GgufFile(path)
        self.directory = self.file.path
        name = self.file.fields.get("general.architecture")
        if name not in ARCHITECTURES:
            raise UserError(f"{path}: general.architecture is {name!r}; only {', '.join(ARCHITECTURES)} are read")
        self.name, self.architecture = name, ARCHITECTURES[name]
        self._places = self._named()
        self.config = self._config()

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def shape(self, name: str) -> tuple[int, ...]:
        return self.file.tensors[self._places[name]].shape

    def dtype(self, name: str) -> torch.dtype:
        """fp32 for every tensor of a file that is quantised, since fused tensors need one type; else as stored."""
        return torch.float32 if self.file.quantised else FLOATS[self.file.tensors[self._places[name]].kind]

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU."""
        tensor = self.file.read(self._places[name]).to(self.dtype(name))
        for projection, key in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if self.architecture.interleaved and f".{projection}." in name:
                tensor = halves(tensor, self.config[key])
        return tensor

    def _named(self) -> dict[str, str]:
        """Name in the file by Hugging Face name."""
        places = {}
        for name in self.file:
            layer = LAYER.fullmatch(name)
            stem, _, kind = name.rpartition(".")
            if layer and layer.group(2) in LAYER_TENSORS:
                places[f"model.layers.{layer.group(1)}.{LAYER_TENSORS[layer.group(2)]}.{layer.group(3)}"] = name
            elif stem in MODEL_TENSORS and kind == "weight":
                places[f"{MODEL_TENSORS[stem]}.weight"] = name
            elif name != ROPE_FACTORS:
                raise UserError(f"{self.directory}: tensor '{name}' is no part of a {self.name} model")
        return places

    def _config(self) -> dict[str, Any]:
        for key in REFUSED:
            if self._field(key, 0):
                raise UserError(f"{self.directory}: {self.name}.{key}={self._field(key)!r} is not supported")
        heads, width = self._number("attention.head_count"), self._number("embedding_length")
        head_dim = self._number("attention.key_length", width // heads)
        rotated = self._number("rope.dimension_count", head_dim)
        if rotated != head_dim or self._number("attention.value_length", head_dim) != head_dim:
            raise UserError(
                f"{self.directory}: {self.name}: heads of {head_dim} channels of which {rotated} are rotated, or "
                "values of another width; only whole heads of one width are supported"
            )
        tokens = self.file.fields.get("tokenizer.ggml.tokens", ())
        dtypes = {self.dtype(name) for name in self if name.endswith("_proj.weight")}
        return {
            "architectures": [self.architecture.hf],
            "model_type": self.name,
            "vocab_size": self._number("vocab_size", len(tokens) or None),
            "hidden_size": width,
            "intermediate_size": self._number("feed_forward_length"),
            "num_hidden_layers": self._number("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._number("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self._number("context_length"),
            "rms_norm_eps": self._decimal("attention.layer_norm_rms_epsilon"),
            "rope_theta": self._decimal("rope.freq_base", 10000.0),
            "rope_scaling": self._rope_scaling(head_dim),
            "tie_word_embeddings": "lm_head.weight" not in self,
            **self.architecture.config,
            **self._special_tokens(),
            "torch_dtype": str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 else "float32",
        }

    def _special_tokens(self) -> dict[str, int]:
        keys = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
        found = {name: self.file.fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
        return {name: number for name, number in found.items() if number is not None}

    def _rope_scaling(self, head_dim: int) -> dict[str, Any] | None:
        kind = self._field("rope.scaling.type", "none")
        if kind != "none":
            raise UserError(f"{self.directory}: {self.name}.rope.scaling.type={kind!r} is not supported")
        if ROPE_FACTORS not in self.file.tensors:
            return None
        stored = self.file.read(ROPE_FACTORS).float()
        for factor in LLAMA3_FACTORS:
            wanted = llama3_factors(factor, self._decimal("rope.freq_base", 10000.0), head_dim)
            if stored.shape == wanted.shape and torch.allclose(stored, wanted, rtol=1e-4):
                return {"rope_type": "llama3", "factor": factor, **LLAMA3_SCALING}
        raise UserError(f"{self.directory}: {ROPE_FACTORS} holds another rotary scaling than Llama 3.1's or 3.2's")

    def _field(self, key: str, default: Any = None) -> Any:
        return self.file.fields.get(f"{self.name}.{key}", default)

    def _number(self, key: str, default: int | None = None) -> int:
        value = self._field(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{self.directory}: {self.name}.{key} is {value!r}, not a whole number above 0")
        return value

    def _decimal(self, key: str, default: float | None = None) -> float:
        """The decimal that was meant by a number stored in fp32: 1e-5, not 9.999999747378752e-06."""
        value = self._field(key, default)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"{self.directory}: {self.name}.{key} is {value!r}, not a number above 0")
        return float(str(np.float32(value)))


def halves(tensor: Tensor, heads: int) -> Tensor:
    """Rows of every head from pairs (0, d/2), (1, d/2 + 1), ... back to halves: [heads * d, ...], weight or bias."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def llama3_factors(factor: float, theta: float, head_dim: int) -> Tensor:
    """What Llama 3's scaling divides each rotary frequency by [head_dim / 2] (transformers' `rope_type: llama3`)."""
    low, high = LLAMA3_SCALING["low_freq_factor"], LLAMA3_SCALING["high_freq_factor"]
    length = LLAMA3_SCALING["original_max_position_embeddings"]
    wavelength = 2 * math.pi * theta ** (torch.arange(0, head_dim, 2).double() / head_dim)
    smooth = ((length / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()
