"""GGUF files: every type and family against transformers' own reading, tokenizers against their definitions."""

import json

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

from convert.convert_cases import check_one_line, convert, tensors_of, visible
from convert.gguf_cases import CONTROL, MERGES, TOKENS, gguf_name, model_of, write_gguf
from megatron_jet.configs.errors import UserError
from megatron_jet.convert.gguf.directory import gguf_to_hf
from megatron_jet.convert.gguf.model import GgufModel, llama3_factors
from megatron_jet.convert.gguf.tokenizer import write_tokenizer

STORED = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
TEXTS = (
    "the 12345 cats, it's 3.14!",
    "def f(x):\n    return x + 10  # über\t√2\r\n\r\n  end  ",
    "  leading   blanks 007 and CJK 你好 ２３ é é",
)


@pytest.mark.parametrize("kind", [*STORED, Type.Q8_0, Type.Q4_0, Type.Q4_1], ids=lambda kind: kind.name)
def test_every_type_is_read_as_the_format_says(kind, tmp_path):
    model = model_of("llama", tied=False)
    path = write_gguf(tmp_path / "m.gguf", "llama", model, kind)
    source = GgufModel(path)
    # The package's reader and its own dequantisation, on what it finds in the file.
    stored = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    assert set(source) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        found = source.read(name)
        assert (
            found.dtype == source.dtype(name) == (STORED.get(kind, torch.float32) if tensor.ndim > 1 else torch.float32)
        )
        if "q_proj" in name or "k_proj" in name:
            assert torch.allclose(found.float(), tensor, atol=tensor.abs().max() / 7), "rows in Hugging Face's order"
        else:
            assert torch.equal(found.float(), torch.from_numpy(stored[gguf_name(name)].copy()).float())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", [Type.F32, Type.Q4_1], ids=lambda kind: kind.name)
def test_families_against_transformers(family, kind, tmp_path):
    """transformers reads the same file with the format's package; equal weights, config and logits."""
    model = model_of(family, tied=family != "qwen3")
    path = write_gguf(tmp_path / "m.gguf", family, model, kind)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    ours = tensors_of(gguf_to_hf(path, tmp_path / "hf"))
    expected = {name: tensor for name, tensor in theirs.state_dict().items() if name in ours}
    assert set(model.state_dict()) - set(ours) <= {"lm_head.weight"} and set(expected) == set(ours)
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = torch.arange(40).view(2, 20)
    assert torch.equal(loaded(tokens).logits, theirs(tokens).logits)
    if kind == Type.F32:  # nothing was lost: the model that the file was made of
        assert torch.allclose(loaded(tokens).logits, model.eval()(tokens).logits, atol=1e-5)


def test_import_gives_the_checkpoint_of_the_directory(tmp_path, capsys):
    path = write_gguf(tmp_path / "m.gguf", "llama", model_of("llama"), Type.Q8_0)
    assert convert("import", path, tmp_path / "ckpt") == 0
    assert convert("export", tmp_path / "ckpt", tmp_path / "back") == 0
    gguf_to_hf(path, tmp_path / "hf")
    assert visible(tmp_path / "hf") == {
        "config.json",
        "model.safetensors",
        "README.md",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    ours, back = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "back")
    assert ours.keys() == back.keys() and all(torch.equal(ours[name], back[name]) for name in ours)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "license: apache-2.0" in card and "Q8_0" in card
    assert convert("verify", tmp_path / "hf", tmp_path / "ckpt") == 0


def test_llama3_scaling_is_found_by_its_factors(tmp_path):
    """transformers' own numbers for the same scaling."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for factor in (8.0, 32.0):
        scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        scaling |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
        config = LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=scaling)
        frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        plain = 500000.0 ** -(torch.arange(0, 128, 2).double() / 128)
        assert torch.allclose(plain / llama3_factors(factor, 500000.0, 128), frequencies.double(), rtol=1e-5)


def test_other_tensor_types_are_named(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "llama", model_of("llama"))
    data = bytearray(path.read_bytes())
    place = data.index(b"blk.0.ffn_up.weight") + len("blk.0.ffn_up.weight") + 4 + 16  # name, dimensions, their sizes
    assert data[place] == 0
    data[place] = 14
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"ffn_up\.weight' has type Q6_K; only F32, F16, BF16, Q4_0, Q4_1, Q8_0"):
        GgufModel(path)


@pytest.mark.parametrize(
    "family, fields, words",
    [
        ("llama", {"tokenizer.ggml.model": "llama"}, "only byte-level BPE"),
        ("llama", {"tokenizer.ggml.pre": "falcon"}, "'falcon', a rule that is not known"),
        ("llama", {"llama.expert_count": 8}, "expert_count=8"),
        ("qwen2", {"qwen2.attention.sliding_window": 64}, "sliding_window=64"),
        ("qwen3", {"qwen3.rope.scaling.type": "yarn"}, "yarn"),
        ("llama", {"llama.attention.key_length": 8}, "heads of 8 channels"),
    ],
)
def test_what_is_not_supported_is_refused(family, fields, words, tmp_path, capsys):
    path = write_gguf(tmp_path / "m.gguf", family, model_of(family), fields=fields)
    assert convert("import", path, tmp_path / "ckpt") == 1
    check_one_line(capsys, [str(path), words])
    assert visible(tmp_path) == {"m.gguf"}


def test_damaged_files_are_one_line(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "llama", model_of("llama"))
    whole = path.read_bytes()
    places = [0, 3, 4, 10, 24, *range(25, 4000, 97), len(whole) // 2, len(whole) - 1]
    for place in places:
        path.write_bytes(whole[:place])
        with pytest.raises(UserError, match=r"not a GGUF file|damaged or truncated"):
            GgufModel(path)
    for place in range(4, 3000, 53):  # whatever a byte of the head becomes, it is read or refused
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            gguf_to_hf(path, tmp_path / "hf")
        except UserError as error:
            assert str(path) in str(error)
    with pytest.raises(UserError, match="cannot be read"):
        GgufModel(tmp_path / "absent.gguf")


def tokenizer_of(tmp_path, pre: str, **fields) -> Tokenizer:
    path = write_gguf(
        tmp_path / f"{pre}.gguf", "llama", model_of("llama"), fields={"tokenizer.ggml.pre": pre, **fields}
    )
    write_tokenizer(GgufModel(path).file.fields, tmp_path, path)
    return Tokenizer.from_file(str(tmp_path / "tokenizer.json"))


def test_tokenizer_of_gpt2s_rule_equals_transformers(tmp_path):
    ours = tokenizer_of(tmp_path, "default")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="default.gguf")
    for text in TEXTS:
        assert ours.encode(text).ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ours.encode(text).ids) == text
    assert ours.encode("th<|im_start|>").ids == [256, CONTROL[1]]
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|endoftext|>" and settings["bos_token"] == "<|im_start|>"


def test_tokenizer_of_qwen2_equals_its_definition(tmp_path):
    ours = tokenizer_of(tmp_path, "qwen2")
    theirs = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(TOKENS)}, merges=[tuple(m.split()) for m in MERGES]
    )
    for text in TEXTS:
        assert ours.encode(text).ids == theirs(text)["input_ids"]


@pytest.mark.parametrize(
    "pre, pieces",
    [  # from the rules' regular expressions, by hand
        ("smollm", ["ab", "1", "2", "Ġ", "Ġcd", "Ġ", "3", "!"]),
        ("default", ["ab", "12", "Ġ", "Ġcd", "Ġ3", "!"]),
        ("qwen2", ["ab", "1", "2", "Ġ", "Ġcd", "Ġ", "3", "!"]),
    ],
)
def test_numbers_and_blanks_are_split_as_the_rule_says(pre, pieces, tmp_path):
    split = tokenizer_of(tmp_path, pre).pre_tokenizer.pre_tokenize_str("ab12  cd 3!")
    assert [piece for piece, _ in split] == pieces


def test_llama3_takes_three_digits_and_begins_texts(tmp_path):
    tokenizer = tokenizer_of(tmp_path, "llama-bpe")
    split = tokenizer.pre_tokenizer.pre_tokenize_str("12345 x")
    assert [piece for piece, _ in split] == ["123", "45", "Ġx"]
    assert tokenizer.encode("th").ids == [CONTROL[1], 256]
    assert tokenizer_of(tmp_path, "llama-bpe", **{"tokenizer.ggml.add_bos_token": False}).encode("th").ids == [256]
