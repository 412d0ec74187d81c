"""Gated delta rule in plain PyTorch: the oracle for the GPU kernels and the fast path on a CPU.

Per head, with a state S [d_k, d_v] that starts at zero (Gated DeltaNet, arXiv 2412.06464):

    S   <- exp(g_t) S
    S   <- S + k_t (beta_t (v_t - S^T k_t))^T
    o_t  = S^T (q_t * scale)

This file needs nothing but torch, because exported checkpoints carry a copy of it.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch


def l2_normalize(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Divides the last dimension by its Euclidean length, in fp32.

    Args:
        x: any shape, normalised over the last dimension.
        eps: added to the sum of squares.

    Returns:
        Tensor of the shape and dtype of `x`.
    """
    y = x.to(_compute_dtype(x))
    return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def recurrent_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The recurrence as written, one token at a time: the oracle, and the decode step.

    Args:
        q: queries [B, T, H, Dk], already normalised.
        k: keys [B, T, H, Dk], already normalised.
        v: values [B, T, H, Dv].
        g: log decay [B, T, H], at most 0.
        beta: write strength [B, T, H].
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
    q, k, v, g, beta = (x.to(dtype) for x in (q, k, v, g, beta))
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    state = _initial_state(initial_state, q, v, q.shape[0] if cu_seqlens is None else len(bounds) - 1)
    if cu_seqlens is None:
        o, state = _recur(q, k, v, g.exp(), beta, state)
    else:
        parts = [
            _recur(*(x[:, a:b] for x in (q, k, v, g.exp(), beta)), state[n : n + 1])
            for n, (a, b) in enumerate(itertools.pairwise(bounds))
        ]
        o, state = torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts])
    return o.to(out_dtype), state if output_final_state else None


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int = 32,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same function as `recurrent_gated_delta_rule`, chunk by chunk (2412.06464, section 3.3).

    Inside a chunk the writes solve a unit lower triangular system, so everything there is matrix
    products over all chunks at once. Only the state passes from chunk to chunk.

    Args:
        q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens: as in the recurrent form.
        chunk_size: tokens in a chunk, a power of two. It changes the speed, not the result; 32 was
            fastest on a CPU for most shapes.

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
    q, k, v = (_to_chunks(x.to(dtype), layout) for x in (q, k, v))  # [M*H, C, D]
    g, beta = (_to_chunks(x.to(dtype).unsqueeze(-1), layout) for x in (g, beta))  # [M*H, C, 1]

    # Differences of a running sum lose digits when the decay is strong; fp64 keeps them.
    log_decay = g.to(_sum_dtype(g)).cumsum(1)  # [M*H, C, 1]
    later = torch.ones(layout.chunk_size, layout.chunk_size, dtype=torch.bool, device=q.device).triu(1)
    # exp of a masked difference: never of a positive number, so no overflow and no inf * 0.
    decay = (log_decay - log_decay.mT).to(dtype).masked_fill(later, -torch.inf).exp()  # [M*H, C, C]
    from_start = log_decay.to(dtype).exp()
    to_end = (log_decay[:, -1:] - log_decay).to(dtype).exp()

    k_beta = k * beta
    system = (k_beta @ k.mT) * decay  # its diagonal and upper part are not read
    right = torch.cat([v * beta, k_beta * from_start], -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    writes, reads = solved.split([v.shape[-1], k.shape[-1]], -1)  # [M*H, C, Dv], [M*H, C, Dk]

    states, writes, state = _pass_states(state, writes, reads, k * to_end, from_start[:, -1:], layout)
    o = (q * from_start) @ states + ((q @ k.mT) * decay) @ writes  # [M*H, C, Dv]
    o = _from_chunks(o * scale, layout, heads).view(batch, time, heads, -1)
    return o.to(out_dtype), state if output_final_state else None


def _pass_states(
    state: torch.Tensor,
    writes: torch.Tensor,
    reads: torch.Tensor,
    keys: torch.Tensor,
    decay: torch.Tensor,
    layout: _Layout,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Carries the state from chunk to chunk.

    Returns the state before each chunk [M*H, Dk, Dv], what each chunk writes [M*H, C, Dv], and the
    final states [N, H, Dk, Dv].
    """
    shape, heads = state.shape, state.shape[1]
    rows = [n * heads for n in layout.active]
    current = state[layout.order].flatten(0, 1)  # longest sequences first, so the active ones are a prefix
    before, written, finished = [], [], []
    steps = zip(*(x.split(rows) for x in (writes, reads, keys.mT, decay)))
    for count, (write, read, key, chunk_decay) in zip(rows, steps):
        if count < len(current):
            finished.append(current[count:])
            current = current[:count]
        before.append(current)
        written.append(torch.baddbmm(write, read, current, alpha=-1))
        current = torch.baddbmm(current * chunk_decay, key, written[-1])
    finished.append(current)
    final = torch.cat(finished[::-1]).view(shape)[layout.order.argsort()]
    return torch.cat(before), torch.cat(written), final


def _recur(q, k, v, decay, beta, state):
    """Token loop over one batch of equally long sequences; q, k, v [B, T, H, D], state [B, H, Dk, Dv]."""
    outputs = [v[:, :0]]
    for t in range(q.shape[1]):
        state = state * decay[:, t, :, None, None]
        error = v[:, t] - (k[:, t].unsqueeze(-2) @ state).squeeze(-2)  # [B, H, Dv]
        state = state + k[:, t].unsqueeze(-1) * (beta[:, t].unsqueeze(-1) * error).unsqueeze(-2)
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
