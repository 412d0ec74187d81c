"""Random models through files, both ways: the same bits, and the same numbers dense, packed, padded and in chunks."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from layout_runs import packed
from megatron_jet.configs.model import ModelConfig
from megatron_jet.convert.hf.cache import HybridCache
from megatron_jet.convert.hf_export import export_hf
from megatron_jet.convert.hf_import import import_hf
from megatron_jet.convert.hf_package import load_for_causal_lm
from megatron_jet.model.builder import build_model
from megatron_jet.model.param_table import param_table
from megatron_jet.model.state import gather_tensors
from megatron_jet.training.checkpoint import load_model, save_model

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from model.random_models import hf_model, models  # noqa: E402

# Two implementations in fp32: other orders of sums, other chunk algorithms. As in tests/model/test_against_hf.py.
TOLERANCE = 1e-4
# Shrinking a failure takes minutes; the failing model is printed anyway.
few = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
documents = st.lists(st.integers(1, 40), min_size=1, max_size=4)


@contextmanager
def folder() -> Iterator[Path]:
    """A directory for one example; tmp_path is shared by all of them."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def random_weights(model: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Hugging Face tensors, all of which matter."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for row in param_table(model):
        for name, shape in zip(row.hf, row.shapes, strict=True):
            noise = torch.randn(shape, generator=generator)
            width = shape[-1] if len(shape) > 1 and "embed" not in name else 4
            tensors[name] = 1 + 0.2 * noise if "norm" in name else noise * width**-0.5
    return tensors


def tokens_of(model: ModelConfig, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, model.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= TOLERANCE * max(1.0, expected.abs().max().item())


@few
@given(models(), documents, st.integers(0, 99))
def test_hf_files_in_megatron(single_rank, model, lengths, seed):
    """HF to Megatron: what the HF model computes on packed documents, Megatron does on the same row."""
    hf = hf_model(model, random_weights(model, seed)).eval()
    with folder() as directory, torch.no_grad():
        hf.save_pretrained(directory / "hf", max_shard_size="20KB")
        imported = import_hf(directory / "hf", directory / "checkpoint")
        chunks = build_model(imported, single_rank, init_seed=None)
        load_model(chunks, directory / "checkpoint")
        tokens = tokens_of(model, 1, sum(lengths), seed=seed)
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        together = chunks[0].eval()(tokens, positions, None, packed_seq_params=packed(lengths))
        assert_close(together, alone(hf, tokens, lengths))
        assert_close(chunks[0](tokens, None, None), hf(tokens).logits)


def alone(hf, tokens: Tensor, lengths: list[int]) -> Tensor:
    """Logits [1, s, vocab] of every document by itself."""
    return torch.cat([hf(part).logits for part in tokens.split(lengths, 1)], 1)


@few
@given(models(), documents, st.integers(0, 99), st.data())
def test_megatron_checkpoints_in_hf(single_rank, model, lengths, seed, data):
    """Megatron to HF: same bits, and what Megatron computes, the export does padded, in chunks, and packed."""
    chunks = build_model(model, single_rank, init_seed=seed)
    weights = gather_tensors(chunks)
    with folder() as directory, torch.no_grad():
        save_model(chunks, directory / "checkpoint", model_config=model.to_dict())
        export_hf(directory / "checkpoint", directory / "hf", shard_bytes=20_000)
        import_hf(directory / "hf", directory / "again")
        export_hf(directory / "again", directory / "twice", shard_bytes=20_000)
        for path in (directory / "hf").glob("*.safetensors"):
            assert path.read_bytes() == (directory / "twice" / path.name).read_bytes()
        stored = {name for path in (directory / "hf").glob("*.safetensors") for name in load_file(path)}
        assert stored == {name for row in param_table(model) for name in row.hf}
        back = build_model(model, single_rank, init_seed=None)
        load_model(back, directory / "again")
        for key, tensor in gather_tensors(back).items():
            assert torch.equal(tensor, weights[key]), key
        hf = load_for_causal_lm(directory / "hf")
        assert json.loads((directory / "hf" / "config.json").read_text())["torch_dtype"] == "float32"
    with torch.no_grad():
        megatron = chunks[0].eval()
        rows = [tokens_of(model, 1, length, seed=seed + length) for length in lengths]
        expected = [megatron(row, None, None)[0] for row in rows]
        tokens, mask = pad(rows, data.draw(st.sampled_from(["left", "right"])))
        chunk = data.draw(st.sampled_from([1, 2, 3, 7, 64, 65]))
        cache, end, parts = HybridCache(hf.config), 0, []
        for part in tokens.split(chunk, 1):
            end += part.shape[1]
            parts.append(hf(part, attention_mask=mask[:, :end], past_key_values=cache).logits)
        for logits in (hf(tokens, attention_mask=mask).logits, torch.cat(parts, 1)):
            for row, wanted in enumerate(expected):
                assert_close(logits[row][mask[row].bool()], wanted)
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        assert_close(hf(torch.cat(rows, 1), position_ids=positions).logits[0], torch.cat(expected))


def pad(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Token ids and mask [rows, longest]."""
    width = max(row.shape[1] for row in rows)
    tokens, mask = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(2))
    for number, row in enumerate(rows):
        here = slice(width - row.shape[1], None) if side == "left" else slice(0, row.shape[1])
        tokens[number, here], mask[number, here] = row[0], 1
    return tokens, mask
