"""Our signatures on top of flash-linear-attention's Triton kernels (fla 0.6).

fla is imported inside the functions: it needs Triton and takes seconds to load.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from jet_kernels import hopper


def chunk_gated_delta_rule(
    q, k, v, g, beta, *, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, chunk_size=64
):
    """See `gated_delta_rule.reference.chunk_gated_delta_rule`. fla takes chunk sizes 16, 32 and 64, and Dk <= 256."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule as kernel

    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, g, beta)):
        check_triton_for_backward()
    o, state = kernel(
        q,
        k,
        v,
        g,
        beta,
        scale=scale,
        initial_state=_fp32(initial_state),
        output_final_state=output_final_state,
        cu_seqlens=_int64(cu_seqlens),
        chunk_size=chunk_size,
    )
    return o.to(v.dtype), state


def recurrent_gated_delta_rule(
    q, k, v, g, beta, *, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None
):
    """See `gated_delta_rule.reference.recurrent_gated_delta_rule`. fla's kernel has no backward."""
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule as kernel

    o, state = kernel(
        q,
        k,
        v,
        g,
        beta=beta,
        scale=scale,
        initial_state=_fp32(initial_state),
        output_final_state=output_final_state,
        cu_seqlens=_int64(cu_seqlens),
    )
    return o.to(v.dtype), state


def chunk_gla(q, k, v, gk, *, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None):
    """See `gla.reference.chunk_gla`; the chunk size is fla's own."""
    from fla.ops.gla import chunk_gla as kernel

    o, state = kernel(
        q,
        k,
        v,
        gk,
        scale=scale,
        initial_state=_fp32(initial_state),
        output_final_state=output_final_state,
        cu_seqlens=_int64(cu_seqlens),
    )
    return o.to(v.dtype), state


def recurrent_gla(q, k, v, gk, *, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None):
    """See `gla.reference.recurrent_gla`."""
    from fla.ops.gla import fused_recurrent_gla as kernel

    o, state = kernel(
        q,
        k,
        v,
        gk=gk,
        scale=scale,
        initial_state=_fp32(initial_state),
        output_final_state=output_final_state,
        cu_seqlens=_int64(cu_seqlens),
    )
    return o.to(v.dtype), state


def causal_conv(
    x, weight, *, bias=None, initial_state=None, output_final_state=False, cu_seqlens=None, activation=None
):
    """See `short_conv.reference.causal_conv`."""
    from fla.modules.causal_conv1d import causal_conv1d as kernel

    if initial_state is not None:  # fla keeps W inputs, channels first; the oldest meets no tap
        initial_state = F.pad(initial_state.mT, (1, 0)).contiguous()  # [N, D, W]
    y, state = kernel(
        x,
        weight,
        bias=bias,
        initial_state=initial_state,
        output_final_state=output_final_state,
        activation=activation,
        backend="triton",
        cu_seqlens=_int64(cu_seqlens),
    )
    return y, state[:, :, 1:].mT.to(x.dtype) if output_final_state else None


def rms_norm_gated(x, weight, gate, eps=1e-5):
    """See `norm_gate.reference.rms_norm_gated`."""
    from fla.modules.norm.fused_norm_gate import rms_norm_gated as kernel

    return kernel(x, gate, weight, None, activation="silu", eps=eps)


def l2_normalize(x, eps=1e-6):
    """See `gated_delta_rule.reference.l2_normalize`."""
    from fla.modules.norm.l2norm import l2norm as kernel

    return kernel(x, eps)


def check_triton_for_backward() -> None:
    """Before a forward pass that will be differentiated: refuse where its backward would be wrong (`hopper.py`).

    On a Hopper GPU whose Triton is in doubt, our launch of the doubtful kernel is put before fla's.

    Raises:
        RuntimeError: this Triton on this GPU cannot train the gated delta rule. The line names every way out.
    """
    from fla.utils import IS_NVIDIA_HOPPER

    if not IS_NVIDIA_HOPPER:
        return
    problem = hopper.backward_problem()
    if problem is not None:
        raise RuntimeError(problem)
    if hopper.own_tiles():
        import jet_kernels.gated_delta_rule.hopper_backward  # noqa: F401  registers itself with fla


def _fp32(state: torch.Tensor | None) -> torch.Tensor | None:
    return None if state is None else state.float()


def _int64(cu_seqlens: torch.Tensor | None) -> torch.Tensor | None:
    return None if cu_seqlens is None else cu_seqlens.long()
