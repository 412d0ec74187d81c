"""Runs a linear mixer's recurrence: in plain PyTorch, or with flash-linear-attention's kernels on a GPU.

The environment variable JET_HF_KERNELS chooses: "auto" (the default: fla on CUDA where it is
installed), "reference" (plain PyTorch) or "fla".
"""

import importlib
import importlib.util
import os

import torch

from .gated_delta_rule import chunk_gated_delta_rule, recurrent_gated_delta_rule
from .gla_recurrence import chunk_gla, recurrent_gla

# Up to this many tokens the token loop is faster than the chunked form (measured on a CPU).
LONGEST_LOOP = 12

State = torch.Tensor | None


def gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    initial_state: State = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, State]:
    """See gated_delta_rule.py for the equations and shapes; q and k come normalised."""
    options = {
        "scale": q.shape[-1] ** -0.5,
        "initial_state": initial_state,
        "output_final_state": output_final_state,
        "cu_seqlens": cu_seqlens,
    }
    if use_fla(q.device):
        fla = importlib.import_module("fla.ops.gated_delta_rule")
        # The fused loop has no backward.
        short = q.shape[1] <= LONGEST_LOOP and not torch.is_grad_enabled()
        run = fla.fused_recurrent_gated_delta_rule if short else fla.chunk_gated_delta_rule
        out, state = run(q, k, v, g=g, beta=beta, **options)
        return out.to(v.dtype), state
    run = recurrent_gated_delta_rule if _loops(q, cu_seqlens) else chunk_gated_delta_rule
    return run(q, k, v, g, beta, **options)


def gated_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gk: torch.Tensor,
    *,
    initial_state: State = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, State]:
    """See gla_recurrence.py for the equations and shapes."""
    options = {
        "scale": q.shape[-1] ** -0.5,
        "initial_state": initial_state,
        "output_final_state": output_final_state,
        "cu_seqlens": cu_seqlens,
    }
    if use_fla(q.device):
        fla = importlib.import_module("fla.ops.gla")
        if q.shape[1] <= LONGEST_LOOP:
            out, state = fla.fused_recurrent_gla(q, k, v, gk=gk, **options)
        else:
            out, state = fla.chunk_gla(q, k, v, g=gk, **options)
        return out.to(v.dtype), state
    run = recurrent_gla if _loops(q, cu_seqlens) else chunk_gla
    return run(q, k, v, gk, **options)


def use_fla(device: torch.device) -> bool:
    """Whether recurrences on this device run on fla's kernels.

    Raises:
        ValueError: JET_HF_KERNELS is set to something else than its three values.
        ImportError: it is "fla" and flash-linear-attention is not installed.
    """
    choice = os.environ.get("JET_HF_KERNELS", "auto")
    if choice not in ("auto", "reference", "fla"):
        raise ValueError(f"JET_HF_KERNELS={choice!r}: choose auto, reference or fla")
    if choice == "reference" or (choice == "auto" and device.type != "cuda"):
        return False
    installed = all(importlib.util.find_spec(name) is not None for name in ("fla", "triton"))
    if choice == "fla" and not installed:
        raise ImportError(
            "JET_HF_KERNELS=fla needs flash-linear-attention and triton: pip install flash-linear-attention"
        )
    return installed


def _loops(q: torch.Tensor, cu_seqlens: torch.Tensor | None) -> bool:
    return cu_seqlens is None and q.shape[1] <= LONGEST_LOOP
