"""Which tokens of a batch are real, which sequence each belongs to, and where it goes in the cache.

Worked out once per forward pass and shared by all layers.

    B = batch rows, T = tokens per row in this pass, S = keys, N = sequences, M = real tokens in all rows

A row's *real* tokens are those that the attention mask keeps. A token's *count* is the number of real
tokens of its row before it, cached ones included. Caches hold real tokens only, so padding at either
end, or in the middle, changes nothing. Several documents packed in a row are told apart by their
position ids: a new one starts wherever they do not go up by one, or, over padding, by its width.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch


@dataclass(frozen=True)
class Sequences:
    """The real tokens of a batch as one packed row, for layers that carry a state.

    indices: place of each real token in the flattened [B * T] batch [M].
    cu_seqlens: boundaries of the sequences among the M tokens [N + 1].
    rows: batch row of each sequence [N].
    continues: whether the sequence goes on from the row's cached state [N].
    last: the last sequence of each row that has one [at most B].
    """

    indices: torch.Tensor
    cu_seqlens: torch.Tensor
    rows: torch.Tensor
    continues: torch.Tensor
    last: torch.Tensor


@dataclass
class TokenLayout:
    """Tokens of one forward pass.

    start: real tokens already cached in each row; the bound on them where rows differ.
    starts: the same per row [B], or None where all rows agree.
    valid: real tokens [B, T] bool, or None where all are real.
    positions: for the rotary embedding [B or 1, T].
    document: count of the first token of each token's document [B, T], or None where each row is one document.
    """

    batch: int
    length: int
    start: int
    starts: torch.Tensor | None
    valid: torch.Tensor | None
    positions: torch.Tensor
    document: torch.Tensor | None = None
    _masks: dict = field(default_factory=dict)
    _elsewhere: dict = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        shape: tuple[int, int],
        device: torch.device,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        start: int = 0,
        starts: torch.Tensor | None = None,
    ) -> "TokenLayout":
        """Reads the layout off a model's inputs.

        Args:
            shape: (B, T) of this pass.
            device: where the model's inputs are.
            attention_mask: [B, at least T]; the last T columns belong to this pass, 0 means padding.
            position_ids: [B or 1, T]; by default the counts.
            start, starts: as the fields.

        Raises:
            ValueError: the mask is not two-dimensional or does not fit the tokens.
        """
        batch, length = shape
        valid = _real_tokens(attention_mask, batch, length)
        layout = cls(batch, length, start, starts, valid, position_ids)
        if position_ids is None:
            aligned = torch.arange(start, start + length, device=device).unsqueeze(0)
            layout.positions = aligned if layout.aligned else layout.counts(device).clamp(min=0)
        else:
            layout.document = layout._find_documents(position_ids.expand(batch, length))
        return layout

    def on(self, device: torch.device) -> "TokenLayout":
        """The same layout with its tensors on another device, for models that are spread over several."""
        if self.positions.device == device:
            return self
        if device not in self._elsewhere:
            tensors = (self.starts, self.valid, self.positions, self.document)
            moved = (None if x is None else x.to(device) for x in tensors)
            self._elsewhere[device] = TokenLayout(self.batch, self.length, self.start, *moved)
        return self._elsewhere[device]

    @property
    def aligned(self) -> bool:
        """All rows hold equally many real tokens and no padding, so cache writes are plain slices."""
        return self.starts is None and self.valid is None

    @property
    def dense(self) -> bool:
        """One document per row, all rows alike: no mask beyond causality."""
        return self.aligned and self.document is None

    def counts(self, device: torch.device | None = None) -> torch.Tensor:
        """Count of each token [B, T]; a padding token has that of the last real one before it."""
        starts = self.lengths_before(device)
        if self.valid is None:
            steps = torch.arange(self.length, device=starts.device).expand(self.batch, -1)
        else:
            steps = self.valid.long().cumsum(1) - 1
        return starts[:, None] + steps

    def key_counts(self) -> torch.Tensor:
        """Count of each token as a key [B, T], -1 for padding."""
        counts = self.counts()
        return counts if self.valid is None else counts.masked_fill(~self.valid, -1)

    def lengths_before(self, device: torch.device | None = None) -> torch.Tensor:
        """Real tokens of each row in the cache before this pass [B]."""
        if self.starts is not None:
            return self.starts
        return torch.full((self.batch,), self.start, device=device or self.positions.device)

    def lengths_after(self) -> torch.Tensor:
        """Real tokens of each row after this pass [B]."""
        return self.counts()[:, -1] + 1

    def visible(self, key_counts: torch.Tensor, window: int | None) -> torch.Tensor:
        """Attention mask, True where a query sees a key [B, 1, T, S].

        A padding query sees every key: its output is thrown away, but has to be finite.

        Args:
            key_counts: count of each key [B or 1, S], negative where there is none.
            window: tokens that a query sees, or None.
        """
        shared = key_counts.shape[1], window  # layers alike in both see the same keys, so they share the mask
        if shared not in self._masks:
            query, key = self.counts()[:, :, None], key_counts[:, None, :]
            seen = (key <= query) & (key >= (0 if self.document is None else self.document[:, :, None]))
            if window is not None:
                seen &= key > query - window
            if self.valid is not None:
                seen |= ~self.valid[:, :, None]
            self._masks[shared] = seen[:, None]
        return self._masks[shared]

    def places_in_cache(self, window: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Row, column and cache slot of each token to keep, for rows that differ."""
        counts = self.counts()
        keep = torch.ones_like(counts, dtype=torch.bool) if self.valid is None else self.valid
        if window is not None:
            keep = keep & (counts >= self.lengths_after()[:, None] - window)
        rows, columns = keep.nonzero(as_tuple=True)
        slots = counts[rows, columns]
        return rows, columns, slots if window is None else slots % window

    @cached_property
    def sequences(self) -> Sequences | None:
        """The packed form, or None where the batch is dense."""
        if self.valid is None and self.document is None:
            return None
        counts = self.counts()
        real = torch.ones_like(counts, dtype=torch.bool) if self.valid is None else self.valid
        document = torch.zeros_like(counts) if self.document is None else self.document
        indices = real.flatten().nonzero().squeeze(1)  # [M]
        begins = ((counts == document) | (counts == self.lengths_before()[:, None])).flatten()[indices]
        first = begins.nonzero().squeeze(1)  # [N]
        rows = indices[first] // self.length
        ends_row = torch.ones_like(rows, dtype=torch.bool)
        ends_row[:-1] = rows[1:] != rows[:-1]
        return Sequences(
            indices=indices,
            cu_seqlens=torch.cat([first, first.new_tensor([len(indices)])]),
            rows=rows,
            continues=(document < counts).flatten()[indices[first]],
            last=ends_row.nonzero().squeeze(1),
        )

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [1, M, D], the real tokens only; unchanged where the batch is dense."""
        if self.sequences is None:
            return x
        return x.flatten(0, 1).index_select(0, self.sequences.indices).unsqueeze(0)

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """The reverse of `pack`; padding gets zeros."""
        if self.sequences is None:
            return x
        flat = x.new_zeros(self.batch * self.length, x.shape[-1]).index_copy(0, self.sequences.indices, x[0])
        return flat.view(self.batch, self.length, -1)

    def repeat_last_real(self, x: torch.Tensor, earlier: torch.Tensor | None = None) -> torch.Tensor:
        """Gives padding the value of the last real token before it in its row.

        Args:
            x: [B, T, D].
            earlier: the last column that the pass before was given [B, D]; None: there was none. Padding that has no
                real token before it keeps its own value, or gets this one.
        """
        if self.valid is None:
            return x
        rows = torch.arange(self.batch, device=x.device)[:, None]
        latest, has_one = self._latest_real()
        own = torch.arange(self.length, device=x.device)
        repeated = x[rows, torch.where(has_one, latest, own)]
        return repeated if earlier is None else torch.where(has_one[..., None], repeated, earlier[:, None])

    def _latest_real(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Column of the last real token up to each token [B, T], and whether there is one."""
        columns = torch.arange(self.length, device=self.valid.device).expand_as(self.valid)
        latest = columns.masked_fill(~self.valid, -1).cummax(1).values
        return latest.clamp(min=0), latest >= 0

    def _find_documents(self, positions: torch.Tensor) -> torch.Tensor | None:
        """Count of the first token of each token's document, from where position ids break off."""
        counts = self.counts()
        columns = torch.arange(self.length, device=positions.device).expand_as(positions)
        if self.valid is None:
            latest, has_before = columns, torch.ones_like(columns, dtype=torch.bool)
        else:
            latest, has_before = self._latest_real()
        step = positions[:, 1:] - positions.gather(1, latest)[:, :-1]  # from the last real token to this one
        # Inside a document they count real tokens, or columns: then padding in the middle makes a wider step.
        goes_on = (step == 1) | (step == columns[:, 1:] - latest[:, :-1])
        breaks = torch.zeros_like(has_before)
        breaks[:, 1:] = has_before[:, :-1] & ~goes_on
        if self.valid is not None:
            breaks &= self.valid
        offset = positions - counts
        began = counts.masked_fill(~breaks, -1).cummax(1).values
        # A document that began in an earlier pass did so as many tokens ago as its positions say.
        earlier = (-offset).clamp(min=0)
        earlier = torch.where(self.lengths_before()[:, None] > 0, earlier, 0)
        document = torch.where(began >= 0, began, earlier)
        if self.valid is not None:
            document = document.masked_fill(~self.valid, 0)
        return document if bool(document.any()) else None


def _real_tokens(attention_mask: torch.Tensor | None, batch: int, length: int) -> torch.Tensor | None:
    """The last `length` columns of the mask as booleans, None where they are all real."""
    if attention_mask is None:
        return None
    shape = tuple(attention_mask.shape)
    if len(shape) != 2 or shape[0] != batch or shape[1] < length:
        raise ValueError(f"attention_mask has shape {shape}, expected [{batch}, at least {length}] with 0 for padding")
    valid = attention_mask[:, -length:] != 0
    return None if bool(valid.all()) else valid
