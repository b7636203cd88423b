"""On a real GPU: what tests/pretended shows of places and waiting, and what only a device can show, its kernels.

Run them where there is one: pytest -m cuda. None of these has run yet on the machines that this library was made on.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import write_datasets, write_tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel

from minipeft import GPT2Config, GPT2LMHeadModel, LoraConfig, PrefixTuningConfig, inject, load_adapter, save_adapter
from minipeft.data.batches import IGNORED_LABEL, Batch
from minipeft.model.gpt2 import attention_mask_for
from minipeft.runs.finetune import finetune
from minipeft.runs.plan import Options
from minipeft.tasks.task import Task
from minipeft.training.loop import Learner, TrainingConfig, optimizer_step

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]
GPU = torch.device("cuda", 0)
FAST = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
MASKS = {"none": (None, 96, 0), "left padding": ("left", 96, 0), "after a prefix": (None, 96, 20),
         "after a prefix, right padding": ("right", 96, 20), "an odd length": ("left", 91, 0)}


@pytest.fixture
def options(tmp_path, monkeypatch):
    """options(task, **more): a tiny fine-tuning on the GPU."""
    monkeypatch.setenv("MINIPEFT_DATA", str(write_datasets(tmp_path / "data")))
    base = str(write_tiny_model(tmp_path / "base"))
    datasets = {"classification": "sst2", "tagging": "wnut_17", "summarization": "scitldr", "translation": "multi30k"}

    def make(task, **more):
        return Options(model=base, dataset=datasets[task], device="cuda", max_length=40, dropout=0.0,
                       max_new_tokens=4 if task in ("summarization", "translation") else None,
                       output=str(tmp_path / "adapter"), results_dir=str(tmp_path / "results"), overwrite=True,
                       **{"training_values": {"epochs": 2, "batch_size": 4}, **more})

    return make


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("task", ["classification", "tagging", "summarization", "translation"])
def test_lora_trains_on_every_task_in_every_precision(options, task, precision):
    losses = [point["train_loss"] for point in finetune(options(task, precision=precision))["curve"]]
    on_cpu = options(task, precision="fp32")
    on_cpu.device = "cpu"
    expected = [point["train_loss"] for point in finetune(on_cpu)["curve"]]
    assert losses == pytest.approx(expected, abs=2e-3 if precision == "fp32" else 0.1)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_waits_for_nothing(precision):
    """torch itself raises an error where the host waits for the GPU."""
    torch.manual_seed(0)
    model = inject(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=128, n_head=2)), LoraConfig()).to(GPU)
    learner = Learner(model, Task.loss_sum, TrainingConfig(), precision, False, None)
    ids, labels = torch.randint(9, 99, (2, 4, 32))
    labels[:, :9] = IGNORED_LABEL
    batch = Batch(ids, torch.ones_like(ids), labels)
    optimizer_step(learner, [batch], 1e-3)  # the first one makes the moments and loads kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sums = optimizer_step(learner, [batch], 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sums[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", MASKS)
def test_attention_has_a_fast_kernel_with_every_mask_that_the_model_makes(kind, dtype):
    """The slow kernel, which stores T x S scores, is ruled out: without a fast one this is an error."""
    padding, T, past = MASKS[kind]
    attention_mask = torch.ones(4, past + T, dtype=torch.long)
    if padding:
        attention_mask[1, slice(past, past + 30) if padding == "left" else slice(-30, None)] = 0
    mask = attention_mask_for(attention_mask, T, past, GPU)
    assert (mask is None) == (kind == "none")
    query, key, value = (torch.randn(4, 12, length, 64, device=GPU, dtype=dtype, requires_grad=True)
                         for length in (T, past + T, past + T))
    with sdpa_kernel(FAST):
        out = F.scaled_dot_product_attention(query, key, value, mask, 0.1, is_causal=mask is None)
        out.sum().backward()
    assert out.isfinite().all() and query.grad.isfinite().all()


def test_loading_an_adapter_leaves_the_gpus_random_state_as_it_was(tmp_path):
    base = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=50, n_positions=40)).to(GPU)
    save_adapter(inject(base, PrefixTuningConfig()), tmp_path / "prefix")
    bare = GPT2LMHeadModel(base.config).to(GPU)
    bare.load_state_dict({name: base.state_dict()[name] for name in bare.state_dict()})
    before = torch.cuda.get_rng_state(GPU)
    load_adapter(bare, tmp_path / "prefix")
    assert torch.equal(torch.cuda.get_rng_state(GPU), before)
