"""Triton kernels of the fused dynamic convolution.

Tokens of all sequences lie one after another, T in all. A token reads an earlier one only if that one
is in its own sequence, which `pos`, the token's position in its sequence, decides by `pos >= back`.
So dense and packed batches are one case, and nothing has to come back to the host.

Tap w of channel d is row d * W + w of the generator's weight and reaches `back = W - 1 - w` tokens back.
Pointers are a 64-bit base for each program plus 32-bit offsets inside its tile: large batches do not
overflow, and the tiles do not spill registers.
"""

import triton
import triton.language as tl


@triton.jit
def _tap_kernel(
    hidden,
    weight,
    bias,
    tap,
    row,
    rows,
    col,
    cols,
    R: tl.constexpr,
    W: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """hidden @ weight^T + bias for one tap: a tile of convolution kernels [BM, BD] in fp32."""
    acc = tl.zeros((BM, BD), tl.float32)
    for first in range(0, R, BR):
        r = first + tl.arange(0, BR)
        h = tl.load(hidden + row[:, None] * R + r[None, :], mask=rows[:, None] & (r < R)[None, :], other=0.0)
        w = tl.load(
            weight + (col * W + tap)[None, :] * R + r[:, None], mask=(r < R)[:, None] & cols[None, :], other=0.0
        )
        acc = tl.dot(h, w, acc, input_precision=PRECISION)
    return acc + tl.load(bias + col * W + tap, mask=cols, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _tap_input(x, state, p, n, back, row, rows, col, cols, D: tl.constexpr, W: tl.constexpr, HAS_STATE: tl.constexpr):
    """The inputs `back` tokens earlier [BM, BD] in fp32: from the sequence, its initial state, or zero."""
    inside = rows & (p >= back)
    value = tl.load(x + row[:, None] * D + col[None, :] - back * D, mask=inside[:, None] & cols[None, :], other=0.0).to(
        tl.float32
    )
    if HAS_STATE:
        before = rows & (p < back)
        at = (n.to(tl.int64) + 1) * (W - 1) + p - back
        value += tl.load(state + at[:, None] * D + col[None, :], mask=before[:, None] & cols[None, :], other=0.0).to(
            tl.float32
        )
    return value


@triton.jit
def dynamic_conv_forward_kernel(
    x,
    hidden,
    weight,
    bias,
    state,
    pos,
    seq,
    dy,
    out,
    T,
    D: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    SILU: tl.constexpr,
    HAS_STATE: tl.constexpr,
    BACKWARD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Convolution output, or with BACKWARD the gradient before the SiLU, from a recomputed output.

    x, dy, out [T, D]; hidden [T, R]; weight [D * W, R]; bias [D * W]; state [N, W - 1, D]; pos, seq [T].
    Grid: channel tiles first, so that the programs of one token tile share its hidden rows in cache.
    """
    start = tl.program_id(1).to(tl.int64) * BM
    channel = tl.program_id(0) * BD
    row, col = tl.arange(0, BM), tl.arange(0, BD)
    rows, cols = row < (T - start), col < D - channel
    x += start * D + channel
    hidden += start * R
    weight += channel.to(tl.int64) * W * R
    bias += channel * W
    p = tl.load(pos + start + row, mask=rows, other=0)
    n = p
    if HAS_STATE:
        state += channel
        n = tl.load(seq + start + row, mask=rows, other=0)
    y = tl.zeros((BM, BD), tl.float32)
    for tap in range(W):  # not unrolled: one accumulator lives at a time
        kernel = _tap_kernel(hidden, weight, bias, tap, row, rows, col, cols, R, W, BM, BD, BR, PRECISION)
        y += kernel * _tap_input(x, state, p, n, W - 1 - tap, row, rows, col, cols, D, W, HAS_STATE)
    at = start * D + channel
    tile = row[:, None] * D + col[None, :]
    inside = rows[:, None] & cols[None, :]
    if BACKWARD:
        gate = tl.sigmoid(y)
        y = tl.load(dy + at + tile, mask=inside, other=0.0).to(tl.float32) * gate * (1 + y * (1 - gate))
    elif SILU:
        y *= tl.sigmoid(y)
    tl.store(out + at + tile, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def dynamic_conv_dx_kernel(
    dz,
    hidden,
    weight,
    bias,
    pos,
    dx,
    T,
    D: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of the inputs [T, D]: every later token of the same sequence that read them.

    The later tokens' kernels are recomputed from their own hidden rows, so no two programs add to the
    same place and the result does not depend on their order.
    """
    start = tl.program_id(1).to(tl.int64) * BM
    channel = tl.program_id(0) * BD
    row, col = tl.arange(0, BM), tl.arange(0, BD)
    cols = col < D - channel
    tile = row[:, None] * D + col[None, :]
    weight += channel.to(tl.int64) * W * R
    bias += channel * W
    grad = tl.zeros((BM, BD), tl.float32)
    for tap in range(W):
        back = W - 1 - tap
        later = start + back
        rows = row < (T - later)
        rows = rows & (tl.load(pos + later + row, mask=rows, other=-1) >= back)  # else it is another sequence's
        kernel = _tap_kernel(hidden + later * R, weight, bias, tap, row, rows, col, cols, R, W, BM, BD, BR, PRECISION)
        value = tl.load(dz + later * D + channel + tile, mask=rows[:, None] & cols[None, :], other=0.0)
        grad += kernel * value.to(tl.float32)
    inside = (row < (T - start))[:, None] & cols[None, :]
    tl.store(dx + start * D + channel + tile, grad.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def dynamic_conv_dkernel_kernel(
    x,
    state,
    pos,
    seq,
    dz,
    dkernel,
    first,
    count,
    D: tl.constexpr,
    W: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    HAS_STATE: tl.constexpr,
):
    """Gradient of the kernels for tokens first .. first + count: dkernel [count, D * W]."""
    offset = tl.program_id(1).to(tl.int64) * BM
    start = offset + first
    row = tl.arange(0, BM)
    flat = tl.program_id(0) * BC + tl.arange(0, BC)
    rows, cols = row < (count - offset), flat < D * W
    col, back = (flat // W)[None, :], (W - 1 - flat % W)[None, :]
    p = tl.load(pos + start + row, mask=rows, other=0)[:, None]
    inside = rows[:, None] & cols[None, :]
    tile = row[:, None] * D + col
    value = tl.load(x + start * D + tile - back * D, mask=inside & (p >= back), other=0.0).to(tl.float32)
    if HAS_STATE:
        n = tl.load(seq + start + row, mask=rows, other=0).to(tl.int64)[:, None]
        at = ((n + 1) * (W - 1) + p - back) * D + col
        value += tl.load(state + at, mask=inside & (p < back), other=0.0).to(tl.float32)
    value *= tl.load(dz + start * D + tile, mask=inside, other=0.0).to(tl.float32)
    to = dkernel + offset * (D * W) + row[:, None] * (D * W) + flat[None, :]
    tl.store(to, value.to(dkernel.dtype.element_ty), mask=inside)
