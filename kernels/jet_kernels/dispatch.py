"""One entry per operation, running on the backend that fits the device.

Backends: `reference` (plain torch, any device), `fla` (flash-linear-attention's Triton kernels) and
`triton` (our own). On a GPU the fast one is taken, elsewhere the reference.

The environment variable JET_KERNELS overrides this: `auto` (the default), one backend name for every
operation, or a list such as `auto,chunk_gla=reference`. A backend that cannot run is an error, never
a silent change to another one.

On Hopper GPUs with a Triton that is in doubt there, the first kernel chosen also chooses the assembler (`hopper.py`).
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os

import torch
import torch.nn.functional as F

from jet_kernels import fla_backend, hopper
from jet_kernels.dynamic_conv import reference as dynamic_conv
from jet_kernels.gated_delta_rule import reference as gated_delta_rule
from jet_kernels.gla import reference as gla
from jet_kernels.norm_gate import reference as norm_gate
from jet_kernels.short_conv import reference as short_conv

# The backend of each operation on a GPU.
_ON_GPU = {
    "chunk_gated_delta_rule": "fla",
    "recurrent_gated_delta_rule": "fla",
    "chunk_gla": "fla",
    "recurrent_gla": "fla",
    "causal_conv": "fla",
    "rms_norm_gated": "fla",
    "l2_normalize": "fla",
    "fused_dynamic_conv": "triton",
    "dynamic_causal_conv": "reference",
}
_PACKAGES = {"reference": (), "fla": ("triton", "fla"), "triton": ("triton",)}
_LOG = logging.getLogger(__name__)


def l2_normalize(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """See `gated_delta_rule.reference.l2_normalize`."""
    if backend("l2_normalize", x.device) == "fla":
        return fla_backend.l2_normalize(x, eps)
    return gated_delta_rule.l2_normalize(x, eps)


def chunk_gated_delta_rule(q, k, v, g, beta, **options) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `gated_delta_rule.reference.chunk_gated_delta_rule`."""
    if backend("chunk_gated_delta_rule", q.device) == "fla":
        return fla_backend.chunk_gated_delta_rule(q, k, v, g, beta, **options)
    return gated_delta_rule.chunk_gated_delta_rule(q, k, v, g, beta, **options)


def recurrent_gated_delta_rule(q, k, v, g, beta, **options) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `gated_delta_rule.reference.recurrent_gated_delta_rule`; with fla there is no backward."""
    if backend("recurrent_gated_delta_rule", q.device) == "fla":
        return fla_backend.recurrent_gated_delta_rule(q, k, v, g, beta, **options)
    return gated_delta_rule.recurrent_gated_delta_rule(q, k, v, g, beta, **options)


def chunk_gla(q, k, v, gk, **options) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `gla.reference.chunk_gla`."""
    if backend("chunk_gla", q.device) == "fla":
        return fla_backend.chunk_gla(q, k, v, gk, **options)
    return gla.chunk_gla(q, k, v, gk, **options)


def recurrent_gla(q, k, v, gk, **options) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `gla.reference.recurrent_gla`."""
    if backend("recurrent_gla", q.device) == "fla":
        return fla_backend.recurrent_gla(q, k, v, gk, **options)
    return gla.recurrent_gla(q, k, v, gk, **options)


def causal_conv(x, weight, **options) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `short_conv.reference.causal_conv`."""
    if backend("causal_conv", x.device) == "fla":
        return fla_backend.causal_conv(x, weight, **options)
    return short_conv.causal_conv(x, weight, **options)


def rms_norm_gated(x: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """See `norm_gate.reference.rms_norm_gated`."""
    if backend("rms_norm_gated", x.device) == "fla":
        return fla_backend.rms_norm_gated(x, weight, gate, eps)
    return norm_gate.rms_norm_gated(x, weight, gate, eps)


def dynamic_causal_conv(x, kernel, **options) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `dynamic_conv.reference.dynamic_causal_conv`.

    Where the kernels come from a linear layer, `fused_dynamic_conv` is the fast one.
    """
    backend("dynamic_causal_conv", x.device)
    return dynamic_conv.dynamic_causal_conv(x, kernel, **options)


def fused_dynamic_conv(
    x: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    activation: str | None = "silu",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Kernel generator, dynamic causal convolution and SiLU in one.

    The kernels are hidden @ weight^T + bias, and row d * W + w of the weight makes tap w of channel d.
    On a GPU they never exist in memory as [B, T, D, W].

    Args:
        x: inputs of the convolution [B, T, D].
        hidden: the generator's hidden layer after its activation [B, T, R].
        weight: [D * W, R].
        bias: [D * W].
        initial_state, output_final_state, cu_seqlens, activation: as in `dynamic_causal_conv`.

    Returns:
        y [B, T, D] in the dtype of `x`, and the final state [N, W - 1, D] in the dtype of `x` or None.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    if weight.shape[0] % x.shape[-1] or weight.shape[1] != hidden.shape[-1] or hidden.shape[:2] != x.shape[:2]:
        shapes = tuple(x.shape), tuple(hidden.shape), tuple(weight.shape)
        raise ValueError("x {}, hidden {} and weight {} must be [B,T,D], [B,T,R] and [D*W,R]".format(*shapes))
    options = {
        "initial_state": initial_state,
        "output_final_state": output_final_state,
        "cu_seqlens": cu_seqlens,
        "activation": activation,
    }
    if backend("fused_dynamic_conv", x.device) == "triton":
        from jet_kernels.dynamic_conv.fused import fused_dynamic_conv as fused

        return fused(x, hidden, weight, bias, **options)
    kernel = F.linear(hidden, weight, bias).unflatten(-1, (x.shape[-1], -1))  # [B, T, D, W]
    return dynamic_conv.dynamic_causal_conv(x, kernel, **options)


def backend(operation: str, device: torch.device) -> str:
    """The backend that an operation uses on a device, after checking that it can run there.

    Raises:
        ValueError: if JET_KERNELS does not parse, or names a backend that the operation does not have.
        RuntimeError: if the backend's packages or a GPU are missing.
    """
    return _choose(operation, device.type, os.environ.get("JET_KERNELS", "auto"))


def check_training(operation: str, device: torch.device) -> None:
    """Find out before a training run whether an operation and its backward can run on a device.

    Raises:
        ValueError, RuntimeError: as `backend` does; or the installed Triton miscompiles the backward on this GPU.
    """
    if backend(operation, device) == "fla" and operation == "chunk_gated_delta_rule":
        fla_backend.check_triton_for_backward()
        if _on_hopper() and hopper.own_tiles():
            _LOG.info("%s backward on %s: fla's kernel with key tiles of 16, 32 or 128", operation, device.type)


def fast_backend(operation: str) -> str:
    """The backend of an operation on a GPU, whether or not it can run here."""
    return _ON_GPU[operation]


@functools.cache  # also makes each choice appear once in the log
def _choose(operation: str, device_type: str, setting: str) -> str:
    name = _parse(setting).get(operation, _parse(setting)["*"])
    fast = _ON_GPU[operation]
    if name == "auto":
        name = fast if device_type == "cuda" else "reference"
    if name not in ("reference", fast):
        has = " and ".join(dict.fromkeys(("reference", fast)))
        raise ValueError(f"JET_KERNELS={setting}: {operation} has no {name} backend, only {has}")
    missing = [package for package in _PACKAGES[name] if importlib.util.find_spec(package) is None]
    if missing:
        fix = "pip install flash-linear-attention triton, or set JET_KERNELS=reference (slow on a GPU)"
        raise RuntimeError(f"{operation} on {device_type} needs the package {' and '.join(missing)}: {fix}")
    if name != "reference" and device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(f"JET_KERNELS={setting}: the {name} backend of {operation} needs a GPU, not {device_type}")
    if name != "reference" and _on_hopper():
        _prepare_hopper()
    _LOG.info("%s on %s: %s backend", operation, device_type, name)
    return name


@functools.cache
def _prepare_hopper() -> None:
    """Once, before the first kernel is compiled: choose and report the assembler."""
    line = hopper.use_current_ptxas()
    if line is not None:
        _LOG.log(logging.INFO if hopper.own_tiles() else logging.WARNING, line)


def _on_hopper() -> bool:
    return torch.cuda.is_available() and "{}.{}".format(*torch.cuda.get_device_capability()) == hopper.CAPABILITY


def _parse(setting: str) -> dict[str, str]:
    """`auto,chunk_gla=reference` -> {"*": "auto", "chunk_gla": "reference"}."""
    choice = {"*": "auto"}
    for item in filter(None, (part.strip() for part in setting.split(","))):
        operation, _, name = item.rpartition("=")
        if name not in ("auto", *_PACKAGES) or (operation and operation not in _ON_GPU):
            raise ValueError(
                f"JET_KERNELS={setting}: {item!r} is neither one of {', '.join(('auto', *_PACKAGES))} "
                f"nor OPERATION=BACKEND with an operation of {', '.join(_ON_GPU)}"
            )
        choice[operation or "*"] = name
    return choice
