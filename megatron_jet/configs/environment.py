"""Whether the packages of an environment can run this project, from their metadata alone. No torch.

Jobs ask before they begin: what a run meets for the first time in its second stage costs days.
"""

import importlib.metadata
import importlib.util
import re
from pathlib import Path

from megatron_jet.configs.mixers.delta_rule import DeltaRuleConfig
from megatron_jet.configs.overrides import load_yaml
from megatron_jet.configs.run import RunConfig

SUPPORTED_MEGATRON = "0.19.2"  # training/ uses internals of this very version, on GPUs, too
# On Hopper these versions of Triton miscompile a backward kernel of the gated delta rule
# (github.com/fla-org/flash-linear-attention, issue 640): from the first, up to but without the second.
MISCOMPILING_TRITON = ((3, 4, 0), (3, 7, 1))
HOPPER = "9.0"  # compute capability, as nvidia-smi prints it


def megatron_problem() -> str | None:
    """What is wrong with the installed megatron-core, or None."""
    found = _version("megatron-core")
    if found is None:
        return "megatron-core is not installed; install this project with the extras 'train,eval,gpu'"
    if found != SUPPORTED_MEGATRON:
        return (
            f"megatron-core {found} is installed, {SUPPORTED_MEGATRON} is needed; "
            f"pip install megatron-core=={SUPPORTED_MEGATRON}"
        )
    return None


def triton_problem(capability: str, kernels: str) -> str | None:
    """Why the gated delta rule cannot train on GPUs of this compute capability, or None.

    Args:
        capability: for example "9.0".
        kernels: value of JET_KERNELS.
    """
    found = _version("triton")
    if capability != HOPPER or found is None or importlib.util.find_spec("tilelang") is not None:
        return None
    numbers = tuple(int(part) for part in re.findall(r"\d+", found)[:3])
    first, fixed = MISCOMPILING_TRITON
    settings = [item.strip() for item in kernels.split(",")]
    if not first <= numbers < fixed or {"reference", "chunk_gated_delta_rule=reference"} & set(settings):
        return None
    return (
        f"triton {found} cannot train the gated delta rule on Hopper GPUs: pip install tilelang, "
        "or set JET_KERNELS=auto,chunk_gated_delta_rule=reference (slower)"
    )


def trains_delta_rule(config: RunConfig) -> bool:
    """Whether some mixer of a run is built on the gated delta rule."""
    return any(isinstance(mixer, DeltaRuleConfig) for mixer in config.mixers.values())


def run_problem(run_dir: Path, capability: str | None, kernels: str) -> str | None:
    """What would keep a run from working in this environment, or None.

    Args:
        run_dir: with the run's config.yaml.
        capability: compute capability of the GPUs; None without GPUs.
        kernels: value of JET_KERNELS.
    """
    problem = megatron_problem()
    if problem is None and capability is not None:
        config = RunConfig.parse(load_yaml(run_dir / "config.yaml"), str(run_dir / "config.yaml"))
        problem = triton_problem(capability, kernels) if trains_delta_rule(config) else None
    return problem


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
