"""The loop: what is refused, that the loop learns what it should and touches nothing else, and that it can be
interrupted anywhere and resumed as if nothing had happened."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import signal
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from minipeft import FullConfig, GPT2ForSequenceClassification, GPT2ForTokenClassification, LoraConfig, inject
from minipeft.data.batches import IGNORED_LABEL, BucketedBatches, collate
from minipeft.errors import ConfigError, DataError, HardwareError
from minipeft.model.gpt2 import MLP
from minipeft.tasks.classification import Classification, metrics, predict_logits
from minipeft.training import loop as training
from minipeft.training.loop import Learner, Schedule, TrainingConfig, optimizer_step, train

loss_sum = Classification.loss_sum
CPU = torch.device("cpu")
METHODS = {"full": FullConfig(), "lora": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")}


# --- settings ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["epochs", "batch_size", "gradient_accumulation", "evaluations_per_epoch",
                                  "patience"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_count_below_one_is_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name} must be a positive integer, got {value}"):
        TrainingConfig(**{name: value})


@pytest.mark.parametrize("name", ["learning_rate", "max_grad_norm"])
@pytest.mark.parametrize("value", [0, -1e-3, math.nan])
def test_a_rate_that_is_not_positive_is_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name} must be positive"):
        TrainingConfig(**{name: value})


@pytest.mark.parametrize(("name", "value"), [
    ("warmup_ratio", -0.1), ("warmup_ratio", 1.1), ("warmup_ratio", math.nan), ("weight_decay", -0.1),
    ("weight_decay", math.nan), ("weight_decay", math.inf), ("learning_rate", math.inf)])
def test_a_number_out_of_its_range_is_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        TrainingConfig(**{name: value})


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_that_no_generator_takes_is_refused(seed):
    with pytest.raises(ConfigError, match="seed"):
        TrainingConfig(seed=seed)


def test_values_at_the_edge_of_their_range_are_accepted():
    TrainingConfig(epochs=1, batch_size=1, gradient_accumulation=1, evaluations_per_epoch=1, learning_rate=1e-12,
                   weight_decay=0, warmup_ratio=0, seed=0)
    TrainingConfig(warmup_ratio=1, seed=2**31)


# --- a toy task: the last token says which label ----------------------------------------------------------------------

def toy_texts(count, seed=0):
    """Random token ids that end in token 1 or 2, and labels 0 or 1 accordingly."""
    rng = np.random.default_rng(seed)
    labels = [i % 2 for i in range(count)]
    return [np.append(rng.integers(10, 97, size=rng.integers(3, 9)), label + 1) for label in labels], labels


@pytest.fixture
def toy(tiny_config):
    """toy(method, dropout=0): everything `train` takes, for a fresh model with the same initial values each time."""

    def make(method="lora", dropout=0.0, batch_size=8, **settings):
        tiny_config.resid_pdrop = tiny_config.embd_pdrop = tiny_config.attn_pdrop = dropout
        torch.manual_seed(0)
        model = inject(GPT2ForSequenceClassification(tiny_config), METHODS[method])
        ids, labels = toy_texts(64)
        validation_ids, validation_labels = toy_texts(20, seed=1)

        def validate():
            return metrics(predict_logits(model, validation_ids, CPU, torch.float32), validation_labels)

        config = TrainingConfig(**{"epochs": 3, "batch_size": batch_size, "learning_rate": 1e-2, **settings})
        batches = BucketedBatches(ids, labels, batch_size, config.seed, pool=2)
        return SimpleNamespace(model=model, batches=batches, loss_sum=loss_sum, validate=validate, config=config)

    return make


def saved_state(folder):
    """What a training state holds: (step and other facts, tensors: trained and best values, moments, random state)."""
    with safe_open(folder / "training_state.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["state"]), {name: file.get_tensor(name) for name in file.keys()}


def run(task, **more):
    """Train; `more` replaces or adds arguments of `train`."""
    return train(**{**vars(task), **more})


def trained_values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", METHODS)
def test_training_learns_a_separable_task(toy, method):
    task = toy(method, epochs=4)
    before = task.validate()
    history = run(task)
    assert history.curve[-1]["train_loss"] < 0.5 * before["loss"]
    assert history.best["accuracy"] == 1.0 == task.validate()["accuracy"]
    assert not history.stopped_by and not task.model.training
    assert history.samples == 4 * 64 and history.seconds > 0


def test_the_frozen_tensors_are_bit_identical_after_training_and_the_trained_ones_are_not(toy):
    task = toy("lora")
    before = copy.deepcopy(dict(task.model.named_parameters()))
    run(task)
    for name, parameter in task.model.named_parameters():
        assert torch.equal(parameter, before[name]) is not parameter.requires_grad, name


def test_the_same_seed_gives_the_same_run_and_another_one_another(toy):
    first, again, other = toy(dropout=0.2), toy(dropout=0.2), toy(dropout=0.2, seed=1)
    for task in (first, again, other):
        torch.manual_seed(task.config.seed)
        run(task)
    values = [trained_values(task.model) for task in (first, again, other)]
    assert all(torch.equal(values[0][name], values[1][name]) for name in values[0])
    assert not all(torch.equal(values[0][name], values[2][name]) for name in values[0])


def test_the_curve_has_the_validations_asked_for_and_what_each_found(toy):
    task = toy(epochs=2, evaluations_per_epoch=4)
    history = run(task)
    assert [point["step"] for point in history.curve] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert [point["epoch"] for point in history.curve] == [0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2]
    for point in history.curve:
        assert {"learning_rate", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy",
                "seconds"} <= set(point)
    best = max(history.curve, key=lambda point: (point["validation_accuracy"], -point["validation_loss"]))
    assert history.best == {"step": best["step"], "accuracy": best["validation_accuracy"],
                            "loss": best["validation_loss"]}


def test_of_validations_with_the_same_figure_the_one_of_lower_loss_is_kept(toy, monkeypatch):
    task, losses = toy(epochs=1, evaluations_per_epoch=4), iter([0.9, 0.5, 0.7, 0.6])
    monkeypatch.setattr(task, "validate", lambda: {"accuracy": 0.0, "loss": next(losses)})
    history = run(task)
    assert history.best == {"step": history.curve[1]["step"], "accuracy": 0.0, "loss": 0.5}


def test_with_nothing_to_train_one_line_says_so(toy):
    task = toy("lora")
    task.model.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"nothing to train: .* inject a method first"):
        run(task)


def test_the_rate_rises_to_its_peak_and_falls_to_nothing(toy):
    task = toy(epochs=2, evaluations_per_epoch=8, warmup_ratio=0.25)
    rates = [point["learning_rate"] for point in run(task).curve]
    assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.0005


# --- accumulation and clipping ----------------------------------------------------------------------------------------

class FixedBatches:
    """The same batches every epoch, cut from given rows."""

    def __init__(self, ids, labels, cuts):
        self.batches = [([ids[i] for i in cut], [labels[i] for i in cut]) for cut in cuts]

    def __len__(self):
        return len(self.batches)

    def epoch(self, epoch, first=0):
        return iter([collate(*batch) for batch in self.batches[first:]])


def test_a_batch_computed_in_micro_batches_takes_the_same_steps(toy):
    curves, values = [], []
    for tokens in (None, 20, 1):
        task = toy("lora", learning_rate=1e-3, epochs=2)
        curves.append(run(task, tokens_per_micro_batch=tokens).curve)
        values.append(trained_values(task.model))
    for curve, value in zip(curves[1:], values[1:]):
        assert [point["train_loss"] for point in curve] == pytest.approx([p["train_loss"] for p in curves[0]], abs=2e-4)
        assert [point["train_accuracy"] for point in curve] == [point["train_accuracy"] for point in curves[0]]
        for name in value:
            torch.testing.assert_close(value[name], values[0][name], atol=1e-5, rtol=1e-4)


def test_accumulating_over_small_batches_equals_one_large_batch(toy):
    ids, labels = toy_texts(64)
    large = [range(start, start + 16) for start in range(0, 64, 16)]
    # Parts of unequal size: each text counts the same, in whichever part it is.
    small = [part for rows in large for part in (rows[:3], rows[3:8], rows[8:14], rows[14:])]
    results = []
    for cuts, accumulation in ((large, 1), (small, 4)):
        task = toy("lora", learning_rate=1e-3, epochs=2, gradient_accumulation=accumulation)
        history = run(task, batches=FixedBatches(ids, labels, cuts))
        results.append((trained_values(task.model), [point["step"] for point in history.curve]))
    assert results[0][1] == results[1][1]
    for name, value in results[0][0].items():
        torch.testing.assert_close(results[1][0][name], value, atol=1e-6, rtol=0, msg=name)


def test_an_epochs_last_step_takes_what_is_left_over(toy):
    ids, labels = toy_texts(24)
    task = toy(epochs=2, gradient_accumulation=2, evaluations_per_epoch=1)
    history = run(task, batches=FixedBatches(ids, labels, [range(8), range(8, 16), range(16, 24)]))
    assert [point["step"] for point in history.curve] == [2, 4]
    assert history.samples == 48


@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
@pytest.mark.parametrize(("limit", "clipped"), [(1e-3, True), (1e6, False)])
def test_gradients_above_the_limit_are_scaled_down_to_it(toy, monkeypatch, limit, clipped, precision):
    monkeypatch.setattr(training, "adamw", lambda trained, *a, **k: torch.optim.SGD(
        [{"params": trained, "rate_factor": 1.0}], lr=1.0))
    task = toy("lora", epochs=1, max_grad_norm=limit, warmup_ratio=0, learning_rate=0.5)
    before = trained_values(task.model)
    run(task, batches=FixedBatches(*toy_texts(8), [range(8)]), precision=precision)
    after = trained_values(task.model)
    moved = torch.stack([(after[name] - before[name]).norm() for name in before]).norm().item()

    reference = toy("lora")
    batch = collate(*toy_texts(8))
    F.cross_entropy(reference.model(batch.input_ids, attention_mask=batch.attention_mask), batch.labels).backward()
    norm = torch.stack([p.grad.norm() for p in reference.model.parameters() if p.grad is not None]).norm().item()
    assert (norm > limit) is clipped
    # The rate times the clipped norm; in float16 the loss scale must be gone before the norm is measured.
    assert moved == pytest.approx(0.5 * min(norm, limit), rel=1e-4 if precision is torch.float32 else 1e-2)


# --- best on validation -----------------------------------------------------------------------------------------------

def scripted(accuracies, seen, model):
    """A validation that finds these accuracies, one after another, and notes the values it found them for."""
    remaining = iter(accuracies)

    def validate():
        seen.append(trained_values(model))
        return {"accuracy": next(remaining), "loss": 1.0}

    return validate


@pytest.mark.parametrize(("accuracies", "best"), [
    ([0.5, 0.6, 0.9, 0.7, 0.8, 0.6], 2), ([0.9, 0.5, 0.5, 0.5, 0.5, 0.5], 0), ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 5),
    ([0.5, 0.8, 0.7, 0.8, 0.8, 0.1], 1), ([0.0] * 6, 0)])
def test_the_values_left_in_the_model_are_those_of_the_first_best_validation(toy, accuracies, best):
    task, seen, saved = toy("lora", evaluations_per_epoch=2), [], []
    history = run(task, validate=scripted(accuracies, seen, task.model),
                  save_best=lambda: saved.append(trained_values(task.model)))
    assert history.best["accuracy"] == accuracies[best]
    assert history.best["step"] == history.curve[best]["step"]
    left = trained_values(task.model)
    for name, value in seen[best].items():
        assert torch.equal(left[name], value)
        assert torch.equal(saved[-1][name], value)
    improvements = [i for i, accuracy in enumerate(accuracies) if accuracy > max(accuracies[:i], default=-1)]
    assert len(saved) == len(improvements)


@pytest.mark.kind("7: training ends early")
@pytest.mark.parametrize(("patience", "losses", "best", "validations"), [
    (2, [0.5, 0.4, 0.6, 0.7, 0.1, 0.1], 1, 4), (1, [0.5, 0.6, 0.1, 0.1, 0.1, 0.1], 0, 2),
    (3, [0.5, 0.6, 0.4, 0.6, 0.5, 0.6], 2, 6), (3, [0.5, 0.6, 0.4, 0.6, 0.5, 0.3], 5, 6),
    (2, [0.5, math.nan, math.nan, 0.1, 0.1, 0.1], 0, 3), (None, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 0, 6)])
def test_training_ends_when_so_many_validations_in_a_row_are_no_better(toy, patience, losses, best, validations):
    task, seen = toy("lora", evaluations_per_epoch=2, patience=patience), []
    accuracies = scripted([0.5] * 6, seen, task.model)
    remaining = iter(losses)
    history = run(task, validate=lambda: {**accuracies(), "loss": next(remaining)}, best_by="loss")
    assert [point["validation_loss"] for point in history.curve] == pytest.approx(losses[:validations], nan_ok=True)
    assert history.best["loss"] == losses[best] and not history.stopped_by
    assert all(torch.equal(value, seen[best][name]) for name, value in trained_values(task.model).items())


@pytest.mark.kind("7: training ends early")
def test_a_run_that_is_resumed_ends_as_early_as_the_uninterrupted_one(toy, tmp_path):
    def losses(from_here):
        remaining = iter([0.5, 0.4, 0.6, 0.7, 0.1, 0.1][from_here:])
        return lambda: {"accuracy": 0.5, "loss": next(remaining)}

    def settings():
        return toy("lora", evaluations_per_epoch=2, patience=2)

    whole = run(settings(), validate=losses(0), best_by="loss")
    cut = run(settings(), validate=losses(0), best_by="loss", loss_sum=pressing_ctrl_c(13), state_folder=tmp_path)
    assert cut.stopped_by and len(cut.curve) == 3
    resumed = run(settings(), validate=losses(3), best_by="loss", state_folder=tmp_path, resume=True)
    assert not resumed.stopped_by and resumed.best == whole.best
    assert [point["step"] for point in resumed.curve] == [point["step"] for point in whole.curve] == [4, 8, 12, 16]


# --- memory -----------------------------------------------------------------------------------------------------------

@pytest.mark.kind("8: out of memory is one line")
@pytest.mark.parametrize(("checkpointing", "message"), [
    (False, r"cpu is out of memory: 8 texts of \d tokens at once do not fit, without gradient checkpointing: use a "
            "smaller --batch-size, with as many times the --gradient-accumulation, a smaller --max-length, or "
            "--gradient-checkpointing"),
    (True, r"cpu is out of memory: 8 texts of \d tokens at once do not fit, with gradient checkpointing: use a "
           "smaller --batch-size, with as many times the --gradient-accumulation, a smaller --max-length")])
def test_out_of_memory_is_one_line_that_says_what_did_not_fit_and_what_to_do(toy, monkeypatch, checkpointing, message):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 MiB.")

    task = toy()
    task.model.transformer.gradient_checkpointing = checkpointing
    monkeypatch.setattr(MLP, "forward", full)
    with pytest.raises(HardwareError, match=f"^{message}$"):
        run(task)


def test_another_error_in_a_step_stays_what_it_is(toy, monkeypatch):
    def broken(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    task = toy()
    monkeypatch.setattr(MLP, "forward", broken)
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2 shapes cannot be multiplied$"):
        run(task)


# --- number formats and the compiler ----------------------------------------------------------------------------------

@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_learns_and_its_trained_parameters_stay_float32(toy, precision, method):
    task = toy(method, epochs=4)
    kinds = []

    def noting_loss(logits, targets):
        kinds.append(logits.dtype)
        return loss_sum(logits, targets)

    history = run(task, precision=precision, loss_sum=noting_loss)
    assert set(kinds) == {precision}, "the forward pass did not run in the precision asked for"
    assert history.best["accuracy"] > 0.85
    assert {p.dtype for p in task.model.parameters()} == {torch.float32}
    assert all(torch.isfinite(p).all() for p in task.model.parameters())


@pytest.mark.parametrize(("precision", "scaled"), [
    (torch.float16, True), (torch.bfloat16, False), (torch.float32, False)])
def test_only_float16_has_a_loss_scaler_and_its_state_is_kept_for_resuming(toy, tmp_path, precision, scaled):
    run(toy(epochs=1), precision=precision, state_folder=tmp_path)
    assert ("scale" in saved_state(tmp_path)[0]["extra"]["scaler"]) is scaled


def test_a_float16_overflow_skips_its_step_and_lowers_the_scale(toy, tmp_path):
    task = toy(epochs=1, evaluations_per_epoch=1)
    calls = []

    def overflowing_once(logits, targets):
        calls.append(1)
        return loss_sum(logits, targets) * (1e36 if len(calls) == 3 else 1.0)

    run(task, precision=torch.float16, loss_sum=overflowing_once, state_folder=tmp_path)
    assert all(torch.isfinite(p).all() for p in task.model.parameters())
    assert saved_state(tmp_path)[0]["extra"]["scaler"]["scale"] == 2.0**15


def test_where_every_float16_step_overflows_nothing_is_trained_and_no_error_comes(toy):
    task = toy(epochs=1)
    before = trained_values(task.model)
    run(task, precision=torch.float16, loss_sum=lambda *given: loss_sum(*given) * 1e36)
    assert all(torch.equal(value, before[name]) for name, value in trained_values(task.model).items())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_gives_what_an_uncompiled_one_does(toy, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # a cache that an earlier run broke is not ours
    tiny_config.n_layer = 1
    plain, compiled = toy(epochs=1), toy(epochs=1)
    expected = run(plain)
    found = run(compiled, compile_model=True)
    for a, b in zip(expected.curve, found.curve):
        assert b["train_loss"] == pytest.approx(a["train_loss"], abs=2e-3)
    assert list(dict(compiled.model.named_parameters())) == list(dict(plain.model.named_parameters()))


# --- interruption -----------------------------------------------------------------------------------------------------

def pressing_ctrl_c(*at):
    """The loss, with Ctrl-C pressed during these of its calls, counted from 1."""
    calls = []

    def loss(logits, targets):
        calls.append(1)
        if len(calls) in at:
            os.kill(os.getpid(), signal.SIGINT)
        return loss_sum(logits, targets)

    return loss


LONG = {"dropout": 0.2, "epochs": 2, "batch_size": 4, "gradient_accumulation": 2, "evaluations_per_epoch": 2}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("micro_steps", [(1,), (6, 1), (8,), (9, 9, 9), (16,), (17,), (30,), (32,)])
def test_a_run_interrupted_anywhere_and_resumed_equals_the_uninterrupted_one_bit_for_bit(
        toy, tmp_path, method, micro_steps):
    whole = toy(method, **LONG)
    expected = run(whole, state_folder=tmp_path / "whole")
    for number, micro_step in enumerate(micro_steps):
        task = toy(method, **LONG)
        if number:
            torch.manual_seed(99)  # what a resuming process starts with does not matter
        history = run(task, loss_sum=pressing_ctrl_c(micro_step), state_folder=tmp_path / "cut", resume=True)
        assert history.stopped_by
    task = toy(method, **LONG)
    torch.manual_seed(100)
    history = run(task, state_folder=tmp_path / "cut", resume=True)
    assert not history.stopped_by

    left, wanted = trained_values(task.model), trained_values(whole.model)
    assert all(torch.equal(left[name], wanted[name]) for name in wanted)
    state, wanted = saved_state(tmp_path / "cut")[1], saved_state(tmp_path / "whole")[1]
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert (history.best, history.samples) == (expected.best, expected.samples)
    keys = ("step", "epoch", "learning_rate", "validation_loss", "validation_accuracy")
    assert [[point[key] for key in keys] for point in history.curve] == [
        [point[key] for key in keys] for point in expected.curve]


def test_a_resumed_runs_curve_has_the_training_loss_of_the_whole_interval(toy, tmp_path):
    expected = run(toy(**LONG), state_folder=tmp_path / "whole")
    run(toy(**LONG), loss_sum=pressing_ctrl_c(6), state_folder=tmp_path / "cut")
    history = run(toy(**LONG), state_folder=tmp_path / "cut", resume=True)
    assert [point["train_loss"] for point in history.curve] == [point["train_loss"] for point in expected.curve]


def test_ctrl_c_raises_nothing_finishes_its_step_and_saves_a_usable_model(toy, tmp_path):
    task, saved = toy(epochs=2), []
    handler = signal.getsignal(signal.SIGINT)
    history = run(task, loss_sum=pressing_ctrl_c(2), state_folder=tmp_path, save_best=lambda: saved.append(
        trained_values(task.model)))
    assert history.stopped_by and history.curve == [] and history.samples == 16
    assert signal.getsignal(signal.SIGINT) is handler
    assert saved_state(tmp_path)[0]["step"] == 2
    assert len(saved) == 1
    left = trained_values(task.model)
    assert all(torch.equal(left[name], saved[0][name]) for name in left)
    assert not task.model.training


def test_ctrl_c_after_a_validation_leaves_the_best_model_so_far(toy, tmp_path):
    task, seen = toy(epochs=2, evaluations_per_epoch=2), []
    history = run(task, loss_sum=pressing_ctrl_c(10), validate=scripted([0.9, 0.5], seen, task.model),
                  state_folder=tmp_path)
    assert history.stopped_by and history.best["accuracy"] == 0.9
    left = trained_values(task.model)
    assert all(torch.equal(left[name], seen[0][name]) for name in left)


def test_a_second_ctrl_c_is_obeyed_at_once(toy):
    def twice(logits, targets):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return loss_sum(logits, targets)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(toy(), loss_sum=twice)
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_sigterm_says_no_more_than_the_first(toy, tmp_path):
    """It may be sent again in case it got lost: the step ends, and the state is saved."""
    def twice(logits, batch):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        return loss_sum(logits, batch)

    assert run(toy(), loss_sum=twice, state_folder=tmp_path).stopped_by == signal.SIGTERM
    assert (tmp_path / "training_state.safetensors").is_file()


def test_training_runs_in_a_thread_where_signals_cannot_be_caught(toy):
    task, found = toy(epochs=1), []
    thread = threading.Thread(target=lambda: found.append(run(task)))
    thread.start()
    thread.join()
    assert found[0].samples == 64


@pytest.mark.parametrize("change", [{"learning_rate": 2e-2}, {"epochs": 5}, {"batch_size": 4}, {"seed": 7}])
def test_resuming_with_other_settings_is_refused(toy, tmp_path, change):
    run(toy(), loss_sum=pressing_ctrl_c(3), state_folder=tmp_path)
    with pytest.raises(ConfigError, match=r"other settings") as refused:
        run(toy(**change), state_folder=tmp_path, resume=True)
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize(("first", "then"), [(torch.float32, torch.float16), (torch.float16, torch.float32)])
def test_resuming_in_another_precision_is_refused(toy, tmp_path, first, then):
    run(toy(), loss_sum=pressing_ctrl_c(3), state_folder=tmp_path, precision=first)
    with pytest.raises(ConfigError, match=r"precision|settings"):
        run(toy(), state_folder=tmp_path, resume=True, precision=then)


def test_resuming_from_nothing_starts_at_the_beginning(toy, tmp_path):
    first, second = toy(), toy()
    run(first)
    torch.manual_seed(0)
    history = run(second, state_folder=tmp_path / "empty", resume=True)
    assert history.samples == 3 * 64
    values = trained_values(second.model)
    assert all(torch.equal(value, values[name]) for name, value in trained_values(first.model).items())


def test_without_resume_an_old_state_is_ignored(toy, tmp_path):
    run(toy(), loss_sum=pressing_ctrl_c(3), state_folder=tmp_path)
    assert run(toy(learning_rate=5e-3), state_folder=tmp_path).samples == 3 * 64


# --- the parts --------------------------------------------------------------------------------------------------------

@pytest.mark.kind("8: processes ask each other about Ctrl-C every ten steps only")
def test_processes_ask_each_other_only_now_and_then_whether_one_is_to_stop(toy, monkeypatch):
    """To ask is to wait for all of them, and for their GPUs."""
    task, asked = toy(epochs=3, evaluations_per_epoch=1), []
    parallel = training.parallel
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(parallel, "synchronized", lambda model: model)
    monkeypatch.setattr(parallel, "total", lambda values: values.tolist())
    monkeypatch.setattr(parallel, "any_of", lambda flag, device: asked.append(steps[0]) or flag)
    steps = [0]

    def counted(*_):
        steps[0] += 1
        return [torch.ones(2)]

    monkeypatch.setattr(training, "optimizer_step", counted)
    run(task, validate=lambda: {"loss": 1.0, "accuracy": 0.5})
    assert steps == [24] and asked == [0, 10, 10, 20, 20, 24]  # before a step, after one whether to save, at the end


@pytest.mark.parametrize("came", [signal.SIGTERM, 0])
def test_a_signal_that_one_process_alone_got_in_the_last_steps_stops_all_of_them(toy, tmp_path, monkeypatch, came):
    """Else only that one would save, which takes all of them: it would wait without end."""
    task, questions, parallel = toy(epochs=1), [], training.parallel
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(parallel, "synchronized", lambda model: model)
    monkeypatch.setattr(parallel, "total", lambda values: values.tolist())

    def any_of(flag, device):
        questions.append(flag)
        return len(questions) == 2  # the first is before step 0, the second after the last one

    def validate():
        if came and len(validations) == 1:
            os.kill(os.getpid(), came)
        validations.append(1)
        return {"loss": 1.0, "accuracy": 0.5}

    validations = []
    monkeypatch.setattr(parallel, "any_of", any_of)
    assert run(task, validate=validate, state_folder=tmp_path).stopped_by == (came or signal.SIGINT)
    assert questions == [False, bool(came)] and saved_state(tmp_path)[0]["step"] == 8


def test_the_example_of_a_steps_mean_loss_is_what_the_docstring_says(toy):
    """3 targets with losses of together 3 and 1 with 5: 2, in whichever micro-batches they are."""
    task, begun = toy("lora"), []

    def given(logits, targets):
        loss = logits.sum() * 0 + (3.0 if len(targets) == 3 else 5.0)
        loss.register_hook(lambda factor: begun.append(factor.item() * loss.item()))
        return loss

    learner = Learner(task.model, given, task.config, torch.float32, compile_model=False, tokens_per_micro_batch=None)
    optimizer_step(learner, [collate(*toy_texts(3)), collate(*toy_texts(1))], rate=1e-3)
    assert sum(begun) == 2 and "(3 + 5) / 4 = 2; the mean of the two means would be (1 + 5) / 2 = 3" in training.__doc__


def test_the_example_of_the_rate_is_what_the_docstring_says():
    schedule = Schedule.of(TrainingConfig(epochs=1, warmup_ratio=0.06, learning_rate=1e-3), batches=100)
    assert schedule.warmup_steps == 6
    assert [schedule.rate(step) for step in (0, 5, 6, 53)] == pytest.approx([1.67e-4, 1e-3, 1e-3, 5e-4], rel=2e-3)
    assert "1.67e-4 at t = 0, 1e-3 at t = 5 and 6, 5e-4 at t = 53" in training.__doc__


def test_a_step_without_a_target_is_one_line(tiny_config):
    model = inject(GPT2ForTokenClassification(tiny_config), METHODS["lora"])
    ids, _ = toy_texts(4)
    batches = BucketedBatches(ids, [np.full(len(text), IGNORED_LABEL) for text in ids], batch_size=4)
    with pytest.raises(DataError, match="nothing to learn in a step of 4 texts"):
        train(model, batches, loss_sum, dict, TrainingConfig(epochs=1))


def test_a_schedule_counts_steps_and_puts_the_last_validation_at_the_end():
    schedule = Schedule.of(TrainingConfig(epochs=2, gradient_accumulation=2, evaluations_per_epoch=2), batches=9)
    assert (schedule.steps_per_epoch, schedule.steps, schedule.evaluate_every) == (5, 10, 2)
    assert [step for step in range(1, 11) if schedule.validates_after(step)] == [2, 4, 6, 8, 10]
    schedule = Schedule.of(TrainingConfig(epochs=1, evaluations_per_epoch=3), batches=11)
    assert [step for step in range(1, 12) if schedule.validates_after(step)] == [3, 6, 11]  # 9 is too near to the end


def test_an_optimizer_step_lowers_the_loss_and_returns_it_with_the_hits_of_each_micro_batch(toy):
    task = toy("lora")
    learner = Learner(task.model, task.loss_sum, task.config, torch.float32, compile_model=False,
                      tokens_per_micro_batch=20)
    batch = collate(*toy_texts(8))
    parts = batch.micro_batches(20)
    assert len(parts) > 1
    losses = []
    for _ in range(5):
        with torch.no_grad():
            logits = [task.model(**part.arguments()) for part in parts]
        sums = optimizer_step(learner, [batch], rate=1e-2)
        assert len(sums) == len(parts)
        for found, row, part in zip(sums, logits, parts):
            loss, hits = loss_sum(row, part.targets).item(), (row.argmax(dim=1) == part.labels).sum().item()
            assert found.tolist() == pytest.approx([loss, hits], abs=1e-4)
        losses.append(sum(found[0].item() for found in sums))
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.grad is None for p in task.model.parameters())
