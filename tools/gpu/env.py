#!/usr/bin/env python3
"""What is there: versions, GPU, the rates that rooflines use. With --check STAGE: everything imports, from the pack.

python env.py > env.json        python env.py --check STAGE
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / shelf) for shelf in (".", "kernels")]

PACKED = (
    "megatron.core",
    "fla",
    "pydantic",
    "pydantic_core",
    "annotated_types",
    "typing_inspection",
    "webdataset",
    "braceexpand",
)
OWN = (
    "jet_kernels.dispatch",
    "jet_kernels.fla_backend",
    "jet_kernels.dynamic_conv.fused",
    "fla.ops.gated_delta_rule",
    "fla.ops.gla",
    "fla.modules.causal_conv1d",
    "megatron_jet.training.trainer",
    "megatron_jet.convert.hf_package",
    "megatron_jet.evaluation.throughput.comparison",
    "megatron_jet.evaluation.kernel_cases",
    "megatron_jet.data.loader",
    "megatron_jet.postnas.pipeline",
)
NAMES = (
    "torch",
    "triton",
    "transformers",
    "huggingface-hub",
    "accelerate",
    "numpy",
    "megatron-core",
    "fla-core",
    "flash-linear-attention",
    "transformer-engine",
    "pydantic",
    "webdataset",
    "flash-attn",
    "tilelang",
)


def output(*command: str) -> str:
    """What a command says, or why it did not."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"


def versions() -> dict[str, str]:
    """Installed packages of interest."""
    found = {}
    for name in NAMES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def check(stage: str) -> None:
    """Import everything. Raises where something is missing, or comes from elsewhere than the pack."""
    from megatron_jet.training import cpu_backend

    cpu_backend.install()
    stage = os.path.abspath(stage)
    for name in PACKED:
        module = importlib.import_module(name)
        where = os.path.abspath(getattr(module, "__file__", None) or list(module.__path__)[0])
        if not where.startswith(stage):
            raise SystemExit(f"error: {name} comes from {where}, not from the pack")
    for name in OWN:
        importlib.import_module(name)
    ptxas = output(os.environ["TRITON_PTXAS_PATH"], "--version").splitlines()[-2:]
    print(f"imports work with torch {version('torch')}, transformers {version('transformers')}; {' '.join(ptxas)}")


def main() -> None:
    """Print what is here as JSON."""
    import torch

    ptxas = os.environ.get("TRITON_PTXAS_PATH")
    found = {
        "versions": versions(),
        "python": sys.version.split()[0],
        "nvidia_smi": output(
            "nvidia-smi",
            "--query-gpu=name,memory.total,driver_version,clocks.sm,clocks.mem,power.limit",
            "--format=csv,noheader",
        ),
        "nvcc": output("nvcc", "--version").splitlines()[-1:],
        "ptxas": output(ptxas, "--version").splitlines()[-2:] if ptxas else "Triton's own",
        "cpus": os.cpu_count(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "environment": {
            k: v for k, v in os.environ.items() if k.split("_")[0] in ("TRITON", "FLA", "JET", "NCCL", "NVTE")
        },
    }
    if torch.cuda.is_available():
        from megatron_jet.evaluation.device import measure_rates

        rates = measure_rates(torch.device("cuda", 0), torch.bfloat16)
        found["rates"] = {"bytes_per_second": rates.bytes_per_second, "bf16_flops_per_second": rates.flops_per_second}
        properties = torch.cuda.get_device_properties(0)
        found["device"] = {"name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    check(sys.argv[2]) if sys.argv[1:2] == ["--check"] else main()
