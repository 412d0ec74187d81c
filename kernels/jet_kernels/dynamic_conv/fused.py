"""The dynamic convolution of a JetBlock on a GPU, forward and backward, without its kernels in memory.

Saved for the backward are only the inputs: x, hidden and the parameters. The published code also keeps
the kernels, [T, D, W], four times the size of x. The backward recomputes what it needs. The gradient of
the kernels exists for a limited number of tokens at a time, and library matrix products turn it into
the gradients of hidden and weight.
"""

from __future__ import annotations

import torch
import triton

from jet_kernels.dynamic_conv.triton_kernels import (
    dynamic_conv_dkernel_kernel,
    dynamic_conv_dx_kernel,
    dynamic_conv_forward_kernel,
)

# Largest gradient of the kernels held at a time, in elements: 8192 tokens at D = 4096, W = 4.
_MAX_DKERNEL = 2**27


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
    """See `jet_kernels.dispatch.fused_dynamic_conv`; this one needs Triton and a GPU.

    `cu_seqlens` is not read on the host, so a last boundary other than T is not noticed: tokens after
    it count as part of the last sequence.

    Raises:
        ValueError: if shapes or the activation do not fit.
    """
    batch, time, dim = x.shape
    width = weight.shape[0] // dim
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    if activation not in (None, "silu"):
        raise ValueError(f"activation {activation!r} is neither None nor 'silu'")
    if cu_seqlens is not None and batch != 1:
        raise ValueError(f"a packed batch has 1 row, not {batch}")
    if initial_state is not None and tuple(initial_state.shape) != (sequences, width - 1, dim):
        raise ValueError(f"conv state has shape {tuple(initial_state.shape)}, expected {(sequences, width - 1, dim)}")
    if cu_seqlens is None:
        cu_seqlens = torch.arange(0, (batch + 1) * time, time, device=x.device)
    # The products run in one dtype; casts outside the function keep their own gradients.
    flat = x.reshape(-1, dim)
    state = None if initial_state is None else initial_state.to(x.dtype).contiguous()
    y = _FusedDynamicConv.apply(
        flat.contiguous(),
        hidden.reshape(-1, hidden.shape[-1]).to(x.dtype).contiguous(),
        weight.to(x.dtype).contiguous(),
        bias.contiguous(),
        state,
        cu_seqlens,
        activation == "silu",
    )
    final = _final_state(flat, state, cu_seqlens, width) if output_final_state else None
    return y.view(batch, time, dim), final


class _FusedDynamicConv(torch.autograd.Function):
    """x [T, D], hidden [T, R], weight [D * W, R], bias [D * W], state [N, W - 1, D] or None."""

    @staticmethod
    def forward(ctx, x, hidden, weight, bias, state, cu_seqlens, silu):
        tokens = torch.arange(len(x), device=x.device)
        seq = torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True).clamp(max=len(cu_seqlens) - 2)
        pos = (tokens - cu_seqlens[seq]).int()
        seq = seq.int()
        ctx.save_for_backward(x, hidden, weight, bias, state, cu_seqlens, pos, seq)
        ctx.silu = silu
        with torch.cuda.device_of(x):  # Triton launches on the current device, wherever the tensors are
            return run_forward(x, hidden, weight, bias, state, pos, seq, silu, None)

    @staticmethod
    def backward(ctx, dy):
        x, hidden, weight, bias, state, cu_seqlens, pos, seq = ctx.saved_tensors
        dy = dy.contiguous()
        dz = run_forward(x, hidden, weight, bias, state, pos, seq, True, dy) if ctx.silu else dy
        need_x, need_hidden, need_weight, need_bias, need_state = ctx.needs_input_grad[:5]
        dx = input_gradient(dz, hidden, weight, bias, pos) if need_x else None
        grads = (None, None, None)
        if need_hidden or need_weight or need_bias:
            grads = _generator_gradients(x, hidden, weight, bias, state, pos, seq, dz)
        dstate = _state_gradient(dz, hidden, weight, bias, cu_seqlens, state) if need_state else None
        return dx, *grads, dstate, None, None


def run_forward(x, hidden, weight, bias, state, pos, seq, silu, dy):
    """Launches the convolution; with an output gradient `dy`, the gradient before the SiLU instead."""
    (tokens, dim), rank = x.shape, hidden.shape[1]
    out = torch.empty_like(x)
    tiles = _tiles(tokens, x.dtype, state is not None)
    grid = (triton.cdiv(dim, tiles["BD"]), triton.cdiv(tokens, tiles["BM"]))
    dynamic_conv_forward_kernel[grid](
        x,
        hidden,
        weight,
        bias,
        state,
        pos,
        seq,
        dy,
        out,
        tokens,
        D=dim,
        R=rank,
        W=weight.shape[0] // dim,
        SILU=silu,
        HAS_STATE=state is not None,
        BACKWARD=dy is not None,
        PRECISION=_precision(),
        **tiles,
    )
    return out


def input_gradient(dz, hidden, weight, bias, pos):
    """Launches the gradient of x, from the gradient before the activation, dz [T, D]."""
    (tokens, dim), rank = dz.shape, hidden.shape[1]
    dx = torch.empty_like(dz)
    tiles = _tiles(tokens, dz.dtype, False)
    grid = (triton.cdiv(dim, tiles["BD"]), triton.cdiv(tokens, tiles["BM"]))
    dynamic_conv_dx_kernel[grid](
        dz,
        hidden,
        weight,
        bias,
        pos,
        dx,
        tokens,
        D=dim,
        R=rank,
        W=weight.shape[0] // dim,
        PRECISION=_precision(),
        **tiles,
    )
    return dx


def _generator_gradients(x, hidden, weight, bias, state, pos, seq, dz):
    """Gradients of hidden, weight and bias, a limited number of tokens at a time."""
    tokens, rows = len(x), weight.shape[0]
    step = min(tokens, max(1, _MAX_DKERNEL // rows))
    dkernel = x.new_empty(step, rows)
    dhidden = torch.empty_like(hidden)
    dweight = torch.zeros_like(weight, dtype=torch.float32)
    dbias = torch.zeros_like(bias, dtype=torch.float32)
    for first in range(0, tokens, step):
        count = min(step, tokens - first)
        write_kernel_gradient(x, state, pos, seq, dz, dkernel, first, count)
        part = dkernel[:count]
        torch.mm(part, weight, out=dhidden[first : first + count])
        dweight += part.mT @ hidden[first : first + count]
        dbias += part.sum(0, dtype=torch.float32)
    return dhidden, dweight.to(weight.dtype), dbias.to(bias.dtype)


def write_kernel_gradient(x, state, pos, seq, dz, dkernel, first, count):
    """Launches the gradient of the kernels of `count` tokens, from token `first`, into dkernel [count, D * W]."""
    dim, rows = x.shape[1], dkernel.shape[1]
    block_tokens, block_columns = 8, 256
    grid = (triton.cdiv(rows, block_columns), triton.cdiv(count, block_tokens))
    dynamic_conv_dkernel_kernel[grid](
        x,
        state,
        pos,
        seq,
        dz,
        dkernel,
        first,
        count,
        D=dim,
        W=rows // dim,
        BM=block_tokens,
        BC=block_columns,
        HAS_STATE=state is not None,
    )


def _state_gradient(dz, hidden, weight, bias, cu_seqlens, state):
    """Gradient of the inputs before each sequence [N, W - 1, D]: only its first W - 1 tokens saw them."""
    sequences, reach, dim = state.shape
    rows = cu_seqlens[:-1, None] + torch.arange(reach, device=dz.device)  # [N, W - 1]
    real = (rows < cu_seqlens[1:, None]).unsqueeze(-1)
    rows = rows.clamp(max=len(dz) - 1)
    kernel = torch.nn.functional.linear(hidden[rows].float(), weight.float(), bias.float()).unflatten(-1, (dim, -1))
    effect = (dz[rows] * real).float().unsqueeze(-1) * kernel  # [N, W - 1, D, W]
    grad = torch.zeros_like(state, dtype=torch.float32)
    for place in range(reach):
        # Tap w at position p meets input p + w - (W - 1), which is state row p + w while that is negative.
        grad[:, place:] += effect[:, place, :, : reach - place].mT
    return grad.to(state.dtype)


def _final_state(x, state, cu_seqlens, width):
    """The last W - 1 inputs of each sequence [N, W - 1, D], from its initial state where it is shorter."""
    reach = width - 1
    local = (cu_seqlens[1:] - cu_seqlens[:-1])[:, None] - reach + torch.arange(reach, device=x.device)  # [N, W - 1]
    last = x[(cu_seqlens[:-1, None] + local).clamp(min=0)]
    if state is None:
        return torch.where((local >= 0).unsqueeze(-1), last, 0)
    earlier = state.gather(1, (local + reach).clamp(max=reach - 1).unsqueeze(-1).expand_as(last))
    return torch.where((local >= 0).unsqueeze(-1), last, earlier)


def _tiles(tokens: int, dtype: torch.dtype, has_state: bool) -> dict[str, int]:
    """Tile sizes and launch options that do not spill registers on sm_90 (tests/kernels compiles them)."""
    if tokens <= 64:  # decoding: more programs instead of larger tiles
        return {"BM": 16, "BD": 64, "BR": 64, "num_warps": 4, "num_stages": 3}
    if dtype == torch.float32:
        return {"BM": 64, "BD": 64, "BR": 32, "num_warps": 8, "num_stages": 3}
    return {"BM": 128, "BD": 64 if has_state else 128, "BR": 64, "num_warps": 8, "num_stages": 3}


def _precision() -> str:
    """TF32 for fp32 inputs only where torch itself may use it."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
