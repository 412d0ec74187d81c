"""Decoding cache of a hybrid model: keys and values, a window of them, or a state of constant size per layer.

    B = batch rows, G = key-value heads, D = head width, S = slots

Only real tokens are stored (see token_layout.py). A key sits in the slot of its count; in a sliding
window, in the slot of its count modulo the window, so that decoding overwrites the oldest key in place.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache

from .token_layout import TokenLayout


class CacheLayer:
    """What transformers asks of every layer of a cache."""

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def tensors(self) -> dict[str, torch.Tensor]:
        """The cached tensors by name, batch first."""
        raise NotImplementedError

    def replace(self, tensors: dict[str, torch.Tensor]) -> None:
        """Puts other tensors in the places of those of `tensors()`."""
        raise NotImplementedError

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.replace({})

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.replace({name: x.index_select(0, beam_idx.to(x.device)) for name, x in self.tensors().items()})

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.replace({name: x[indices.to(x.device)] for name, x in self.tensors().items()})

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.replace({name: x.repeat_interleave(repeats, 0) for name, x in self.tensors().items()})

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise ValueError("the cache of a model with recurrent states cannot be cropped")


class StateLayer(CacheLayer):
    """Recurrent and convolution states of a linear mixer."""

    def __init__(self) -> None:
        self._states: dict[str, torch.Tensor] = {}

    def tensors(self) -> dict[str, torch.Tensor]:
        return self._states

    def replace(self, tensors: dict[str, torch.Tensor]) -> None:
        self._states = tensors

    def read(self, layout: TokenLayout) -> dict[str, torch.Tensor]:
        """States before each sequence of this pass [N, ...]; empty where all start from zero."""
        if not self._states or layout.sequences is None:
            return self._states
        rows, continues = layout.sequences.rows, layout.sequences.continues
        states = {name: x.index_select(0, rows) for name, x in self._states.items()}
        return {name: x * continues.view(-1, *[1] * (x.dim() - 1)).to(x.dtype) for name, x in states.items()}

    def write(self, states: dict[str, torch.Tensor], layout: TokenLayout) -> None:
        """Keeps the states after the last sequence of each row [N, ...]; rows of padding keep theirs."""
        if layout.sequences is None:
            self._states = {name: _own_storage(x) for name, x in states.items()}
            return
        last = layout.sequences.last
        rows = layout.sequences.rows[last]
        for name, x in states.items():
            before = self._states.get(name)
            if before is None:
                before = x.new_zeros(layout.batch, *x.shape[1:])
            self._states[name] = before.index_copy(0, rows, x[last])


class KeyValueLayer(CacheLayer):
    """Keys and values of full attention, in a buffer that grows by a quarter, so appending is cheap on average."""

    window: int | None = None

    def __init__(self, max_length: int | None = None) -> None:
        self.keys: torch.Tensor | None = None  # [B, G, S, D]
        self.values: torch.Tensor | None = None
        self.max_length = max_length

    def tensors(self) -> dict[str, torch.Tensor]:
        return {} if self.keys is None else {"keys": self.keys, "values": self.values}

    def replace(self, tensors: dict[str, torch.Tensor]) -> None:
        self.keys, self.values = tensors.get("keys"), tensors.get("values")

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layout: TokenLayout
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Stores this pass's keys and values [B, G, T, D] and returns all that its queries may see.

        Returns:
            Keys and values [B, G, S, D], and the count of each key [B or 1, S], or None where the layout
            is dense: then the last T keys are the queries' own.
        """
        first_pass = self.keys is None
        self._write(keys, values, layout)
        if first_pass:
            return keys, values, None if layout.dense else layout.key_counts()
        end = layout.start + layout.length
        counts = None if layout.dense else torch.arange(end, device=keys.device).unsqueeze(0)
        return self.keys[:, :, :end], self.values[:, :, :end], counts

    def _write(self, keys: torch.Tensor, values: torch.Tensor, layout: TokenLayout) -> None:
        self._reserve(layout.start + layout.length, keys, values)
        if layout.aligned:
            self._put((slice(None), slice(None), slice(layout.start, layout.start + layout.length)), keys, values)
        else:
            self._write_rows(keys, values, layout)

    def _write_rows(self, keys: torch.Tensor, values: torch.Tensor, layout: TokenLayout) -> None:
        """Each row's real tokens go to that row's own slots."""
        rows, columns, slots = layout.places_in_cache(self.window)
        self._put((rows, slice(None), slots), keys[rows, :, columns], values[rows, :, columns])

    def _put(self, where: tuple, keys: torch.Tensor, values: torch.Tensor) -> None:
        if torch.is_grad_enabled() and keys.requires_grad:
            # Earlier passes saved the buffers for backward, so they must not change.
            self.keys, self.values = self.keys.clone(), self.values.clone()
        self.keys[where] = keys
        self.values[where] = values

    def _reserve(self, needed: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Makes room for `needed` tokens, as far as the window or the known maximum length allows."""
        held = 0 if self.keys is None else self.keys.shape[2]
        needed = needed if self.window is None else min(needed, self.window)
        if held >= needed:
            return
        slots = self._room(needed)
        grown = []
        for new, old in ((keys, self.keys), (values, self.values)):
            # Zeros, not empty: a masked slot has weight 0, and 0 times garbage may be NaN.
            buffer = new.new_zeros(new.shape[0], new.shape[1], slots, new.shape[3])
            if old is not None:
                buffer[:, :, :held] = old
            grown.append(buffer)
        self.keys, self.values = grown

    def _room(self, needed: int) -> int:
        """Slots to allocate for `needed` tokens and some more."""
        slots = needed + needed // 4 + 64
        return slots if self.max_length is None else max(needed, min(slots, self.max_length))


class SlidingWindowLayer(KeyValueLayer):
    """The last `window` keys and values of each row, in a ring."""

    is_sliding = True

    def __init__(self, window: int, max_length: int | None = None) -> None:
        super().__init__(max_length)
        self.window = window

    def get_max_length(self) -> int:
        return self.window

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layout: TokenLayout
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """As for full attention, but the keys returned are no more than the window needs.

        Where the layout is dense and T = 1 they are in no order, and the query sees all of them.
        """
        if self.keys is None:
            self._write(keys, values, layout)
            return keys, values, None if layout.dense else layout.key_counts()
        if layout.length == 1:
            self._write(keys, values, layout)
            held = min(layout.start + 1, self.window)
            counts = None if layout.dense else self._ring_counts(layout.lengths_after(), held)
            return self.keys[:, :, :held], self.values[:, :, :held], counts
        if layout.dense:
            slots = torch.arange(max(0, layout.start - self.window + 1), layout.start, device=keys.device) % self.window
            seen = [torch.cat([old[:, :, slots], new], 2) for old, new in ((self.keys, keys), (self.values, values))]
            counts = None
        else:
            held = min(layout.start, self.window)
            seen = [torch.cat([old[:, :, :held], new], 2) for old, new in ((self.keys, keys), (self.values, values))]
            counts = torch.cat([self._ring_counts(layout.lengths_before(), held), layout.key_counts()], 1)
        self._write(keys, values, layout)
        return *seen, counts

    def _write(self, keys: torch.Tensor, values: torch.Tensor, layout: TokenLayout) -> None:
        end = layout.start + layout.length
        self._reserve(end, keys, values)
        if not layout.aligned:
            self._write_rows(keys, values, layout)
            return
        kept = min(layout.length, self.window)
        first = (end - kept) % self.window
        if first + kept <= self.window:
            slots = slice(first, first + kept)
        else:
            slots = torch.arange(end - kept, end, device=keys.device) % self.window
        self._put((slice(None), slice(None), slots), keys[:, :, -kept:], values[:, :, -kept:])

    def _ring_counts(self, lengths: torch.Tensor, held: int) -> torch.Tensor:
        """Count of the key in each ring slot [B, held] of rows with these many tokens; negative where it is empty."""
        newest = lengths[:, None] - 1
        slots = torch.arange(held, device=lengths.device)
        return newest - (newest - slots) % self.window

    def _room(self, needed: int) -> int:
        """The whole ring at once where the length is known: a pass may then read any slot, as timing runs do, which
        go on behind a context that never ran. Where it is not, a short text need not pay for a long window."""
        if self.max_length is None:
            return min(super()._room(needed), self.window)
        return max(needed, min(self.max_length, self.window))


class HybridCache(Cache):
    """Cache for `generate` and for chunked prefill, for a model with any mix of layers.

    Args:
        config: of the model.
        max_length: tokens that it will hold at most, if known. Full-attention buffers then never grow past it, and
            those of windows never grow.
    """

    def __init__(self, config: Any, max_length: int | None = None) -> None:
        layers = []
        for layer, kind in enumerate(config.layer_types):
            if kind == "attn":
                layers.append(KeyValueLayer(max_length))
            elif kind == "swa":
                layers.append(SlidingWindowLayer(config.window(layer), max_length))
            else:
                layers.append(StateLayer())
        super().__init__(layers=layers)
        self.seen = 0  # tokens of each row, padding included, as `generate` counts
        self.lengths: torch.Tensor | None = None  # real tokens of each row [B], None while all rows have `seen`
        self.last: torch.Tensor | None = None  # final output of each row's last real token [B, hidden]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen by each row, padding included."""
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no maximum."""
        return -1

    def advance(self, layout: TokenLayout, output: torch.Tensor) -> torch.Tensor:
        """Counts the tokens of a finished pass.

        Returns:
            The final norm's output [B, T, hidden] with that of the last real token at padding, be it of this pass or
            of an earlier one.
        """
        if not layout.aligned:
            self.lengths = layout.lengths_after()
        self.seen += layout.length
        output = layout.on(output.device).repeat_last_real(output, self.last)
        self.last = _own_storage(output[:, -1])
        return output

    def num_bytes(self) -> int:
        """Bytes of the layers' tensors, spare room in growing buffers included."""
        return sum(x.numel() * x.element_size() for layer in self.layers for x in layer.tensors().values())

    def reset(self) -> None:
        super().reset()
        self.seen, self.lengths, self.last = 0, None, None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._each_row(lambda x: x[beam_idx.to(x.device)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._each_row(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._each_row(lambda x: x.repeat_interleave(repeats, 0))

    def _each_row(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Changes the rows of what is kept beside the layers."""
        self.lengths, self.last = (None if x is None else change(x) for x in (self.lengths, self.last))


def _own_storage(x: torch.Tensor) -> torch.Tensor:
    """A copy where `x` is a small view that would keep a whole prompt's activations alive."""
    return x.clone() if x.untyped_storage().nbytes() > x.numel() * x.element_size() else x
