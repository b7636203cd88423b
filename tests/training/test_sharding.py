"""sharding.py alone: nothing is sharded, and asking for it is refused. Under torchrun: test_distributed.py."""

from __future__ import annotations

import pytest
import torch

from minipeft import GPT2LMHeadModel
from minipeft.errors import HardwareError
from minipeft.training.sharding import is_sharded, reshard, shard, spread_like, whole, whole_state_dict


def test_alone_a_tensor_is_whole_and_stays_the_tensor_it_is(tiny_config):
    model = GPT2LMHeadModel(tiny_config)
    weight = model.transformer.wte.weight
    assert not is_sharded(weight) and whole(weight) is weight
    value = torch.randn_like(weight)
    assert spread_like(weight, value) is value
    reshard(model)
    state = whole_state_dict(model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_one_process_has_nothing_to_share_with(tiny_config):
    model = GPT2LMHeadModel(tiny_config)
    with pytest.raises(HardwareError, match="torchrun --nproc-per-node"):
        shard(model, processes=1)
    assert not any(map(is_sharded, model.parameters()))
