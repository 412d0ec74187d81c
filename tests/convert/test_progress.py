"""Progress of a conversion: every byte counted once, and how much is left."""

import re

import torch

from convert.convert_cases import convert, save_qwen2
from megatron_jet.convert.global_checkpoint import LazyTensor
from megatron_jet.convert.progress import ConversionProgress


def test_lines_say_how_much_is_left(capsys):
    progress = ConversionProgress(line_seconds=0)
    with progress:
        tensors = [progress.watched(LazyTensor.of(torch.zeros(256, 1024))) for _ in range(4)]
        assert progress.total == 4 * 2**20 and progress.done == 0
        made = [tensor.make() for tensor in tensors]
    assert all(torch.equal(one, torch.zeros(256, 1024)) for one in made)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" MiB")[0] for line in lines] == [f"{done} of 4" for done in (1, 2, 3, 4)]
    assert lines[-1].endswith(" 0 s left")


def test_both_directions_count_the_bytes_of_the_weights(tmp_path, capsys):
    save_qwen2(tmp_path / "hf")
    size = (tmp_path / "hf" / "model.safetensors").stat().st_size / 2**20
    for command, paths in {"import": ("hf", "ckpt"), "export": ("ckpt", "back")}.items():
        assert convert(command, *(tmp_path / path for path in paths)) == 0
        found = re.search(r"^([\d.]+) MiB in [\d.]+ s, [\d,]+ MiB/s$", capsys.readouterr().out, re.M)
        assert found and abs(float(found[1]) - size) < 0.06 + 0.002  # rounding, and the header
