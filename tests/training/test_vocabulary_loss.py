"""The loss in pieces is the whole loss: its number, its gradients, its hits; with whatever stands in the head's place,
in every number format, compiled, and in several processes. And the logits are never whole."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
import torch.distributed as distributed
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from minipeft import BitFitConfig, FullConfig, GPT2LMHeadModel, LoraConfig, PrefixTuningConfig, inject
from minipeft.data.batches import IGNORED_LABEL, Batch
from minipeft.methods.lora import LoRALinear
from minipeft.tasks.task import Task
from minipeft.training import vocabulary_loss
from minipeft.training.loop import Learner, TrainingConfig, optimizer_step
from minipeft.training.vocabulary_loss import loss_and_hits, losses_and_hits, pieces, reading_logits

VOCAB, C, N = 97, 16, 23
METHODS = {"full": FullConfig(), "bitfit": BitFitConfig(), "prefix": PrefixTuningConfig(num_virtual_tokens=3),
           "lora": LoraConfig(r=4, target_modules=["c_attn"])}


@pytest.fixture(autouse=True)
def pieces_of_four_tokens(monkeypatch):
    monkeypatch.setattr(vocabulary_loss, "NUMBERS_PER_PIECE", {"cpu": 4 * VOCAB})


@pytest.fixture
def case():
    """A head, hidden states and targets, some of them ignored."""
    torch.manual_seed(0)
    targets = torch.randint(VOCAB, (N,))
    targets[::7] = IGNORED_LABEL
    return nn.Linear(C, VOCAB), torch.randn(N, C, requires_grad=True), targets


class Rows:
    """Notes how many tokens a head is called for at a time."""

    def __init__(self, head):
        self.seen = []
        head.register_forward_hook(lambda _, args, output: self.seen.append(output.numel() // output.shape[-1]))


def whole(head, hidden, targets, loss_sum=Task.loss_sum):
    logits = head(hidden)
    return loss_sum(logits, targets), (logits.argmax(dim=1) == targets).sum()


def gradients(loss, tensors, factor=None):
    return torch.autograd.grad(loss, tensors, factor, allow_unused=True)


# --- the function -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("trained", [(), ("weight",), ("bias",), ("weight", "bias")], ids=str)
@pytest.mark.parametrize("hidden_is_learned", [True, False])
def test_loss_hits_and_gradients_are_those_of_the_whole_logits(case, trained, hidden_is_learned):
    head, hidden, targets = case
    for name, parameter in head.named_parameters():
        parameter.requires_grad_(name in trained)
    hidden.requires_grad_(hidden_is_learned)
    expected, expected_hits = whole(head, hidden, targets)
    rows = Rows(head)
    found, hits = loss_and_hits(head, hidden, targets, Task.loss_sum)
    assert rows.seen == [4, 4, 4, 4, 4, 3]
    torch.testing.assert_close(found, expected, atol=0, rtol=1e-6)
    assert hits == expected_hits
    learned = [tensor for tensor in (hidden, *head.parameters()) if tensor.requires_grad]
    assert found.requires_grad == bool(learned) and not hits.requires_grad
    if learned:
        for ours, theirs in zip(gradients(3 * found, learned), gradients(3 * expected, learned)):
            torch.testing.assert_close(ours, theirs, atol=3e-6, rtol=1e-6)


def test_the_gradient_is_that_of_finite_differences():
    torch.manual_seed(0)
    head, hidden = nn.Linear(3, 200).double(), torch.randn(5, 3, dtype=torch.double, requires_grad=True)
    targets = torch.randint(200, (5,))

    def loss(hidden, weight, bias):
        return loss_and_hits(head, hidden, targets, lambda *given: F.cross_entropy(*given, reduction="sum"))[0]

    assert len(pieces(head, hidden, targets)) == 3
    assert torch.autograd.gradcheck(loss, (hidden, head.weight, head.bias))


def test_a_loss_with_class_weights_is_right_in_pieces(case):
    head, hidden, targets = case
    weights = torch.rand(VOCAB)

    def weighted(logits, targets):
        return Task.loss_sum(logits, targets, weights)

    (expected, _), (found, _) = whole(head, hidden, targets, weighted), loss_and_hits(head, hidden, targets, weighted)
    torch.testing.assert_close(found, expected, atol=0, rtol=1e-6)
    torch.testing.assert_close(*(gradients(loss, [hidden])[0] for loss in (found, expected)), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("factor", [1.0, 0.01, 1024.0])
@pytest.mark.parametrize("gradient", [1.0, 0.01, 1024.0])
def test_a_backward_pass_that_begins_with_another_number_than_expected_is_right_as_well(case, factor, gradient):
    head, hidden, targets = case
    found, _ = loss_and_hits(head, hidden, targets, Task.loss_sum, torch.tensor(factor))
    expected, _ = whole(head, hidden, targets)
    ours, theirs = (gradients(loss, [hidden], torch.tensor(gradient))[0] for loss in (found, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-6 * gradient, rtol=1e-5)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_under_autocast_gradients_are_those_of_the_whole_logits(case, precision):
    head, hidden, targets = case
    with torch.autocast("cpu", precision):
        expected, expected_hits = whole(head, hidden, targets)
        found, hits = loss_and_hits(head, hidden, targets, Task.loss_sum)
    assert found.dtype == torch.float32 and hits == expected_hits
    torch.testing.assert_close(found, expected, atol=0, rtol=1e-6)
    learned = [hidden, *head.parameters()]
    for ours, theirs in zip(gradients(found, learned), gradients(expected, learned)):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)


def test_float16_gradients_that_would_be_rounded_to_zero_are_kept_by_the_factor():
    """A token that is almost certain: the others' probabilities are 1e-9, and float16's smallest number is 6e-8."""
    head, hidden = nn.Linear(VOCAB, VOCAB, bias=False), torch.zeros(N, VOCAB)
    nn.init.eye_(head.weight)
    hidden[:, 0] = 20.7
    hidden.requires_grad_()
    kept = {}
    for factor in (1.0, 1024.0):
        with torch.autocast("cpu", torch.float16):
            loss, _ = loss_and_hits(head, hidden, torch.zeros(N, dtype=torch.long), Task.loss_sum, torch.tensor(factor))
        kept[factor] = gradients(loss, [hidden], torch.tensor(factor))[0][:, 1:].abs().max().item() / factor
    assert kept[1.0] == 0 and kept[1024.0] == pytest.approx(1e-9, rel=0.1)


def test_a_second_derivative_is_refused(case):
    head, hidden, targets = case
    loss, _ = loss_and_hits(head, hidden, targets, Task.loss_sum)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, [hidden], create_graph=True)


def test_a_trained_parameter_that_the_head_does_not_use_gets_no_gradient(case):
    head, hidden, targets = case
    head.unused = nn.Parameter(torch.ones(2))
    loss, _ = loss_and_hits(head, hidden, targets, Task.loss_sum)
    loss.backward()
    assert head.unused.grad is None and head.weight.grad is not None


def test_few_logits_or_a_head_of_unknown_width_are_one_piece_and_no_token_is_a_loss_of_zero(case):
    head, hidden, targets = case
    rows = Rows(head)
    loss_and_hits(head, hidden[:4], targets[:4], Task.loss_sum)
    loss_and_hits(nn.Sequential(head), hidden, targets, Task.loss_sum)
    loss, hits = loss_and_hits(head, hidden[:0], targets[:0], Task.loss_sum)
    assert rows.seen == [4, N, 0] and loss == hits == 0
    assert torch.equal(gradients(loss, [hidden])[0], torch.zeros(N, C))
    assert [len(part) for part, _ in pieces(nn.Linear(C, 9 * VOCAB), hidden, targets)] == [1] * N


def test_without_gradients_there_is_a_number_for_each_token(case):
    head, hidden, targets = case
    logits = head(hidden).detach()
    rows = Rows(head)
    losses, hits = losses_and_hits(head, hidden, targets)
    torch.testing.assert_close(losses, F.cross_entropy(logits, targets, reduction="none"), atol=0, rtol=1e-6)
    assert torch.equal(hits, logits.argmax(dim=1) == targets) and not losses.requires_grad
    with torch.no_grad():
        loss, right = loss_and_hits(head, hidden, targets, Task.loss_sum)
    torch.testing.assert_close(loss, losses.sum(), atol=0, rtol=1e-6)
    assert right == hits.sum() and max(rows.seen) == 4


# --- in the loop ------------------------------------------------------------------------------------------------------

@pytest.fixture
def batch(make_ids):
    ids = make_ids(3, 11)
    labels = ids.roll(-1, dims=1)
    labels[:, :2] = IGNORED_LABEL
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    labels[1, 7:] = IGNORED_LABEL
    return Batch(ids, mask, labels)


@pytest.fixture
def step(make_model, batch):
    """step(method, in_pieces, ...): what an optimizer step on two batches returns, and the gradients it found."""
    bare = make_model(GPT2LMHeadModel)

    def take(method, in_pieces, precision=torch.float32, tokens_per_micro_batch=None, compile_model=False,
             wrap=lambda model: model):
        torch.manual_seed(0)
        model = copy.deepcopy(bare)
        if method == "lora on the head":
            model.requires_grad_(False).lm_head = LoRALinear(model.lm_head, 4, 8, LoraConfig())
            nn.init.normal_(model.lm_head.lora_B.weight, std=0.1)
        else:
            inject(model, METHODS[method])
        learner = Learner(model.train(), Task.loss_sum, TrainingConfig(max_grad_norm=1e9), precision, compile_model,
                          tokens_per_micro_batch)
        learner.synchronized = learner.forward = wrap(learner.forward)
        if not in_pieces:
            learner.forward = reading_logits(model)
        learner.optimizer.zero_grad = lambda set_to_none: None
        rows = Rows(model.lm_head)
        sums = torch.stack(optimizer_step(learner, [batch, batch], rate=0.0)).sum(dim=0)
        assert (max(rows.seen) <= 4) == in_pieces
        return sums, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    return take


def assert_the_same(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found[0], expected[0], atol=0, rtol=max(tolerance, 1e-5))
    largest = max(grad.abs().max().item() for grad in expected[1].values())
    for name, grad in expected[1].items():
        torch.testing.assert_close(found[1][name], grad, atol=tolerance * largest, rtol=tolerance, msg=name)


@pytest.mark.parametrize("method", [*METHODS, "lora on the head"])
@pytest.mark.parametrize("tokens_per_micro_batch", [None, 15])
def test_every_methods_gradients_are_those_of_whole_logits(step, method, tokens_per_micro_batch):
    assert_the_same(step(method, True, tokens_per_micro_batch=tokens_per_micro_batch),
                    step(method, False, tokens_per_micro_batch=tokens_per_micro_batch))


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["full", "lora on the head"])
def test_in_half_precision_as_well(step, method, precision):
    assert_the_same(step(method, True, precision), step(method, False, precision), 2e-2)


@pytest.mark.parametrize("method", ["full", "lora on the head"])
def test_a_data_parallel_models_gradients_are_too(step, method, tmp_path):
    expected = step(method, False)
    distributed.init_process_group("gloo", f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        assert_the_same(step(method, True, tokens_per_micro_batch=15, wrap=DistributedDataParallel), expected)
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("method", ["full", "lora on the head"])
def test_a_compiled_models_gradients_are_too(step, method, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert_the_same(step(method, True, compile_model=True), step(method, False), 1e-4)
