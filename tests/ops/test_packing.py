"""Packing: where each real token goes, and back."""

import pytest
import torch

from lora_nlu.ops.packing import PackedBatch

CPU = torch.device("cpu")


def plan(mask: list[list[int]]) -> PackedBatch:
    return PackedBatch.from_mask(torch.tensor(mask), len(mask), len(mask[0]), CPU)


def test_a_small_ragged_batch_packs_into_the_rows_written_here_by_hand():
    # lengths 3, 1, 2, 1: shortest first, equal lengths in the batch's order
    packed = plan([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0]])
    assert packed.slots.tolist() == [3, 9, 6, 7, 0, 1, 2]
    assert packed.groups == ((2, 1), (1, 2), (1, 3))
    assert packed.first_rows.tolist() == [0, 1, 2, 4]
    assert packed.unsort.tolist() == [3, 0, 2, 1]
    assert packed.key_mask is None


def test_a_mask_with_holes_packs_its_real_tokens_in_order():
    packed = plan([[1, 0, 1, 1], [1, 0, 0, 1]])
    assert packed.slots.tolist() == [4, 7, 0, 2, 3]
    assert packed.groups == ((1, 2), (1, 3))
    assert packed.first_rows.tolist() == [0, 2]
    assert packed.unsort.tolist() == [1, 0]


@pytest.mark.parametrize("mask", [None, torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)])
def test_without_padding_nothing_moves(mask):
    packed = PackedBatch.from_mask(mask, 2, 3, CPU)
    assert packed.slots is None and packed.unsort is None and packed.key_mask is None
    assert packed.groups == ((2, 3),)
    assert packed.first_rows.tolist() == [0, 3]
    grid = torch.arange(6.0).view(2, 3)
    assert torch.equal(packed.pack(grid), torch.arange(6.0))
    assert torch.equal(packed.unpack(packed.pack(grid)), grid)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.float32])
def test_the_mask_may_have_any_dtype(dtype):
    packed = PackedBatch.from_mask(torch.tensor([[1, 1], [1, 0]], dtype=dtype), 2, 2, CPU)
    assert packed.slots.tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    "mask",
    [
        [[0, 1, 1], [1, 1, 1]],  # padding on the left
        [[1, 1, 0], [0, 1, 0]],  # left and right in one batch
        [[1, 1, 1], [0, 0, 0]],  # a row with nothing in it
    ],
)
def test_a_masked_first_position_keeps_every_token_and_masks_the_keys(mask):
    packed = plan(mask)
    assert packed.slots is None and packed.unsort is None
    assert packed.groups == ((2, 3),)
    assert packed.first_rows.tolist() == [0, 3]
    assert packed.key_mask.shape == (2, 1, 1, 3)
    assert torch.equal(packed.key_mask[:, 0, 0], torch.tensor(mask) == 1)


@pytest.mark.parametrize(
    "mask",
    [
        [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]],
        [[1, 0, 1, 0], [1, 1, 1, 1], [1, 0, 0, 1]],
        [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]],
        [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]],
        [[1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]],
    ],
)
def test_unpack_undoes_pack_where_the_mask_is_1_and_gives_0_elsewhere(mask):
    packed = plan(mask)
    grid = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
    rows = packed.pack(grid)
    assert rows.shape == (sum(map(sum, mask)), 2)
    assert torch.equal(packed.unpack(rows), grid * torch.tensor(mask)[..., None])


@pytest.mark.parametrize("mask", [[[1, 1, 1], [1, 0, 0], [1, 1, 0]], [[1, 1, 0], [1, 0, 0], [1, 1, 1]]])
def test_first_rows_in_batch_order_are_the_first_tokens(mask):
    packed = plan(mask)
    grid = torch.arange(9.0).view(3, 3)
    first = packed.pack(grid)[packed.first_rows]
    assert packed.in_batch_order(first).tolist() == [0.0, 3.0, 6.0]


def test_groups_are_runs_of_equally_long_sequences_in_packed_order():
    packed = plan([[1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 1, 1]])
    assert packed.groups == ((2, 2), (2, 3))
    assert sum(n * length for n, length in packed.groups) == len(packed.slots)


@pytest.mark.parametrize("shape", [(2, 4), (3, 3), (3,), (2, 1, 1, 3)])
def test_a_mask_of_another_shape_is_refused_by_name_and_shape(shape):
    with pytest.raises(ValueError, match=r"attention_mask must be \[batch, seq\] = \[2, 3\], got"):
        PackedBatch.from_mask(torch.ones(shape), 2, 3, CPU)


def test_gradients_flow_to_real_tokens_only():
    packed = plan([[1, 1, 1], [1, 0, 0]])
    grid = torch.ones(2, 3, 1, requires_grad=True)
    weights = torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]])
    (packed.unpack(packed.pack(grid)) * weights).sum().backward()
    assert grid.grad[..., 0].tolist() == [[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]]


# Where distances between tokens count.


def keeping_distances(mask: list[list[int]]) -> PackedBatch:
    return PackedBatch.from_mask(torch.tensor(mask), len(mask), len(mask[0]), CPU, keep_distances=True)


@pytest.mark.parametrize(
    "mask",
    [
        [[1, 0, 1, 1], [1, 1, 1, 1]],  # a hole
        [[1, 1, 1, 1], [1, 1, 0, 1]],  # a hole in another row
        [[1, 0, 1, 0], [1, 1, 1, 0]],  # a hole before padding
        [[0, 1, 1, 1], [1, 1, 1, 1]],  # padding on the left
        [[0, 0, 0, 0], [1, 1, 1, 1]],  # a row with nothing in it
    ],
)
def test_keeping_distances_a_hole_does_not_close_up_but_masks_a_key(mask):
    packed = keeping_distances(mask)
    assert packed.slots is None and packed.unsort is None
    assert packed.groups == ((2, 4),)
    assert packed.first_rows.tolist() == [0, 4]
    assert packed.key_mask.shape == (2, 1, 1, 4)
    assert torch.equal(packed.key_mask[:, 0, 0], torch.tensor(mask) == 1)


@pytest.mark.parametrize(
    "mask",
    [
        [[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0]],  # padding on the right
        [[1, 1, 1], [1, 1, 1]],  # none
        [[1, 1, 0], [1, 1, 0]],  # a column of padding
        [[1], [1]],  # one token
    ],
)
def test_keeping_distances_padding_on_the_right_packs_as_ever(mask):
    packed, want = keeping_distances(mask), plan(mask)
    assert packed.key_mask is None and packed.groups == want.groups
    for name in ("slots", "first_rows", "unsort"):
        a, b = getattr(packed, name), getattr(want, name)
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), name


def test_a_mask_with_holes_closes_up_unless_distances_are_to_be_kept():
    mask = [[1, 0, 1, 1], [1, 0, 0, 1]]
    assert plan(mask).key_mask is None
    assert keeping_distances(mask).key_mask is not None


@pytest.mark.parametrize(
    ("mask", "keep", "lengths"),
    [
        ([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0]], False, [1, 1, 2, 3]),  # in packed order, shortest first
        ([[1, 1, 1], [1, 1, 1]], False, [3, 3]),
        ([[1, 1, 0], [1, 1, 0]], False, [2, 2]),
        ([[1, 0, 1], [1, 1, 1]], False, [2, 3]),
        ([[1, 0, 1], [1, 1, 1]], True, [3, 3]),  # every token is a row
        ([[0, 1, 1], [1, 1, 1]], False, [3, 3]),
    ],
)
def test_lengths_are_the_rows_of_each_sequence_in_packed_order(mask, keep, lengths):
    packed = PackedBatch.from_mask(torch.tensor(mask), len(mask), 3, CPU, keep)
    assert packed.lengths == lengths
    assert len(packed.pack(torch.zeros(len(mask), 3))) == sum(lengths)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    assert packed.first_rows.tolist() == starts
