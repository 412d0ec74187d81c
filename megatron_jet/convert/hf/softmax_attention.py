"""Softmax attention over the keys that the cache returns, by SDPA, in plain matrices, or by flash attention.

B = batch rows, H = query heads, G = key-value heads, T = queries per row, S = keys per row, D = head width
"""

import torch
import torch.nn.functional as F
from torch import nn

from .flash_attention import flash_attend
from .token_layout import TokenLayout

# Queries per block of windowed attention: a block pays for its window once, so it should not be small beside it.
SMALLEST_BLOCK = 256


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_counts: torch.Tensor | None,
    layout: TokenLayout,
    window: int | None,
    implementation: str,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Causal attention, optionally within a window: key j is visible from query i iff i - window < j <= i.

    Args:
        module: the attention layer; flash attention asks it for its config.
        query: [B, H, T, D].
        key, value: [B, G, S, D].
        key_counts: count of each key [B or 1, S], or None where the layout is dense and the last T keys
            are the queries' own (T = 1: every key is visible).
        layout: of this pass.
        window: tokens that a query sees, itself included, or None.
        implementation: "sdpa", "eager", or a flash attention that transformers knows.
        dropout: on the attention weights.

    Returns:
        [B, T, H * D]; rows of padding queries are meaningless.
    """
    if "flash" in implementation:
        return flash_attend(module, query, key, value, key_counts, layout, window, dropout)
    plain = _eager if implementation == "eager" else _sdpa
    if key_counts is not None:
        mask = layout.visible(key_counts, window)
        out = plain(query, key, value, mask, dropout)
    elif query.shape[2] == 1:
        out = plain(query, key, value, None, dropout)
    else:
        out = _causal(plain, query, key, value, window, dropout)
    return out.transpose(1, 2).flatten(2)


def _causal(plain, query, key, value, window: int | None, dropout: float) -> torch.Tensor:
    """Dense causal attention where the queries belong to the last T of the S keys."""
    queries, keys = query.shape[2], key.shape[2]
    if window is None or keys <= window:
        if queries == keys:
            return plain(query, key, value, "causal", dropout)
        return plain(query, key, value, _band(queries, keys, None, query.device), dropout)
    # In blocks, so that a long prompt costs T * window and not T * T.
    block = max(window, SMALLEST_BLOCK)
    out = []
    for begin in range(0, queries, block):
        end = min(begin + block, queries)
        last = keys - queries + end
        first = max(0, keys - queries + begin - window + 1)
        band = _band(end - begin, last - first, window, query.device)
        out.append(plain(query[:, :, begin:end], key[:, :, first:last], value[:, :, first:last], band, dropout))
    return torch.cat(out, 2)


def _band(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Causal mask [1, 1, T, S] whose last query sees the last key, limited to a window."""
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    if window is not None:
        mask = mask.triu(keys - queries - window + 1)
    return mask[None, None]


def _sdpa(query, key, value, mask: torch.Tensor | str | None, dropout: float) -> torch.Tensor:
    """PyTorch's attention. mask is boolean, None (all visible) or "causal"."""
    groups = query.shape[1] // key.shape[1]
    if query.shape[2] == 1 and groups > 1:
        # One query per head: the heads of a group become queries of one head, and keys are read once.
        grouped = query.view(query.shape[0], key.shape[1], groups, -1)
        return F.scaled_dot_product_attention(grouped, key, value, mask, dropout).view(query.shape)
    if isinstance(mask, torch.Tensor):
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        return F.scaled_dot_product_attention(query, key, value, mask, dropout)
    return F.scaled_dot_product_attention(query, key, value, None, dropout, mask == "causal", enable_gqa=groups > 1)


def _eager(query, key, value, mask: torch.Tensor | str | None, dropout: float) -> torch.Tensor:
    """The formula, with the softmax at least in fp32."""
    if isinstance(mask, str):
        mask = _band(query.shape[2], key.shape[2], None, query.device)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    dtype = torch.promote_types(query.dtype, torch.float32)
    weights = F.dropout(scores.softmax(-1, dtype=dtype).to(query.dtype), dropout)
    return weights @ value
