"""Safetensors written one tensor at a time: what the library reads back."""

import os

import pytest
import torch
from safetensors.torch import load_file

from megatron_jet.convert.hf_files import INDEX, HfTensors, OutTensor, write_hf_tensors

TENSORS = {
    "a": torch.arange(24.0).reshape(4, 6),
    "b": torch.arange(7, dtype=torch.bfloat16),
    "empty": torch.empty(0, 3),
    "c": torch.arange(5, dtype=torch.float16),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
}


def out_tensors() -> list[OutTensor]:
    return [OutTensor(name, tuple(t.shape), t.dtype, lambda t=t: t) for name, t in TENSORS.items()]


@pytest.mark.parametrize("at_once", [1, 7, 1 << 20])
def test_a_system_that_takes_a_part_at_a_time_gets_all_of_it(at_once, tmp_path, monkeypatch):
    """Linux writes 2 GiB less a page per call at most; a full embedding in fp32 is larger."""
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, place: pwrite(handle, data[:at_once], place))
    write_hf_tensors(tmp_path, out_tensors(), 1 << 20)
    found = load_file(tmp_path / "model.safetensors")
    assert set(found) == set(TENSORS) and all(torch.equal(found[name], t) for name, t in TENSORS.items())


def test_shards_have_an_index_and_every_tensor_once(tmp_path):
    paths = write_hf_tensors(tmp_path, out_tensors(), 100)
    assert paths[-1].name == INDEX and len(paths) > 2
    source = HfTensors(tmp_path)
    assert set(source) == set(TENSORS) and all(torch.equal(source.read(name), t) for name, t in TENSORS.items())
