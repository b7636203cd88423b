"""sharding.py alone: nothing is sharded, and asking for it is refused. Under torchrun: test_distributed.py."""

from __future__ import annotations

import weakref

import pytest
import torch

from minipeft import GPT2LMHeadModel
from minipeft.errors import HardwareError
from minipeft.training.sharding import is_sharded, reshard, shard, spread_like, whole_tensors


def test_alone_a_tensor_is_whole_and_stays_the_tensor_it_is(tiny_config):
    model = GPT2LMHeadModel(tiny_config)
    weight = model.transformer.wte.weight
    assert not is_sharded(weight)
    value = torch.randn_like(weight)
    assert spread_like(weight, value) is value
    reshard(model)
    state = whole_tensors(model.state_dict(), first=True)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_whole_tensors_are_gathered_one_by_one_and_kept_by_the_first_process_alone():
    gathered = []

    class Shard:
        def full_tensor(self):
            assert all(reference() is None for reference in gathered), "the last one is still there"
            whole = torch.ones(4)
            gathered.append(weakref.ref(whole))
            return whole

    shards = {name: Shard() for name in "abc"}
    found = whole_tensors(shards, first=True)
    assert list(found) == ["a", "b", "c"] and all(tensor.tolist() == [1] * 4 for tensor in found.values())
    assert whole_tensors(shards, first=False) == {} and len(gathered) == 6


def test_one_process_has_nothing_to_share_with(tiny_config):
    model = GPT2LMHeadModel(tiny_config)
    with pytest.raises(HardwareError, match="torchrun --nproc-per-node"):
        shard(model, processes=1)
    assert not any(map(is_sharded, model.parameters()))
