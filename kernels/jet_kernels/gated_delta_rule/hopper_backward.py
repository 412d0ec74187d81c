"""fla's backward kernel of the gated delta rule, launched with the key tiles that Triton compiles right on Hopper.

Triton 3.4 to 3.7.0 miscompiles `chunk_bwd_kernel_dqkwg` on Hopper where it works on 64 key channels at a time, so fla
refuses to launch it there at all. With 32 and with 128 channels its numbers are right; keys that fill a tile in part
are masked, so any width can be padded to one of those.

Importing this module registers the launch with fla, which then prefers it wherever `ours` says so. Import it after
`jet_kernels.hopper` found everything else in order; it needs fla and takes seconds.
"""

from __future__ import annotations

import functools

import torch
import triton
from fla.backends import BaseBackend, register
from fla.ops.common.chunk_o import chunk_bwd_kernel_dqkwg
from fla.ops.utils import prepare_chunk_indices
from fla.utils import IS_NVIDIA_HOPPER

from jet_kernels import hopper

_LARGEST_TILE = 128


@functools.cache
def ours() -> bool:
    """Whether this launch takes the place of fla's on this machine."""
    return IS_NVIDIA_HOPPER and hopper.own_tiles()


def key_tile(width: int) -> int:
    """Key channels that a block works on: 16, 32 or 128, never 64."""
    return next((tile for tile in (16, 32) if width <= tile), _LARGEST_TILE)


@register("common")
class HopperTiles(BaseBackend):
    """Stands before fla's own launches (a lower priority comes first)."""

    backend_type = "jet_hopper_tiles"
    priority = 1

    @classmethod
    def is_available(cls) -> bool:
        return ours()

    def chunk_bwd_dqkwg_verifier(self, *args, g=None, **kwargs) -> tuple[bool, str | None]:
        """Without a decay the kernel is another one, which fla launches by itself."""
        return g is not None, "no decay g"

    def chunk_bwd_dqkwg(
        self,
        q,
        k,
        v,
        do,
        h,
        dh,
        w=None,
        g=None,
        g_gamma=None,
        dv=None,
        scale=None,
        state_v_first=False,
        cu_seqlens=None,
        chunk_size=64,
        chunk_indices=None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Gradients of queries, keys, w and log decays inside the chunks.

        Args:
            q, k: [B, T, H, K].
            v, do: values after the delta rule and the outputs' gradients [B, T, HV, V].
            h, dh: states at the chunks' starts and their gradients [B, NT, HV, K, V].
            w, dv: None, or as fla's delta rule passes them [B, T, HV, K] and [B, T, HV, V].
            g: log decays summed within each chunk [B, T, HV].
            scale, state_v_first, cu_seqlens, chunk_size, chunk_indices: as in fla.

        Returns:
            dq, dk [B, T, H, K], dw (None without w), dg [B, T, HV] in fp32.
        """
        (B, T, H, K), (HV, V) = k.shape, v.shape[2:]
        if chunk_indices is None and cu_seqlens is not None:
            chunk_indices = prepare_chunk_indices(cu_seqlens, chunk_size)
        chunks = triton.cdiv(T, chunk_size) if cu_seqlens is None else len(chunk_indices)
        tile = key_tile(K)
        key_tiles = triton.cdiv(K, tile)
        dq, dk = (x.new_empty(B, T, HV, K) for x in (q, k))
        dg = g.new_empty(key_tiles, *g.shape, dtype=torch.float32)
        dw = None if w is None else torch.empty_like(w)
        chunk_bwd_kernel_dqkwg[(key_tiles * chunks, B * HV)](
            q=q,
            k=k,
            v=v,
            g=g,
            g_gamma=g_gamma,
            h=h,
            do=do,
            dh=dh,
            dq=dq,
            dk=dk,
            dw=dw,
            dv=dv,
            dg=dg,
            cu_seqlens=cu_seqlens,
            chunk_indices=chunk_indices,
            scale=scale,
            B=B,
            T=T,
            H=H,
            HV=HV,
            K=K,
            V=V,
            BT=chunk_size,
            BK=tile,
            BV=min(max(triton.next_power_of_2(V), 16), _LARGEST_TILE),
            STATE_V_FIRST=state_v_first,
        )
        if H != HV:  # several value heads share a query head
            dq, dk = (x.view(B, T, H, HV // H, K).sum(3) for x in (dq, dk))
        return dq, dk, dw, dg.sum(0)
