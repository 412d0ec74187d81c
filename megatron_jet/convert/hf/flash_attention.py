"""Flash attention through transformers, for every layout of tokens.

transformers aligns the last query with the last key, and passes a window w on as (w - 1, w - 1), so a
query sees w keys, itself included, as everywhere in this model.
"""

from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .token_layout import TokenLayout


def flash_attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_counts: torch.Tensor | None,
    layout: TokenLayout,
    window: int | None,
    dropout: float,
) -> torch.Tensor:
    """As `softmax_attention.attend`; padding queries get zeros.

    Args:
        module: the attention layer; transformers reads its config.
        query: [B, H, T, D].
        key, value: [B, G, S, D].
        key_counts, layout, window, dropout: as in `attend`.

    Returns:
        [B, T, H * D].
    """
    flash = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]
    common: dict[str, Any] = {"dropout": dropout, "scaling": query.shape[-1] ** -0.5, "is_causal": True}
    if key_counts is None:
        # One query sees all keys it is given, in whatever order they are: no window to cut by order.
        window = None if query.shape[2] == 1 else window
        return flash(module, query, key, value, None, sliding_window=window, **common)[0].flatten(2)
    rows, q_bounds, earliest, latest = _query_ranges(layout, query.device)
    packed_query = layout.pack(query.transpose(1, 2).flatten(2)).view(1, -1, query.shape[1], query.shape[3])
    if packed_query.shape[1] == 0:
        return torch.zeros_like(query).transpose(1, 2).flatten(2)
    indices, k_bounds = _keys_in_order(key_counts.expand(len(key), -1), rows, earliest, latest)
    packed_key, packed_value = (x.transpose(1, 2).flatten(0, 1)[indices][None] for x in (key, value))
    out = flash(
        module,
        packed_query.transpose(1, 2),
        packed_key.transpose(1, 2),
        packed_value.transpose(1, 2),
        None,
        sliding_window=window,
        cu_seq_lens_q=q_bounds.int(),
        cu_seq_lens_k=k_bounds.int(),
        max_length_q=int(q_bounds.diff().max()),
        max_length_k=int(k_bounds.diff().max()),
        **common,
    )[0]
    out = out.flatten(2)  # [1, M, H * D]
    return out.view(layout.batch, layout.length, -1) if layout.sequences is None else layout.unpack(out)


def _query_ranges(
    layout: TokenLayout, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row, boundaries among the packed queries, first and last visible key count of each sequence."""
    counts = layout.counts()
    sequences = layout.sequences
    if sequences is None:
        rows = torch.arange(layout.batch, device=device)
        bounds = torch.arange(layout.batch + 1, device=device) * layout.length
        return rows, bounds, torch.zeros_like(rows), counts[:, -1]
    bounds = sequences.cu_seqlens
    first, last = sequences.indices[bounds[:-1]], sequences.indices[bounds[1:] - 1]
    earliest = torch.zeros_like(first) if layout.document is None else layout.document.flatten()[first]
    return sequences.rows, bounds, earliest, counts.flatten()[last]


def _keys_in_order(
    key_counts: torch.Tensor, rows: torch.Tensor, earliest: torch.Tensor, latest: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Places in the flattened [B * S] keys of each sequence's visible keys, by count, and their boundaries."""
    order = key_counts.argsort(1)  # [B, S]
    counts = key_counts.gather(1, order)[rows]  # [N, S]
    visible = (counts >= earliest[:, None]) & (counts <= latest[:, None])
    sequence, place = visible.nonzero(as_tuple=True)
    lengths = visible.sum(1)
    row = rows[sequence]
    return row * key_counts.shape[1] + order[row, place], torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
