"""Core attention on torch's scaled_dot_product_attention: causal, sliding window, dense and packed."""

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_jet.configs.errors import UserError


class SdpaCoreAttention(MegatronModule):
    """Causal attention over local heads. The window comes from `config.window_size = (window - 1, 0)`.

    No mask is passed in and none of size [s, s] is made for plain causal attention. A sliding window is computed in
    blocks, so that time and memory grow with s * window. Packed sequences run one by one.
    """

    def __init__(self, config, layer_number: int, attn_mask_type: AttnMaskType, attention_type: str, **_):
        super().__init__(config)
        if config.context_parallel_size > 1:
            raise UserError("context parallelism is not supported yet; use context=1")
        self.window = config.window_size[0] + 1 if config.window_size is not None else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        /,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [s, b, n, d], or [t, n, d] when packed.
            key, value: [s, b, g, d] or [t, g, d] with g key/value heads.
            attention_mask: must be None; the mask is always causal.
            packed_seq_params: cu_seqlens of packed sequences.

        Returns:
            [s, b, n * d], or [t, n * d] when packed.
        """
        if attention_mask is not None or attention_bias is not None:
            raise ValueError("masks other than the causal one are not supported; pass packed_seq_params instead")
        if packed_seq_params is None:
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, heads, s, d]
            return causal_attention(q, k, v, self.window).permute(2, 0, 1, 3).flatten(2)
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        outputs = []
        for start, end in zip(bounds[:-1], bounds[1:], strict=True):
            q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))  # [1, heads, length, d]
            outputs.append(causal_attention(q, k, v, self.window)[0].transpose(0, 1).flatten(1))
        return torch.cat(outputs)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, window: int | None = None) -> Tensor:
    """Causal softmax attention; key j is visible from query i iff i - window < j <= i.

    Args:
        query: [b, n, s, d]; key, value: [b, g, s, d] where g divides n.
        window: tokens a query sees, itself included; None for all.

    Returns:
        [b, n, s, d]
    """
    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    if groups > 1:
        # The fused CPU kernel takes equal head counts only; the copies are small beside the scores.
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if window is None or window >= length:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    block = max(window, 64)
    if length <= 2 * block:
        positions = torch.arange(length, device=query.device)
        distance = positions[:, None] - positions[None, :]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=(distance >= 0) & (distance < window))
    return _blocked_window(query, key, value, window, block)


def _blocked_window(query: Tensor, key: Tensor, value: Tensor, window: int, block: int) -> Tensor:
    """Queries in blocks of at least `window` tokens: each block needs only its own keys and those of the one before."""
    b, n, length, d = query.shape
    blocks = -(-length // block)
    pad = blocks * block - length
    query, key, value = (F.pad(x, (0, 0, 0, pad)).reshape(b, n, blocks, block, d) for x in (query, key, value))
    key, value = (torch.cat([F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1], x], dim=3) for x in (key, value))
    q_pos = torch.arange(block, device=query.device)[:, None] + block
    k_pos = torch.arange(2 * block, device=query.device)[None, :]
    visible = (q_pos >= k_pos) & (q_pos - k_pos < window)  # [block, 2 * block]
    first = visible & (k_pos >= block)  # nothing lies before the first block
    mask = torch.cat([first[None], visible[None].expand(blocks - 1, -1, -1)])  # [blocks, block, 2 * block]
    out = F.scaled_dot_product_attention(
        *(x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)),
        attn_mask=mask.repeat(b, 1, 1)[:, None],
    )
    return out.unflatten(0, (b, blocks)).transpose(1, 2).reshape(b, n, blocks * block, d)[:, :, :length]
