#!/usr/bin/env python3
"""Exit code 0 if kernels that the chosen ptxas (TRITON_PTXAS_PATH) assembles run here and multiply right."""

import os
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def product(a, b, c, N: tl.constexpr):
    """c = (a b^T)^T a, all N x N."""
    row, col = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    x, y = tl.load(a + row * N + col), tl.load(b + row * N + col)
    first = tl.dot(x, tl.trans(y))
    # An operand that comes from registers, as in the delta rule.
    tl.store(c + row * N + col, tl.dot(tl.trans(first.to(x.dtype)), x))


def main() -> int:
    """Two products in a row, the second of an operand that comes from registers."""
    device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    a, b = (torch.randn(64, 64, device=device).to(torch.float16) for _ in "ab")
    c = torch.empty(64, 64, device=device)
    product[(1,)](a, b, c, N=64, num_warps=4)
    expected = (a.float() @ b.float().T).half().float().T @ a.float()
    error = ((c - expected).norm() / expected.norm()).item()
    print(f"ptxas {os.environ.get('TRITON_PTXAS_PATH', 'of Triton')}: relative error {error:.1e}")
    return 0 if error < 1e-2 else 1


if __name__ == "__main__":
    sys.exit(main())
