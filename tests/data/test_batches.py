"""batches.py: nothing is lost or seen twice, little is padded, and an order is known from its seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipeft.data.batches import IGNORED_LABEL, BucketedBatches, collate, in_order_of_length, rounded
from minipeft.errors import DataError


def ids_of(lengths):
    """One array of token ids per length; the first token is the example's number, so that it can be recognised."""
    return [np.full(length, number, dtype=np.int32) for number, length in enumerate(lengths)]


def test_collating_pads_on_the_right_to_the_longest():
    batch = collate([np.array([5, 6, 7]), np.array([8]), np.array([0, 9])], [1, 0, 1])
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 0, 0], [0, 9, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert batch.labels.tolist() == [1, 0, 1]
    assert {batch.input_ids.dtype, batch.attention_mask.dtype, batch.labels.dtype} == {torch.int64}


@pytest.mark.parametrize(("ids", "labels", "message"), [
    ([[1, 2], [3]], [0], "2 texts have 1 labels"), ([[1, 2]], [0, 1], "1 texts have 2 labels"),
    ([[1, 2], []], [0, 1], "text 1, counted from 0, has no token")])
def test_texts_and_labels_that_do_not_go_together_are_refused(ids, labels, message):
    with pytest.raises(DataError, match=message):
        BucketedBatches(ids, labels, batch_size=2)


LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=60)


@given(lengths=LENGTHS, batch_size=st.integers(1, 9), seed=st.integers(0, 50), pool=st.integers(1, 5))
def test_an_epoch_holds_every_example_once_in_full_batches_but_for_one(lengths, batch_size, seed, pool):
    batches = BucketedBatches(ids_of(lengths), list(range(len(lengths))), batch_size, seed, pool)
    seen = list(batches.epoch(0))
    assert len(seen) == len(batches)
    assert sorted(label for batch in seen for label in batch.labels.tolist()) == list(range(len(lengths)))
    assert sum(len(batch.labels) != batch_size for batch in seen) <= 1
    for batch in seen:
        assert batch.input_ids[:, 0].tolist() == batch.labels.tolist()
        assert batch.attention_mask.sum(dim=1).tolist() == [lengths[label] for label in batch.labels]


def test_an_epochs_order_depends_on_the_seed_and_its_number_alone():
    lengths = np.random.default_rng(0).integers(1, 40, size=200)

    def order(seed, epoch):
        batches = BucketedBatches(ids_of(lengths), list(range(200)), 8, seed, pool=5)
        return [batch.labels.tolist() for batch in batches.epoch(epoch)]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    used = BucketedBatches(ids_of(lengths), list(range(200)), 8, 0, pool=5)
    list(used.epoch(0))
    assert [batch.labels.tolist() for batch in used.epoch(1)] == order(0, 1), "an earlier epoch changed a later one"


@given(lengths=LENGTHS, batch_size=st.integers(1, 9), first=st.integers(0, 70))
def test_an_epoch_can_be_entered_at_any_batch(lengths, batch_size, first):
    batches = BucketedBatches(ids_of(lengths), list(range(len(lengths))), batch_size)
    whole = [batch.labels.tolist() for batch in batches.epoch(3)]
    assert [batch.labels.tolist() for batch in batches.epoch(3, first=first)] == whole[first:]


def test_bucketing_saves_most_of_the_padding():
    lengths = np.random.default_rng(0).integers(1, 300, size=2000)

    def padding_share(batches):
        masks = [batch.attention_mask for batch in batches]
        return 1 - sum(mask.sum().item() for mask in masks) / sum(mask.numel() for mask in masks)

    ids = ids_of(lengths)
    unbucketed = padding_share(collate(ids[i:i + 16], [0] * 16) for i in range(0, 2000, 16))
    assert unbucketed > 0.4
    assert padding_share(BucketedBatches(ids, [0] * 2000, 16).epoch(0)) < 0.08


def test_the_batches_of_an_epoch_do_not_come_in_order_of_length():
    batches = BucketedBatches(ids_of(range(1, 401)), [0] * 400, 8)
    widths = [batch.input_ids.shape[1] for batch in batches.epoch(0)]
    assert widths != sorted(widths) and widths != sorted(widths, reverse=True)


@given(lengths=LENGTHS, batch_size=st.integers(1, 9))
def test_evaluation_sees_every_example_once_longest_first_and_with_its_number(lengths, batch_size):
    seen = []
    for numbers, batch in in_order_of_length(ids_of(lengths), list(range(len(lengths))), batch_size):
        assert len(numbers) <= batch_size
        assert batch.labels.tolist() == list(numbers) == batch.input_ids[:, 0].tolist()
        seen += [lengths[number] for number in numbers]
        assert batch.input_ids.shape[1] == lengths[numbers[0]]
    assert seen == sorted(lengths, reverse=True)


def test_a_batch_moves_to_a_device_but_for_the_mask_which_the_cpu_looks_at():
    moved = collate([np.array([1, 2])], [1]).to(torch.device("meta"))
    assert {moved.input_ids.device.type, moved.labels.device.type} == {"meta"}
    assert moved.attention_mask.device.type == "cpu"


def test_long_lengths_are_rounded_up_and_nothing_else_changes():
    assert [rounded(length) for length in (1, 97, 128, 129, 160, 161, 383)] == [1, 97, 128, 160, 160, 192, 384]
    batches = BucketedBatches(ids_of([130, 200]), [0, 1], batch_size=1)
    seen = {batch.labels.item(): batch for batch in batches.epoch(0)}
    assert seen[0].input_ids.shape == seen[0].attention_mask.shape == (1, 160)
    assert seen[0].attention_mask.sum() == 130
    assert seen[1].input_ids.shape == (1, 200)  # no longer than the longest: the model may have no room for more


def test_labels_of_tokens_are_padded_with_what_does_not_count():
    batch = collate([np.array([5, 6, 7]), np.array([8])], [np.array([IGNORED_LABEL, 2, 3]), np.array([4])])
    assert batch.labels.tolist() == [[IGNORED_LABEL, 2, 3], [4, IGNORED_LABEL, IGNORED_LABEL]]
    assert batch.targets.tolist() == [2, 3, 4]
    assert batch.arguments()["positions"].tolist() == [1, 2, 3] and batch.targets_of_rows == [2, 1]
    one_each = collate([np.array([5, 6]), np.array([8])], [1, 0])
    assert one_each.targets.tolist() == [1, 0] and "positions" not in one_each.arguments()
    assert one_each.targets_of_rows == [1, 1]


@pytest.mark.kind("8: what follows from a batch's values is found before it travels")
def test_a_batch_on_its_device_need_not_be_looked_at():
    """On the meta device nothing has a value: whoever asks for one there gets an error."""
    batch = collate([np.array([5, 6, 7]), np.array([8])], [np.array([IGNORED_LABEL, 2, 3]), np.array([4])])
    there = batch.to(torch.device("meta"))
    with pytest.raises(RuntimeError):
        there.labels.tolist()
    assert there.positions.shape == there.targets.shape == (3,) and there.targets.device.type == "meta"
    assert there.targets_of_rows == [2, 1] and there.attention_mask.tolist() == batch.attention_mask.tolist()


@pytest.mark.parametrize(("rows", "length", "tokens", "expected"), [
    (16, 256, None, [16]), (16, 256, 4096, [16]), (16, 256, 4095, [8, 8]), (16, 256, 1365, [4, 4, 4, 4]),
    (10, 100, 300, [3, 3, 2, 2]), (3, 500, 100, [1, 1, 1])])
def test_a_batch_is_cut_into_micro_batches_of_at_most_so_many_tokens_or_single_rows(rows, length, tokens, expected):
    ids = [np.full(length, number) for number in range(rows)]
    batch = collate(ids, list(range(rows)))
    micro_batches = batch.micro_batches(tokens)
    assert [len(part.labels) for part in micro_batches] == expected
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(torch.cat([getattr(part, name) for part in micro_batches]), getattr(batch, name))
