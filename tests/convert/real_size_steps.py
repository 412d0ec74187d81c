"""Steps of the real-size conversion, each a process of its own: `python real_size_steps.py STEP ARGUMENT...`.

Prints one line of JSON: seconds and CPU seconds of the step, without its imports, and the peak of the process. That is
VmHWM of the whole process, imports included: private memory and the pages of mapped files that it touched. What the
kernel keeps of files after read and write calls is not part of it, since it gives that back when it is needed.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from megatron_jet.training import cpu_backend

cpu_backend.install()

from megatron_jet.configs.files import write_json  # noqa: E402
from megatron_jet.configs.hf_format import model_to_hf  # noqa: E402
from megatron_jet.configs.recipes.known_models import KNOWN_MODELS  # noqa: E402
from megatron_jet.convert.hf_export import export_hf  # noqa: E402
from megatron_jet.convert.hf_files import INDEX, HfTensors  # noqa: E402
from megatron_jet.convert.hf_import import import_hf  # noqa: E402
from megatron_jet.model.param_table import param_table  # noqa: E402

FINITE = 0xBFFF  # without this bit of the exponent a bf16 value is below 2


def write(name: str, out: str, shard_bytes: str) -> None:
    """Random bf16 weights of a known model in its published shapes, in shards with an index, by safetensors itself."""
    model = KNOWN_MODELS[name]()
    directory = Path(out)
    directory.mkdir(parents=True)
    random = np.random.default_rng(0)
    shards: list[dict[str, torch.Tensor]] = [{}]
    weight_map: dict[str, int] = {}
    for row in param_table(model):
        for tensor, shape in zip(row.hf, row.shapes, strict=True):
            values = np.frombuffer(random.bytes(2 * int(np.prod(shape))), dtype=np.uint16) & np.uint16(FINITE)
            if sum(t.nbytes for t in shards[-1].values()) + values.nbytes > int(shard_bytes):
                _save(shards[-1], directory, len(shards))
                shards[-1] = {}
                shards.append({})
            shards[-1][tensor] = torch.from_numpy(values.view(np.int16)).view(torch.bfloat16).reshape(shape)
            weight_map[tensor] = len(shards)
    _save(shards[-1], directory, len(shards))
    index = {name: f"model-{number:05d}.safetensors" for name, number in weight_map.items()}
    write_json(directory / INDEX, {"metadata": {}, "weight_map": index})
    (directory / "config.json").write_text(json.dumps(model_to_hf(model, "bfloat16")))


def _save(tensors: dict[str, torch.Tensor], directory: Path, number: int) -> None:
    save_file(tensors, directory / f"model-{number:05d}.safetensors", metadata={"format": "pt"})


def plain(source: str, out: str) -> None:
    """What conversion is measured against: load every file whole, save it, wait for the disk."""
    Path(out).mkdir()
    for path in sorted(Path(source).glob("*.safetensors")):
        target = Path(out, path.name)
        save_file(load_file(path), target, metadata={"format": "pt"})
        with open(target, "rb") as file:
            os.fsync(file.fileno())


def compare(first: str, second: str) -> None:
    """Every tensor of one directory is in the other, bit by bit."""
    one, two = HfTensors(first), HfTensors(second)
    assert set(one) == set(two)
    for name in one:
        a, b = one.read(name), two.read(name)
        assert a.dtype == b.dtype == torch.bfloat16
        assert torch.equal(a.view(torch.int16), b.view(torch.int16)), name


STEPS = {"write": write, "plain": plain, "import": import_hf, "export": export_hf, "compare": compare}


def peak_mib() -> float:
    """VmHWM of this process. `ru_maxrss` would count what the parent held when it started this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    step, *arguments = sys.argv[1:]
    if step in ("plain", "import", "export"):
        # In every step alike: writing files into memory that had just become free was up to three times as fast, on
        # the virtual machine this was written on, as into memory that had been free for long.
        shutil.rmtree(arguments[1], ignore_errors=True)
    began, cpu_began = time.perf_counter(), time.process_time()
    STEPS[step](*arguments)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "peak_mib": peak_mib()}))
