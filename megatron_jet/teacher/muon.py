"""Muon (Jordan et al. 2024): momentum whose update is made orthogonal, for matrices of a small model on a CPU.

Matrices of one shape are stacked and updated together in fp32. torch.optim.Muon does the same iteration one matrix at
a time in bfloat16, which is slow on processors without bfloat16 arithmetic.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

# Coefficients of the quintic Newton-Schulz iteration that brings singular values to about one.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalize(x: Tensor, steps: int = 5) -> Tensor:
    """Returns matrices with the singular vectors of `x`, `[n, rows, columns]`, and singular values near one."""
    tall = x.shape[1] > x.shape[2]
    x = x.transpose(1, 2) if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)  # [n, r, r]
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, for two-dimensional parameters.

    Args:
        params: matrices.
        lr: step size; an update has singular values of about `lr`, times sqrt(rows / columns) for tall matrices.
        momentum: decay of the running mean of gradients.
        weight_decay: decoupled, times `lr`.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        by_shape: dict[tuple[int, ...], list[Tensor]] = {}
        for param in params:
            by_shape.setdefault(tuple(param.shape), []).append(param)
        groups = [{"params": group} for group in by_shape.values()]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Updates every matrix from its `.grad`, which must be there."""
        for group in self.param_groups:
            params = group["params"]
            grads = torch.stack([param.grad for param in params])  # [n, r, c]
            state = self.state[params[0]]
            buffer = state.setdefault("momentum_buffer", torch.zeros_like(grads))
            buffer.lerp_(grads, 1 - group["momentum"])
            updates = orthogonalize(grads.lerp(buffer, group["momentum"]))
            scale = group["lr"] * max(1.0, grads.shape[1] / grads.shape[2]) ** 0.5
            for param, update in zip(params, updates, strict=True):
                param.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)
