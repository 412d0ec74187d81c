"""Gated linear attention in plain PyTorch: the oracle for the GPU kernels and the fast path on a CPU.

Per head, with a state S [d_k, d_v] that starts at zero (GLA, arXiv 2312.06635):

    S   <- Diag(exp(gk_t)) S + k_t v_t^T
    o_t  = S^T (q_t * scale)

This file needs nothing but torch, because exported checkpoints carry a copy of it.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F

# Blocks of this many tokens compute one decay per pair of tokens and key channel.
_PAIRWISE = 4


def recurrent_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gk: torch.Tensor,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The recurrence as written, one token at a time: the oracle, and the decode step.

    Args:
        q: queries [B, T, H, Dk].
        k: keys [B, T, H, Dk].
        v: values [B, T, H, Dv].
        gk: log decay of each key channel [B, T, H, Dk], at most 0.
        scale: factor on the queries, by default Dk ** -0.5.
        initial_state: [N, H, Dk, Dv], by default zeros.
        output_final_state: also return the state after the last token.
        cu_seqlens: int [N + 1], sequence boundaries of a packed batch (then B = 1).

    Returns:
        Output [B, T, H, Dv] in the dtype of `v`, and the final state [N, H, Dk, Dv] in fp32 or None.

    Raises:
        ValueError: if shapes or boundaries do not fit together.
    """
    bounds = _boundaries(q, cu_seqlens)
    out_dtype, dtype = v.dtype, _compute_dtype(v)
    q, k, v, gk = (x.to(dtype) for x in (q, k, v, gk))
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    state = _initial_state(initial_state, q, v, len(bounds) - 1)
    if cu_seqlens is None:
        o, state = _recur(q, k, v, gk.exp(), state)
    else:
        parts = [
            _recur(*(x[:, a:b] for x in (q, k, v, gk.exp())), state[n : n + 1])
            for n, (a, b) in enumerate(itertools.pairwise(bounds))
        ]
        o, state = torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts])
    return o.to(out_dtype), state if output_final_state else None


def chunk_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gk: torch.Tensor,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same function as `recurrent_gla`, chunk by chunk (2312.06635, section 4).

    Every exponent is at most 0 whatever the decay, so nothing overflows.

    Args:
        q, k, v, gk, scale, initial_state, output_final_state, cu_seqlens: as in the recurrent form.
        chunk_size: tokens in a chunk, a power of two. It changes the speed, not the result; 64 was
            fastest on a CPU for wide heads and as good as 32 for narrow ones.

    Returns:
        As the recurrent form.

    Raises:
        ValueError: if shapes or boundaries do not fit together.
    """
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size {chunk_size} is not a power of two")
    batch, time, heads, _ = q.shape
    bounds = _boundaries(q, cu_seqlens)
    layout = _chunk_layout(bounds, chunk_size, q.device)
    out_dtype, dtype = v.dtype, _compute_dtype(v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    state = _initial_state(initial_state, q, v.to(dtype), len(bounds) - 1)
    q, k, v, gk = (_to_chunks(x.to(dtype), layout) for x in (q * scale, k, v, gk))  # [M*H, C, D]

    # Differences of a running sum lose digits when the decay is strong; fp64 keeps them.
    total = gk.to(_sum_dtype(gk)).cumsum(1)  # [M*H, C, Dk]
    last = total[:, -1:]
    update = (k * (last - total).to(dtype).exp()).mT @ v  # [M*H, Dk, Dv]
    states, state = _pass_states(state, update, last.mT.to(dtype).exp(), layout)
    o = _within_chunk(q, k, v, total) + (q * total.to(dtype).exp()) @ states
    o = _from_chunks(o, layout, heads).view(batch, time, heads, -1)
    return o.to(out_dtype), state if output_final_state else None


def _within_chunk(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Attention of the tokens of a chunk to each other, [M*H, C, Dv].

    A block is cut in halves. From the second half to the first, the decay factors at the last token
    of the first half into two numbers of at most 1. Then the halves are blocks, and so on down to
    blocks that are small enough for one decay per pair of tokens.
    """
    length = q.shape[1]
    if length <= _PAIRWISE:
        later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        decay = (total.unsqueeze(2) - total.unsqueeze(1)).to(q.dtype)  # [M*H, C, C, Dk]
        decay = decay.masked_fill(later.unsqueeze(-1), -torch.inf).exp()
        return ((q.unsqueeze(2) * k.unsqueeze(1) * decay).sum(-1)) @ v
    half = length // 2
    middle = total[:, half - 1 : half]
    q_after = q[:, half:] * (total[:, half:] - middle).to(q.dtype).exp()
    k_before = k[:, :half] * (middle - total[:, :half]).to(q.dtype).exp()
    across = (q_after @ k_before.mT) @ v[:, :half]
    halves = (x.unflatten(1, (2, half)).flatten(0, 1) for x in (q, k, v, total))
    inside = _within_chunk(*halves).unflatten(0, (-1, 2)).flatten(1, 2)
    return inside + F.pad(across, (0, 0, half, 0))


def _pass_states(
    state: torch.Tensor, update: torch.Tensor, decay: torch.Tensor, layout: _Layout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Carries the state from chunk to chunk: before each chunk [M*H, Dk, Dv], and at the end [N, H, Dk, Dv]."""
    shape, heads = state.shape, state.shape[1]
    rows = [n * heads for n in layout.active]
    current = state[layout.order].flatten(0, 1)  # longest sequences first, so the active ones are a prefix
    before, finished = [], []
    for count, chunk_update, chunk_decay in zip(rows, update.split(rows), decay.split(rows)):
        if count < len(current):
            finished.append(current[count:])
            current = current[:count]
        before.append(current)
        current = torch.addcmul(chunk_update, current, chunk_decay)
    finished.append(current)
    final = torch.cat(finished[::-1]).view(shape)[layout.order.argsort()]
    return torch.cat(before), final


def _recur(q, k, v, decay, state):
    """Token loop over one batch of equally long sequences; q, k, v, decay [B, T, H, D], state [B, H, Dk, Dv]."""
    outputs = [v[:, :0]]
    for t in range(q.shape[1]):
        state = state * decay[:, t].unsqueeze(-1) + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        outputs.append((q[:, t].unsqueeze(-2) @ state).squeeze(-2).unsqueeze(1))
    return torch.cat(outputs, 1), state


class _Layout(NamedTuple):
    """How tokens are arranged in chunks: chunk-step major, longest sequence first.

    rows: token of every chunk slot [M * C]; the number of tokens where the slot is padding.
    slots: chunk slot of every token [tokens].
    order: sequence numbers, longest first [N].
    active: how many sequences have a first, second, ... chunk.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    order: torch.Tensor
    active: list[int]
    chunk_size: int


def _chunk_layout(bounds: list[int], chunk_size: int, device: torch.device) -> _Layout:
    """Lays sequences with these boundaries out in chunks, without a loop over chunks or tokens.

    `chunk_size` is a power of two and is halved while every sequence still fits.
    """
    ends = torch.tensor(bounds[1:])
    starts = torch.tensor(bounds[:-1])
    longest = int((ends - starts).max())
    while chunk_size > 1 and chunk_size // 2 >= longest:  # no padding beyond need when every sequence is short
        chunk_size //= 2
    chunks = (ends - starts + chunk_size - 1) // chunk_size
    order = chunks.argsort(descending=True, stable=True)
    has_chunk = torch.arange(int(chunks.max()))[:, None] < chunks[order]  # [steps, N]
    step, place = has_chunk.nonzero(as_tuple=True)  # [M]
    rows = (starts[order][place] + step * chunk_size)[:, None] + torch.arange(chunk_size)
    real = rows < ends[order][place][:, None]
    rows = torch.where(real, rows, bounds[-1]).flatten()
    slots = torch.empty(bounds[-1], dtype=torch.long)
    slots[rows[real.flatten()]] = real.flatten().nonzero().squeeze(1)
    active = has_chunk.sum(1).tolist()
    return _Layout(rows.to(device), slots.to(device), order.to(device), active, chunk_size)


class _Rearrange(torch.autograd.Function):
    """Picks rows, with zeros where `rows` is past the end; the gradient picks rows by the inverse map."""

    @staticmethod
    def forward(ctx, x, rows, inverse):
        ctx.save_for_backward(rows, inverse)
        if len(rows) > len(inverse):
            x = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, grad):
        rows, inverse = ctx.saved_tensors
        return _Rearrange.apply(grad, inverse, rows), None, None


def _to_chunks(x: torch.Tensor, layout: _Layout) -> torch.Tensor:
    """[B, T, H, D] -> [M * H, C, D]; padding slots are zero."""
    x = _Rearrange.apply(x.flatten(0, 1), layout.rows, layout.slots)
    return x.unflatten(0, (-1, layout.chunk_size)).transpose(1, 2).flatten(0, 1)


def _from_chunks(x: torch.Tensor, layout: _Layout, heads: int) -> torch.Tensor:
    """[M * H, C, D] -> [tokens, H, D]."""
    x = x.unflatten(0, (-1, heads)).transpose(1, 2).flatten(0, 1)
    return _Rearrange.apply(x, layout.slots, layout.rows)


def _boundaries(q: torch.Tensor, cu_seqlens: torch.Tensor | None) -> list[int]:
    batch, time = q.shape[:2]
    if cu_seqlens is None:
        return [n * time for n in range(batch + 1)]
    bounds = cu_seqlens.tolist()
    if batch != 1 or bounds[0] != 0 or bounds[-1] != time or any(b < a for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"cu_seqlens {bounds} must rise from 0 to T={time} in a packed batch of 1, not {batch}")
    return bounds


def _initial_state(state: torch.Tensor | None, q: torch.Tensor, v: torch.Tensor, sequences: int) -> torch.Tensor:
    shape = (sequences, q.shape[2], q.shape[3], v.shape[3])
    if state is None:
        return v.new_zeros(shape)
    if tuple(state.shape) != shape:
        raise ValueError(f"initial_state has shape {tuple(state.shape)}, expected [N, H, Dk, Dv] = {shape}")
    return state.to(v.dtype)


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _sum_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64  # Apple GPUs have no fp64
