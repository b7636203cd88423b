"""scripts/pretraining: vocabulary, packing, the compiled loss against PyTorch's, the forward pass against the model's,
Muon, resuming, and whole runs."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from forward import causal_attention, gelu, hidden_states
from helpers import ROOT, ScriptRunner, files_below, load, read_json, write_imdb, write_tiny_model
from hypothesis import given
from hypothesis import strategies as st
from recipe import (
    MuonAndAdamW,
    PackedWindows,
    PretrainingConfig,
    bits_per_byte,
    learning_rate_factor,
    loss_sum,
    pretrain,
    train_step,
    validation_loss,
)
from safetensors import safe_open
from vocabulary import train_vocabulary

from minipeft import GPT2ForSequenceClassification, GPT2LMHeadModel, get_tokenizer
from minipeft.errors import ConfigError
from minipeft.model.tokenizer import VOCABULARY_FILE
from minipeft.training import vocabulary_loss
from minipeft.training.hardware import commit

EOS = 96


@pytest.fixture
def uncompiled():
    """The compiler is slow and changes no number: run what is decorated with torch.compile as plain Python."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def texts_of(lengths, vocab_size=EOS, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, size=length).astype(np.uint16) for length in lengths]


# --- the vocabulary ---------------------------------------------------------------------------------------------------

CORPUS = ["the cat sat on the mat, and the cat thought about the other cat.", "Don't let it run: 1234 5678, 1234!",
          "naïve café, naïve café — 猫は猫", "<|endoftext|> in a review"] * 20
NEVER_SEEN = ["", " ", "\n\n  x\t", "it's the thing", "naïve café — 猫 🐈‍⬛", "\x00\x7f\ufffd", "a" * 3000, "e\u0301",
              "x<|endoftext|>y<|endoftext|>", "\u202e\u200b", "".join(map(chr, range(0x250)))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A vocabulary trained on the corpus, in a folder that did not exist."""
    pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("trained") / "new"
    train_vocabulary(CORPUS, 320, folder / VOCABULARY_FILE)
    return folder


def test_a_trained_vocabulary_loads_and_shortens_its_corpus(trained):
    tokenizer = get_tokenizer(trained)
    assert tokenizer.vocab_size == 320 + 1
    for text in CORPUS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert len(tokenizer.encode(text)) < len(text.encode())
    assert len(tokenizer.encode("the cat")) <= 3


def test_a_trained_vocabulary_encodes_what_its_corpus_never_had(trained):
    for text in NEVER_SEEN:
        assert get_tokenizer(trained).decode(get_tokenizer(trained).encode(text)) == text


def test_training_a_vocabulary_is_reproducible_and_leaves_one_file(trained, tmp_path):
    train_vocabulary(CORPUS, 320, tmp_path / "again" / VOCABULARY_FILE)
    assert (tmp_path / "again" / VOCABULARY_FILE).read_bytes() == (trained / VOCABULARY_FILE).read_bytes()
    assert [path.name for path in (tmp_path / "again").iterdir()] == [VOCABULARY_FILE]


# --- packing ----------------------------------------------------------------------------------------------------------

def test_one_text_packed_by_hand():
    windows = PackedWindows([np.arange(1, 10)], eos_token_id=99, window=2, batch_size=2, seed=0)
    assert (windows.tokens, windows.steps_per_epoch) == (10, 2)
    assert windows.batch(0).tolist() == [[99, 1, 2], [2, 3, 4]]
    assert windows.batch(1).tolist() == [[4, 5, 6], [6, 7, 8]]
    assert windows.batch(2).tolist() == windows.batch(0).tolist()  # the next epoch, of one text, is the same
    assert windows.batch(0).dtype == torch.int64


def test_each_text_is_preceded_by_one_end_of_text():
    texts = [np.full(3, 10 + i) for i in range(8)]
    windows = PackedWindows(texts, eos_token_id=99, window=31, batch_size=1, seed=0)
    stream = windows.batch(0)[0].tolist()
    assert [token == 99 for token in stream] == [True, False, False, False] * 8
    order = stream[1::4]
    assert sorted(order) == list(range(10, 18)), "a text is missing or repeated"
    assert order != sorted(order), "the texts were not shuffled"
    assert order != windows.batch(1)[0].tolist()[1::4], "the next epoch has the same order"


@given(lengths=st.lists(st.integers(0, 20), min_size=1, max_size=30), window=st.integers(1, 9),
       batch_size=st.integers(1, 4), seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_an_epoch_predicts_every_token_once_but_for_less_than_one_batch(lengths, window, batch_size, seed, epoch):
    texts = [np.full(length, 1 + i) for i, length in enumerate(lengths)]
    tokens = sum(lengths) + len(lengths)
    if tokens - 1 < window * batch_size:
        with pytest.raises(ConfigError, match="do not fill one batch"):
            PackedWindows(texts, 0, window, batch_size, seed)
        return
    windows = PackedWindows(texts, 0, window, batch_size, seed)
    steps = range(epoch * windows.steps_per_epoch, (epoch + 1) * windows.steps_per_epoch)
    rows = torch.cat([windows.batch(step) for step in steps])
    assert torch.equal(rows[1:, 0], rows[:-1, -1]), "a window does not begin where the last one ended"
    inputs = rows[:, :-1].flatten()
    assert 0 <= tokens - 1 - len(inputs) < window * batch_size
    for number, length in enumerate(lengths, start=1):
        assert (inputs == number).sum() <= length


def test_a_batch_depends_on_the_seed_and_the_step_alone():
    texts = texts_of(range(1, 30))

    def windows(seed):
        return PackedWindows(texts, EOS, 8, 2, seed)

    straight = windows(0)
    steps = 3 * straight.steps_per_epoch
    expected = [straight.batch(step) for step in range(steps)]
    fresh = windows(0)
    for step in reversed(range(steps)):
        assert torch.equal(fresh.batch(step), expected[step])
    assert not all(torch.equal(windows(1).batch(step), expected[step]) for step in range(steps))


def test_too_few_tokens_for_a_batch_are_refused():
    with pytest.raises(ConfigError, match="10 tokens do not fill one batch of 4 windows of 8"):
        PackedWindows([np.arange(9)], EOS, 8, 4, 0)


# --- the loss ---------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_compiled_loss_in_pieces_is_cross_entropy(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(vocabulary_loss, "NUMBERS_PER_PIECE", {"cpu": 4 * 50})
    torch.manual_seed(0)
    head, hidden, targets = torch.nn.Linear(16, 50, bias=False), torch.randn(16, 16), torch.randint(50, (16,))
    hidden.requires_grad_()
    learned = (hidden, head.weight)
    expected = F.cross_entropy(head(hidden), targets, reduction="sum")
    found, _ = vocabulary_loss.loss_and_hits(head, hidden, targets, loss_sum)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for ours, theirs in zip(torch.autograd.grad(found, learned), torch.autograd.grad(expected, learned)):
        torch.testing.assert_close(ours, theirs, atol=3e-6, rtol=1e-5)


def test_validation_loss_is_the_mean_over_windows_in_the_given_order(tiny_config, make_model):
    model = make_model(GPT2LMHeadModel).train()
    texts = texts_of([5, 30, 1, 12])
    stream = torch.tensor([token for text in texts for token in (EOS, *text.tolist())])
    count = (len(stream) - 1) // 8
    losses = []
    for start in range(0, count * 8, 8):
        with torch.no_grad():
            logits = model.eval()(stream[None, start:start + 8])[0]
        losses.append(F.cross_entropy(logits, stream[start + 1:start + 9], reduction="sum").item())
    model.train()
    found = validation_loss(model, texts, EOS, 8, torch.float32, batch_size=2)
    assert found == pytest.approx(sum(losses) / (count * 8), rel=1e-5)
    assert model.training


def test_bits_per_byte_worked_by_hand():
    # ln 2 nats are one bit: 100 tokens of one bit each, over 400 bytes
    assert bits_per_byte(math.log(2), 100, 400) == pytest.approx(0.25)
    assert bits_per_byte(8 * math.log(2), 7, 7) == pytest.approx(8)


@pytest.mark.parametrize(("tokens", "steps"), [(64, 1), (640, 10), (700, 10), (1, 1)])
def test_a_recipes_steps_are_its_tokens_divided_by_those_of_a_step(tokens, steps):
    assert PretrainingConfig(tokens=tokens, window=8, batch_size=8).steps == steps


# --- the forward pass -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("length", [1, 2, 5, 16])
def test_the_faster_forward_pass_and_its_gradients_equal_the_models(make_model, length):
    transformer = make_model(GPT2LMHeadModel).train().transformer
    ids = torch.randint(96, (3, length), generator=torch.Generator().manual_seed(0))
    parameters = list(transformer.parameters())
    expected = transformer(ids)
    found = hidden_states(transformer, ids)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    for grad, expected_grad in zip(torch.autograd.grad((found * weights).sum(), parameters),
                                   torch.autograd.grad((expected * weights).sum(), parameters)):
        largest = expected_grad.abs().max().item()  # a small gradient is a sum of large ones, rounded
        torch.testing.assert_close(grad, expected_grad, atol=1e-5 * max(1.0, largest), rtol=0)


def test_the_faster_forward_pass_drops_out_in_training_only(tiny_config):
    tiny_config.resid_pdrop = tiny_config.embd_pdrop = tiny_config.attn_pdrop = 0.3
    transformer, ids = GPT2LMHeadModel(tiny_config).transformer, torch.arange(12).view(1, 12)
    assert not torch.equal(hidden_states(transformer.train(), ids), hidden_states(transformer, ids))
    torch.testing.assert_close(hidden_states(transformer.eval(), ids), transformer(ids), atol=1e-5, rtol=1e-5)
    query, key, value = torch.randn(3, 2, 4, 12, 8)
    assert not torch.equal(causal_attention(query, key, value, 0.3), causal_attention(query, key, value))


@pytest.mark.parametrize("length", [1, 3, 4, 7, 8, 33])
def test_attention_in_blocks_is_causal_attention(length):
    query, key, value = torch.randn(3, 2, 4, length, 8, generator=torch.Generator().manual_seed(0))
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(causal_attention(query, key, value), expected, atol=1e-5, rtol=1e-5)


def test_gelu_by_a_sigmoid_is_gelu_by_a_tanh():
    x = torch.linspace(-30, 30, 10_001, dtype=torch.float32)
    torch.testing.assert_close(gelu(x), F.gelu(x, approximate="tanh"), atol=1e-5, rtol=1e-5)


# --- the rate and the optimizer ---------------------------------------------------------------------------------------

def test_the_rate_rises_stays_and_falls_to_zero_after_the_last_step():
    config = PretrainingConfig(tokens=10 * 64, window=8, batch_size=8, warmup_steps=4, decay_ratio=0.5)
    factors = [learning_rate_factor(step, config) for step in range(11)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0])


def test_after_new_moments_the_rate_rises_anew():
    recipe = PretrainingConfig(tokens=1000 * 32 * 512, warmup_steps=100)
    assert [learning_rate_factor(step, recipe, begun=400) for step in (400, 449, 499, 500)] == [0.01, 0.5, 1.0, 1.0]


def test_until_it_falls_the_rate_does_not_depend_on_the_runs_length():
    short, long = (PretrainingConfig(tokens=steps * 64, window=8, batch_size=8, warmup_steps=5) for steps in (50, 500))
    assert [learning_rate_factor(step, short) for step in range(36)] == [
        learning_rate_factor(step, long) for step in range(36)]
    assert learning_rate_factor(40, short) < 1 == learning_rate_factor(40, long)


@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_a_rate_without_warm_up_starts_at_its_peak(warmup_steps):
    config = PretrainingConfig(tokens=100 * 64, window=8, batch_size=8, warmup_steps=warmup_steps)
    assert learning_rate_factor(0, config) == 1


def test_muon_trains_the_blocks_matrices_and_adamw_everything_else_once(make_model):
    model = make_model(GPT2LMHeadModel)
    optimizer = MuonAndAdamW(model, PretrainingConfig(weight_decay=0.3))
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {kind: [names[p] for group in part.param_groups for p in group["params"]]
             for kind, part in (("muon", optimizer.muon), ("adamw", optimizer.adamw))}
    matrices = [f"transformer.h.{layer}.{part}.weight" for layer in range(model.config.n_layer)
                for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    assert sorted(found["muon"]) == sorted(matrices)
    assert sorted(found["muon"] + found["adamw"]) == sorted(names.values())
    assert {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.bias"} < set(found["adamw"])
    decays = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name for name, decay in decays.items() if decay == 0.3} == set(matrices)
    assert all(decay == 0 for name, decay in decays.items() if name not in matrices)


def test_a_step_of_both_optimizers_is_each_ones_own_step(uncompiled, make_model):
    """Held against torch's Muon and AdamW, each built by hand on a copy of the model."""
    recipe = PretrainingConfig(learning_rate=1e-2)
    ours = make_model(GPT2LMHeadModel)
    theirs = copy.deepcopy(ours)
    matrices = [p for name, p in theirs.named_parameters() if ".h." in name and p.ndim == 2]
    others = [p for name, p in theirs.named_parameters() if not (".h." in name and p.ndim == 2)]
    by_hand = [torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
               torch.optim.AdamW(others, lr=1e-2, weight_decay=0.0, betas=(0.9, 0.95), fused=True)]
    optimizer = MuonAndAdamW(ours, recipe)
    ids = torch.randint(96, (2, 9), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        train_step(ours, ours.transformer, optimizer, ids, recipe, torch.float32)
        F.cross_entropy(theirs(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), recipe.max_grad_norm)
        for part in by_hand:
            part.step()
            part.zero_grad()
    for (name, parameter), expected in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(parameter, expected, atol=1e-5, rtol=1e-4, msg=name)


class Kept:
    """An optimizer that takes no step and keeps the gradients it was given."""

    def __init__(self, model):
        self.model = model

    def step(self):
        self.grads = {name: parameter.grad.clone() for name, parameter in self.model.named_parameters()}

    def zero_grad(self, set_to_none=True):
        self.model.zero_grad(set_to_none)


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5, 8])  # 5 windows: also parts of unequal size
def test_micro_batches_give_the_gradients_and_the_loss_of_one_big_batch(uncompiled, make_model, micro_batch):
    model = make_model(GPT2LMHeadModel)
    batch = torch.randint(96, (5, 13), generator=torch.Generator().manual_seed(0))
    expected = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    expected.backward()
    expected_grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    kept = Kept(model)
    config = PretrainingConfig(micro_batch=micro_batch, max_grad_norm=1e9)
    loss = train_step(model, model.transformer, kept, batch, config, torch.float32)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for name, grad in expected_grads.items():
        torch.testing.assert_close(kept.grads[name], grad, atol=1e-6, rtol=1e-4, msg=name)
    assert all(parameter.grad is None for parameter in model.parameters())


# --- the loop ---------------------------------------------------------------------------------------------------------

RECIPE = PretrainingConfig(tokens=24 * 64, window=16, batch_size=4, learning_rate=1e-2, warmup_steps=3,
                           evaluate_every=5)


@pytest.fixture
def start(tiny_config):
    """start(interrupt_at=None): a run of 24 steps with dropout; it is cut off, as by Ctrl-C, before that step."""

    def make(state_folder, interrupt_at=None, **changes):
        recipe = dataclasses.replace(RECIPE, **changes)
        tiny_config.resid_pdrop = tiny_config.embd_pdrop = tiny_config.attn_pdrop = 0.2
        torch.manual_seed(0)
        model = GPT2LMHeadModel(tiny_config)
        windows = PackedWindows(texts_of([20] * 20, vocab_size=10), EOS, RECIPE.window, RECIPE.batch_size, seed=0)
        if interrupt_at is not None:
            batch = windows.batch

            def cut_off(step):
                if step == interrupt_at:
                    raise KeyboardInterrupt
                return batch(step)

            windows.batch = cut_off
        held_out = texts_of([30, 30], vocab_size=10, seed=1)
        history = pretrain(model, windows, lambda: validation_loss(model, held_out, EOS, 16, torch.float32), recipe,
                           state_folder, torch.float32, compile_model=False)
        return model, history

    return make


def test_pretraining_learns(uncompiled, start, tmp_path):
    _, history = start(tmp_path)
    assert [point["step"] for point in history["curve"]] == [5, 10, 15, 20, 24]
    assert history["curve"][-1]["tokens"] == 24 * 64
    assert history["curve"][-1]["validation_loss"] < history["curve"][0]["validation_loss"] < math.log(97)
    assert history["seconds"] > 0


@pytest.mark.parametrize("muon", [True, False], ids=["muon", "adamw"])
@pytest.mark.parametrize(("interruptions", "save_every"), [
    ((3,), 50), ((5,), 50), ((12,), 50), ((7, 18), 50), ((3, 8), 2), ((14,), 3)])
def test_an_interrupted_run_started_again_ends_bit_identical_to_the_uninterrupted_one(
        uncompiled, start, tmp_path, interruptions, save_every, muon):
    changes = {"save_every": save_every, "muon": muon}
    whole, expected = start(tmp_path / "whole", **changes)
    for number, step in enumerate(interruptions):
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path / "cut", interrupt_at=step, **changes)
        assert number or (tmp_path / "cut").exists() == (step >= min(5, save_every))
    resumed, history = start(tmp_path / "cut", **changes)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name
    states = []
    for folder in ("whole", "cut"):
        with safe_open(tmp_path / folder / "training_state.safetensors", framework="pt") as file:
            states.append({name: file.get_tensor(name) for name in file.keys()})
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    losses = [[(point["step"], point["train_loss"], point["validation_loss"]) for point in run["curve"]]
              for run in (history, expected)]
    assert losses[0] == losses[1]


def test_a_finished_run_started_again_has_nothing_left_to_do(uncompiled, start, tmp_path):
    whole, expected = start(tmp_path)
    again, history = start(tmp_path, interrupt_at=0)
    assert history["curve"] == expected["curve"]
    assert all(torch.equal(parameter, again.get_parameter(name)) for name, parameter in whole.named_parameters())


# --- the script -------------------------------------------------------------------------------------------------------

@pytest.fixture
def script(monkeypatch, capsys, tmp_path, uncompiled):
    """script(*options): scripts/pretraining/pretrain.py on a hundred reviews, at a size that takes seconds."""
    monkeypatch.delenv("MINIPEFT_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    write_imdb(tmp_path / "data", train=100, test=20, unsupervised=60)
    runner = ScriptRunner(monkeypatch, capsys)

    def run(*options):
        return runner("pretraining/pretrain.py", "--data-dir", "data", "--output", "model", "--state", "state",
                      "--results", "results/pretraining.json", "--n-layer", 1, "--n-embd", 16, "--n-head", 2,
                      "--vocab-size", 300, "--tokens", 3000, "--window", 16, "--batch-size", 4, "--warmup-steps", 5,
                      "--evaluate-every", 10, "--precision", "fp32", "--no-compile", *options)

    return run


def test_the_script_writes_a_model_that_loads_and_complete_results(script, tmp_path):
    outcome = script()
    assert outcome.code == 0, outcome.err
    model, tokenizer = GPT2LMHeadModel.from_pretrained("model"), get_tokenizer("model")
    assert (model.config.vocab_size, tokenizer.vocab_size, model.config.n_positions) == (300, 300, 16)
    assert model.config.eos_token_id == tokenizer.eos_token_id == 299
    assert GPT2ForSequenceClassification.from_pretrained("model").score.out_features == 2
    with safe_open("model/model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}

    results = read_json("results/pretraining.json")
    assert results["data"]["train_reviews"] == 90 + 60 and results["data"]["held_out_reviews"] == 10
    assert results["tokens_seen"] == 3000 // 64 * 64
    assert results["recipe"]["learning_rate"] > 0 and results["initialisation"] == "random"
    assert results["model"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert [point["step"] for point in results["curve"]] == [10, 20, 30, 40, 46]
    assert results["curve"][-1]["train_loss"] < results["curve"][0]["train_loss"]
    assert 0 < results["validation_loss"] < math.log(300)
    assert {"seconds", "machine", "versions"} <= results.keys()
    assert results["commit"] == commit(ROOT / "minipeft", ROOT / "scripts" / "pretraining")
    assert results["pilots"] == read_json(ROOT / "scripts/pretraining/pilots.json")
    held_out = load("imdb", "data").validation.texts
    tokens = sum(len(ids) + 1 for ids in tokenizer.encode_batch(held_out))
    expected = bits_per_byte(results["validation_loss"], tokens, sum(len(text.encode()) for text in held_out))
    assert results["bits_per_byte"] == pytest.approx(expected, abs=1e-3)


def test_the_script_learns_from_no_test_review_and_holds_out_the_validation_split(script, monkeypatch):
    import recipe

    learnt = []
    packed = recipe.PackedWindows

    def noting(texts, *arguments):
        learnt.extend(bytes(0) + text.tobytes() for text in texts)
        return packed(texts, *arguments)

    monkeypatch.setattr(recipe, "PackedWindows", noting)
    assert script("--tokens", 200).code == 0
    tokenizer = get_tokenizer("model")
    seen = {tokenizer.decode(np.frombuffer(text, dtype=np.uint16).tolist()) for text in learnt}
    data = load("imdb", "data")
    assert seen.isdisjoint(data.test.texts) and seen.isdisjoint(data.validation.texts)
    assert set(data.train.texts) < seen
    assert len(seen) == len(data.train) + 60


def test_the_script_run_again_keeps_what_it_has_and_ends_at_once(script):
    assert script().code == 0
    first = read_json("results/pretraining.json")
    outcome = script()
    assert outcome.code == 0 and "training a vocabulary" not in outcome.out
    again = read_json("results/pretraining.json")
    for key in ("curve", "validation_loss", "bits_per_byte", "recipe", "seconds"):
        assert again[key] == first[key]


def stopping_after(steps):
    """recipe.py's function of a step, which is interrupted when so many are taken."""
    import recipe

    take_step, taken = recipe.train_step, []

    def step(*arguments):
        if len(taken) == steps:
            raise KeyboardInterrupt
        taken.append(take_step(*arguments))
        return taken[-1]

    return step


def test_a_run_that_goes_on_is_noted_as_it_began_whatever_model_is_named_then(script, monkeypatch):
    import recipe

    assert script().code == 0
    with monkeypatch.context() as patched:
        patched.setattr(recipe, "train_step", stopping_after(7))
        assert script("--state", "more", "--init-from", "model", "--save-every", 5).code == 130
    beside = {name: read_json(f"more/{name}") for name in ("config.json", "start.json")}
    outcome = script("--state", "more", "--n-layer", 2)
    assert outcome.code == 2 and "a run with other parameters" in outcome.err
    assert script("--state", "more").code == 0
    assert beside == {name: read_json(f"more/{name}") for name in beside}
    assert read_json("results/pretraining.json")["initialisation"] == "model"


def test_the_script_starts_from_a_given_model_and_its_vocabulary(script, tmp_path):
    write_tiny_model(tmp_path / "seed", n_positions=16)
    outcome = script("--init-from", "seed")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "model" / "vocab.tiktoken").read_bytes() == (tmp_path / "seed" / "vocab.tiktoken").read_bytes()
    results = read_json("results/pretraining.json")
    assert results["initialisation"] == "seed" and results["model"]["n_layer"] == 2


def test_the_scripts_model_has_a_card(script, tmp_path):
    assert script().code == 0
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    for word in ("IMDb", "Recipe", "Loss", "Limits", "bits per byte"):
        assert word in card


def test_a_snapshot_of_an_unfinished_run_is_a_model_of_its_last_saved_state(script, tmp_path, monkeypatch, capsys):
    import recipe

    with monkeypatch.context() as patched:
        patched.setattr(recipe, "train_step", stopping_after(25))
        assert script("--save-every", 12).code == 130
    assert not (tmp_path / "model").exists()
    outcome = ScriptRunner(monkeypatch, capsys)("pretraining/snapshot.py", "state", "snapshot")
    assert outcome.code == 0 and "step 24" in outcome.out, outcome.err
    model = GPT2LMHeadModel.from_pretrained("snapshot")
    assert get_tokenizer("snapshot").vocab_size == model.config.vocab_size == 300
    with safe_open("state/training_state.safetensors", framework="pt") as file:
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, file.get_tensor(f"model/{name}").half().float(), atol=0, rtol=0)

    outcome = script("--init-from", "snapshot", "--state", "elsewhere")  # the state is lost: the run goes on from here
    assert outcome.code == 0, outcome.err
    results = read_json("results/pretraining.json")
    assert results["initialisation"] == "random" and [point["step"] for point in results["curve"]] == [
        10, 20, 30, 40, 46]
    assert results["curve"][:2] == read_json("snapshot/start.json")["curve"]
    assert results["curve"][-1]["train_loss"] < results["curve"][1]["train_loss"]


@pytest.mark.parametrize("options", [
    ("--data-dir", "nowhere"), ("--device", "cuda"), ("--device", "tpu"), ("--tokens", 0), ("--window", 0),
    ("--batch-size", 0), ("--evaluate-every", 0), ("--learning-rate", -1), ("--learning-rate", "nan"),
    ("--n-head", 3), ("--vocab-size", 100), ("--vocab-size", 70_000), ("--dropout", 1.5),
    ("--seed", -1), ("--init-from", "nowhere"), ("--batch-size", 1000), ("--window", 4000)],
    ids=lambda options: "".join(map(str, options)))
def test_an_impossible_request_ends_in_one_line_without_a_model_or_results(script, tmp_path, monkeypatch, options):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    outcome = script(*options)
    assert outcome.code == 2
    assert len(outcome.error_lines) == 1 and outcome.error_lines[0].startswith("error: ")
    assert files_below(tmp_path / "model", tmp_path / "results") == []


@pytest.mark.parametrize("place", ["--output", "--state", "--results"])
def test_a_place_that_cannot_be_written_is_known_before_the_work(script, tmp_path, monkeypatch, place):
    import recipe

    monkeypatch.setattr(recipe, "pretrain", lambda *a, **k: pytest.fail("trained"))
    (tmp_path / "file").write_text("not a folder")
    outcome = script(place, "file/below")
    assert outcome.code == 2
    assert len(outcome.error_lines) == 1 and "cannot write" in outcome.error_lines[0]


def test_without_data_the_script_says_where_to_put_it(script, monkeypatch, capsys):
    outcome = ScriptRunner(monkeypatch, capsys)("pretraining/pretrain.py")
    assert outcome.code == 2
    for part in ("--data-dir", "MINIPEFT_DATA", "imdb/train-*.parquet", "imdb/unsupervised-*.parquet"):
        assert part in outcome.err


