"""Small GGUF files, written by the format's own package from models of transformers."""

from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from megatron_jet.convert.gguf.model import LAYER_TENSORS, MODEL_TENSORS

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-6}
# Bytes of GPT-2's alphabet, two merges and two special tokens.
ALPHABET = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))]
ALPHABET += [chr(256 + i) for i in range(256 - len(ALPHABET))]
TOKENS = [*ALPHABET, "th", "Ġth", "<|endoftext|>", "<|im_start|>"]
MERGES = ["t h", "Ġ th"]
CONTROL = (len(TOKENS) - 2, len(TOKENS) - 1)
VOCAB = 264  # more rows than tokens, as Qwen2's embedding has


def model_of(family: str, *, tied: bool = True, **changes):
    """A small random model whose vectors are no zeros and ones."""
    torch.manual_seed(0)
    config_class, model_class = FAMILIES[family]
    # transformers reads no width of heads from a Qwen3 file: its default.
    sizes = SIZES | ({"head_dim": 128} if family == "qwen3" else {})
    model = model_class(config_class(vocab_size=VOCAB, tie_word_embeddings=tied, **sizes, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) / 4)
    return model


def write_gguf(path: Path, family: str, model, kind: Type = Type.F32, fields: dict | None = None) -> Path:
    """What llama.cpp's converter writes: matrices in one type, vectors in fp32, a byte-level tokenizer.

    Args:
        fields: instead of the tokenizer's rule and other values, by name; None leaves one out.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, family)
    writer.add_name("Small")
    writer.add_license("apache-2.0")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if family == "llama":
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    if family == "qwen3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    values = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "default", **(fields or {})}
    for name, value in values.items():
        if value is not None:
            kinds = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}
            kinds[type(value)](name, value)
    padding = [f"[PAD{i}]" for i in range(VOCAB - len(TOKENS))]
    writer.add_token_list([*TOKENS, *padding])
    token_types = [3 if i in CONTROL else 1 for i in range(len(TOKENS))] + [5] * len(padding)
    writer.add_token_types(token_types)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(CONTROL[1])
    writer.add_eos_token_id(CONTROL[0])
    _add_tensors(writer, family, model, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tensors(writer: gguf.GGUFWriter, family: str, model, kind: Type) -> None:
    config = model.config
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            # llama.cpp turns neighbouring channels: row 2i is the i-th of the first half, 2i + 1 of the second.
            values = np.stack(np.split(values.reshape(heads, -1, values.shape[-1]), 2, axis=1), axis=2)
            values = values.reshape(tensor.shape)
        kept = Type.F32 if values.ndim == 1 else kind
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, kept), raw_dtype=kept)


def gguf_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face tensor."""
    places = {ours: theirs for theirs, ours in {**MODEL_TENSORS, **LAYER_TENSORS}.items()}
    stem, _, suffix = name.rpartition(".")
    if stem in places:
        return f"{places[stem]}.{suffix}"
    number, _, rest = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{places[rest]}.{suffix}"
