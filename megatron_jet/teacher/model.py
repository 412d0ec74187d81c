"""The tiny teacher: a Qwen2 model of 1.4M parameters, in Hugging Face's own class, and its byte tokenizer."""

import math
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from megatron_jet.tasks import vocabulary as vocab

MAX_POSITIONS = 32768


def teacher_config() -> Qwen2Config:
    """Returns the teacher's architecture."""
    return Qwen2Config(
        vocab_size=vocab.VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=vocab.END_OF_TEXT,
        eos_token_id=vocab.END_OF_TEXT,
        pad_token_id=vocab.END_OF_TEXT,
        use_cache=True,
        attn_implementation="sdpa",
    )


def build_teacher(seed: int) -> Qwen2ForCausalLM:
    """Builds the teacher with random weights: normal with deviation 1/sqrt(fan-in), branches' outputs 0.3 of that.

    Smaller outputs keep the residual stream close to the embeddings at first; zero outputs, often recommended, kept
    recall from being learned.
    """
    generator = torch.Generator().manual_seed(seed)
    model = Qwen2ForCausalLM(teacher_config())
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "embed_tokens" in name:
                param.normal_(0, 0.1, generator=generator)
            elif param.dim() == 2:
                branch_output = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = 0.3 if branch_output else 1.0
                param.normal_(0, scale / math.sqrt(param.shape[1]), generator=generator)
            elif name.endswith("bias"):
                param.zero_()
    return model


def byte_symbols() -> list[str]:
    """Returns the printable symbol of every byte, in byte order, as byte-level tokenizers spell them (GPT-2)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(vocab.NUM_BYTES) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + hidden.index(byte)) for byte in range(vocab.NUM_BYTES)]


def save_tokenizer(directory: Path) -> None:
    """Writes the tokenizer: bytes are tokens 0..255, the tasks' symbols are added special tokens."""
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(byte_symbols())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = vocab.special_tokens()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    assert all(tokenizer.token_to_id(name) == token for name, token in special.items())
    end = next(iter(special))
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=end,
        eos_token=end,
        pad_token=end,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(directory)
