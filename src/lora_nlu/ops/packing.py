"""Padded batches to rows of real tokens and back.

Dim letters: B sequences, S longest of them, N real tokens, L the length shared by one group of sequences.
Packed rows are sorted by sequence length, so that sequences of equal length lie side by side and a group of them is a
view [count, L, ...] of its rows: attention needs no mask and no padding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor


def is_batched(x: Tensor) -> bool:
    """Whether vmap batches x, so that its values can't be read; torch has no public test for that."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)  # torch.func.grad's and the like
    return False


def lengths_of(mask: Tensor) -> list[int] | None:
    """The tokens of each sequence of a mask [B, S]; None for another mask than one of padding on the right.

    Reads values: a mask on a GPU is waited for.
    """
    if mask.dim() != 2 or mask.is_floating_point():
        return None
    real = mask != 0
    lengths = real.sum(1)
    is_real = torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]
    return lengths.tolist() if lengths.all() and torch.equal(real, is_real) else None


def _real_first(real: Tensor, places: Tensor) -> Tensor:
    """`places` [M], those where `real` [M] is True before the others, both in order; never waits for the GPU."""
    count = real.cumsum(0)
    rows = torch.where(real, count - 1, count[-1] + (~real).cumsum(0) - 1)  # [M]
    return torch.empty_like(places).scatter_(0, rows, places)


@dataclass(frozen=True)
class PackedBatch:
    """Where the real tokens of one padded batch are in the packed rows.

    slots:       [N] int64, place of each packed row in the flat [B * S] grid; None if every token is real and in place.
    first_rows:  [B] int64, packed row of each sequence's first token, sequences in packed (sorted) order.
    unsort:      [B] int64, packed place of each sequence of the batch; None if the order is the batch's.
    groups:      (count, length) of each run of equally long sequences, in packed order.
    key_mask:    [B, 1, 1, S] bool, True for keys that attention may see; None but in the fallback and in `padded`.
    is_padded:   True in `padded`, whose masked rows are not read; False in the fallback, where callers may.
    real:        [B, S] bool, True for tokens; of plans by `of_size` alone, which have no groups.

    Fallback: a batch keeps all of its B * S tokens as rows, in one group with a `key_mask`, where a sequence's first
    position is masked (left padding), because callers read that position, as transformers does; and where distances
    count and a mask has holes, because packing would close them.
    """

    batch: int
    length: int
    slots: Tensor | None
    first_rows: Tensor
    unsort: Tensor | None
    groups: tuple[tuple[int, int], ...]
    key_mask: Tensor | None = None
    is_padded: bool = False
    real: Tensor | None = None

    @classmethod
    def from_mask(
        cls, mask: Tensor | None, batch: int, length: int, device: torch.device, keep_distances: bool = False,
        lengths: Sequence[int] | None = None,
    ) -> "PackedBatch":  # fmt: skip
        """Plan the packing of a [B, S] batch from its attention mask ([B, S], 0 = padding; None = all real).

        With `keep_distances`, a mask with holes takes the fallback. `lengths`: what `lengths_of` gives for the mask.
        Without them, or if they are of another number of sequences (a whole batch's, for a part of it), waits for the
        GPU once, to read the mask. Raises ValueError for another shape, impossible lengths, or floats other than 0 and
        1, RuntimeError in torch.jit.trace, torch.export, vmap.
        """
        first_rows = torch.arange(batch, device=device) * length
        dense = cls(batch, length, slots=None, first_rows=first_rows, unsort=None, groups=((batch, length),))
        if mask is None:
            return dense
        if mask.shape != (batch, length):
            raise ValueError(
                f"attention_mask must be [batch, seq] = {[batch, length]}, got {list(mask.shape)}."
                + (" Masks of more dimensions, by query and key, are not supported." if mask.dim() > 2 else "")
            )
        if torch.jit.is_tracing() or torch.compiler.is_exporting() or is_batched(mask):
            raise RuntimeError(
                "attention_mask can't be traced, exported or batched by vmap: its values decide which rows are "
                "computed. Leave it out where nothing is padded, or use transformers' own class: save the model (LoRA: "
                "save the adapter and merge it by python -m lora_nlu.adapters convert ... --to merged) and load that "
                "folder there."
            )
        mask = mask.to(device)
        real = mask != 0
        counts = real.sum(1)
        if lengths is None or len(lengths) != batch:
            in_place = real[:, 0].all()
            if keep_distances:
                in_place &= (real[:, 1:] <= real[:, :-1]).all()
            values = [counts, in_place[None].long()]
            if mask.is_floating_point():
                values.append(((mask == 0) | (mask == 1)).all()[None].long())
            numbers = torch.cat(values).tolist()  # one transfer
            lengths, (packable, *is_binary) = numbers[:batch], numbers[batch:]
            if not all(is_binary):
                raise ValueError(
                    "attention_mask has values other than 0 and 1. Give 1 for a token and 0 for padding; an additive "
                    "mask, 0 for a token and -inf for padding, is not supported."
                )
            if not packable:
                return replace(dense, key_mask=real[:, None, None, :])
        elif not all(0 < n <= length for n in lengths):
            raise ValueError(f"sequence_lengths must be 1 to {length}, the columns of attention_mask, got {lengths}.")
        if all(n == length for n in lengths):
            return dense
        order = counts.argsort(stable=True)  # [B]
        starts = counts[order]
        places = (order[:, None] * length + torch.arange(length, device=device)).flatten()  # [B * S]
        slots = _real_first(real[order].flatten(), places)[: sum(lengths)]
        groups = tuple((len(list(run)), n) for n, run in groupby(sorted(lengths)))
        return cls(batch, length, slots, starts.cumsum(0) - starts, order.argsort(), groups)

    @classmethod
    def of_size(cls, mask: Tensor, rows: int) -> "PackedBatch":
        """Plan a batch, padded on the right, as this many rows: its tokens, in order, and padding to fill them up.

        mask: [B, S], 0 = padding, each sequence with a token; rows: at least its tokens, at most B * S, more than B.
        Shapes depend on no value, and nothing waits for the GPU. Attention is the masked one on the padded grid, so
        that no token sees a row of padding, and no loss reads one.
        """
        batch, length = mask.shape
        real = mask != 0
        slots = _real_first(real.flatten(), torch.arange(batch * length, device=mask.device))[:rows]
        lengths = real.sum(1)
        return cls(batch, length, slots, lengths.cumsum(0) - lengths, unsort=None, groups=(), real=real)

    def sequences(self, rows: int) -> tuple[Tensor, int]:
        """[N] int64, the sequence in packed order of each of the N rows, and their number; padding counts as one."""
        starts = self.first_rows
        if self.real is not None:
            starts = torch.cat([starts, self.real.sum()[None]])
        return torch.searchsorted(starts, torch.arange(rows, device=starts.device), right=True) - 1, len(starts)

    @property
    def lengths(self) -> list[int]:
        """Rows of each sequence, in packed order."""
        return [length for count, length in self.groups for _ in range(count)]

    @cached_property
    def row_starts(self) -> Tensor:
        """[B + 1] int64 on the CPU: first row of each sequence in packed order, then N."""
        return torch.tensor([0, *self.lengths]).cumsum(0)

    def starts(self, first_tokens: bool, views: int) -> tuple[Tensor, Tensor, Tensor]:
        """[B + 1] first query row of each sequence, then Q; [B + 1] the same of keys, then N; [B] its view.

        All int64 on the CPU, sequences in packed order. With `first_tokens` there is one query row a sequence.
        """
        queries = torch.arange(self.batch + 1) if first_tokens else self.row_starts
        # sorting by length is stable and views have equal lengths: of each group, the first part is the first view
        view_of = [i * views // count for count, _ in self.groups for i in range(count)]
        return queries, self.row_starts, torch.tensor(view_of)

    def starts_on_device(self, first_tokens: bool, views: int) -> tuple[Tensor, Tensor, Tensor]:
        """What `starts` returns as int32 on the batch's device, also of a plan by `of_size`; never waits for it."""
        if (first_tokens, views) not in self._starts_on_device:
            device, rows = self.first_rows.device, self.batch * self.length if self.slots is None else len(self.slots)
            places = torch.arange(self.batch + 1, device=device)
            end = torch.full((1,), rows, device=device) if self.real is None else self.real.sum()[None]
            keys = torch.cat([self.first_rows, end]).clamp(max=rows)  # wrong `lengths` must not lead out of the rows
            view_of = places[:-1] * views // self.batch  # in the batch's order
            if self.unsort is not None:
                view_of = torch.empty_like(view_of).scatter_(0, self.unsort, view_of)
            starts = (places if first_tokens else keys).int(), keys.int(), view_of.int()
            self._starts_on_device[first_tokens, views] = starts
        return self._starts_on_device[first_tokens, views]

    @cached_property
    def _starts_on_device(self) -> dict[tuple[bool, int], tuple[Tensor, Tensor, Tensor]]:
        return {}  # computed once for all layers

    def grouped(self, query: Tensor, key: Tensor, value: Tensor) -> Iterator[tuple[int, int, tuple[Tensor, ...]]]:
        """(count, L, (query, key, value) rows) of each group; key, value [N, ...], query [N, ...] or [B, ...]."""
        key_sizes = [n * length for n, length in self.groups]
        query_sizes = [n for n, _ in self.groups] if query.shape[0] != key.shape[0] else key_sizes
        # split, not slices: the backward of one split is one concatenation
        parts = zip(query.split(query_sizes), key.split(key_sizes), value.split(key_sizes), strict=True)
        for (n, length), rows in zip(self.groups, parts, strict=True):
            yield n, length, rows

    def pack(self, grid: Tensor) -> Tensor:
        """[B, S, ...] to [N, ...], real tokens only."""
        rows = grid.flatten(0, 1)  # [B * S, ...]
        return rows if self.slots is None else rows.index_select(0, self.slots)

    def unpack(self, rows: Tensor) -> Tensor:
        """[N, ...] back to [B, S, ...]; padding is 0. Differentiable; never waits for the GPU."""
        shape = (self.batch * self.length, *rows.shape[1:])
        grid = rows if self.slots is None else rows.new_zeros(shape).index_copy_(0, self.slots, rows)
        return grid.view(self.batch, self.length, *rows.shape[1:])

    def attends_padded(self, device: torch.device, with_probs: bool) -> bool:
        """Whether attention should be one masked call on the padded grid instead of one call a group.

        On a GPU, padding costs less than many small products; probabilities to return need it for their gradient.
        """
        if self.real is not None:
            return True
        return self.slots is not None and (with_probs or (len(self.groups) > 1 and device.type != "cpu"))

    @cached_property
    def padded(self) -> "PackedBatch":
        """The same batch with all of its B * S tokens as rows, in one group, under a key mask."""
        real = self.real
        if real is None:
            real = self.unpack(torch.ones(len(self.slots), dtype=torch.bool, device=self.slots.device))  # type: ignore
        every_place = PackedBatch.from_mask(None, self.batch, self.length, real.device)
        return replace(every_place, key_mask=real[:, None, None, :], is_padded=True)

    def to_padded(self, rows: Tensor) -> Tensor:
        """[N, H] to [B * S, H], rows of the padded grid; [B, H], one row a sequence, to the batch's order."""
        return self.unpack(rows).flatten(0, 1) if len(rows) == len(self.slots) else self.in_batch_order(rows)  # type: ignore

    def from_padded(self, rows: Tensor) -> Tensor:
        """The inverse of `to_padded`."""
        if len(rows) == self.batch * self.length:
            return rows.index_select(0, self.slots)  # type: ignore
        return rows if self.unsort is None else torch.zeros_like(rows).index_copy_(0, self.unsort, rows)

    def in_batch_order(self, sequences: Tensor) -> Tensor:
        """[B, ...], one row a sequence, from packed order to the batch's."""
        return sequences if self.unsort is None else sequences.index_select(0, self.unsort)
