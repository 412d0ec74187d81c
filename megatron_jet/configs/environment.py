"""Whether the packages of an environment can run this project, from their metadata alone. No torch.

Jobs ask before they begin: what a run meets for the first time in its second stage costs days.
"""

import importlib.metadata
import importlib.util
import re
from pathlib import Path

from jet_kernels import hopper
from megatron_jet.configs.mixers.delta_rule import DeltaRuleConfig
from megatron_jet.configs.overrides import load_yaml
from megatron_jet.configs.run import RunConfig

MINIMUM_TORCH = (2, 9)
MINIMUM_TRANSFORMER_ENGINE = (2, 11)  # below it, the model builder takes Megatron's own modules
SUPPORTED_MEGATRON = "0.19.2"  # training/ uses internals of this very version, on GPUs, too


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
    settings = {item.strip() for item in kernels.split(",")}
    if capability != hopper.CAPABILITY or {"reference", "chunk_gated_delta_rule=reference"} & settings:
        return None
    return hopper.backward_problem()


def gpu_problem(asked: int, seen: int, torch_version: str) -> str | None:
    """Why processes that were given GPUs would not use them, or None. Without this they would train on the CPU.

    Args:
        asked: GPUs per node that the job was to get.
        seen: what torch.cuda.device_count() says.
    """
    if seen >= asked:
        return None
    return f"torch {torch_version} sees {seen} of {asked} GPUs: a CPU build, the driver, or CUDA_VISIBLE_DEVICES"


def package_problem(gpus: bool) -> str | None:
    """Which package is missing or too old for training, or None. With GPUs, what only they need counts, too."""
    torch = _version("torch")
    if torch is None:
        return "torch is not installed; install this project with the extras 'train,eval,gpu'"
    if _numbers(torch) < MINIMUM_TORCH:
        return f"torch {torch} is installed, {_text(MINIMUM_TORCH)} or newer is needed"
    if gpus and importlib.util.find_spec("fla") is None:
        return "flash-linear-attention is not installed, and linear mixers on GPUs need it: install the extra 'gpu'"
    return None


def slow_path() -> str | None:
    """What makes training on GPUs slower than it could be, in words, or None."""
    found = _version("transformer-engine")
    if found is not None and _numbers(found) >= MINIMUM_TRANSFORMER_ENGINE:
        return None
    wanted = _text(MINIMUM_TRANSFORMER_ENGINE)
    return (
        f"transformer-engine {'is not installed' if found is None else found + ' is older than ' + wanted}: "
        f"slow path, Megatron's own modules are used ({wanted} or newer is faster)"
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
    problem = megatron_problem() or package_problem(gpus=capability is not None)
    if problem is None and capability is not None:
        config = RunConfig.parse(load_yaml(run_dir / "config.yaml"), str(run_dir / "config.yaml"))
        problem = triton_problem(capability, kernels) if trains_delta_rule(config) else None
    return problem


def _numbers(version: str) -> tuple[int, ...]:
    """The first three; 2.9.0a0 of a container counts as 2.9.0."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
