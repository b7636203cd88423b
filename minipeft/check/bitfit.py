"""What an answer to exercises/bitfit.py is held against."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn as nn
from torch import Tensor

from minipeft.check.judging import Refused, call, close, expect, expect_same, given, randomized, trained_count
from minipeft.check.references import reference_case
from minipeft.model.config import GPT2Config
from minipeft.model.gpt2 import GPT2ForSequenceClassification

NAMES = {"trained_names": 2, "bitfit": 2, "bias_gradient": 1, "to_save": 2, "load": 2}
L, C, M, K = 2, 4, 6, 3
IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def gpt2(seed: int = 0) -> GPT2ForSequenceClassification:
    """A tiny GPT-2 with a classification head, all of it random, in eval mode."""
    config = GPT2Config(vocab_size=8, n_positions=5, n_embd=C, n_layer=L, n_head=2, n_inner=M, num_labels=K)
    return randomized(GPT2ForSequenceClassification(config), seed).eval()


def relative() -> nn.Module:
    """Names that a search for "bias" or "score" within a name falls for; T5 has a relative_attention_bias."""
    model = nn.ModuleDict({"relative_attention_bias": nn.Embedding(4, 2), "dense": nn.Linear(3, 2),
                           "score_norm": nn.LayerNorm(2), "score": nn.Linear(2, 2)})
    model["dense"].q_bias = nn.Parameter(torch.zeros(2))
    return model


def deep() -> nn.Module:
    """A head of two layers, under another name that a part of the model has, too."""
    model = nn.ModuleDict({"body": nn.Linear(3, 2), "score": nn.Linear(2, 2)})
    model["body"].classifier = nn.Linear(2, 2)
    model["classifier"] = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 3))
    return model


def right_names(model: nn.Module, head: str = "score") -> list[str]:
    """What is trained, in the model's order."""
    return [name for name, _ in model.named_parameters()
            if name.split(".")[-1] == "bias" or name.startswith(f"{head}.")]


def shapes(answer: ModuleType) -> None:
    names = answer.trained_names(gpt2(), "score")
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise Refused("trained_names(model, 'score')", type(names).__name__, "a list of names")
    saved = answer.to_save(gpt2(), "score")
    if not isinstance(saved, dict) or not all(isinstance(tensor, Tensor) for tensor in saved.values()):
        raise Refused("to_save(model, 'score')", type(saved).__name__, "a dictionary from names to tensors")


def start(answer: ModuleType) -> None:
    model, zeroed = gpt2(), gpt2()
    for name, tensor in zeroed.named_parameters():
        if name.endswith(".bias"):
            tensor.data.zero_()
    before = model(IDS).detach()
    answer.bitfit(model, "score")
    expect("model(ids) after bitfit(model, 'score')", model(IDS), before, given(ids=IDS),
           {"the biases are set to zero: they start where pretraining left them": zeroed(IDS)})


def formula(answer: ModuleType) -> None:
    gradient = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 9.0]]])
    expect("bias_gradient(output_gradient)", call("bias_gradient(output_gradient)", answer.bias_gradient, gradient),
           torch.tensor([16.0, 21.0]),
           given(output_gradient=gradient), {
               "the mean over batch and seq: b is added to every token, so it is the sum": gradient.mean((0, 1)),
               "the sum over batch alone: b is added to every token, so seq is summed, too": gradient.sum(0),
               "the sum over seq alone: b is the same for every text, so batch is summed, too": gradient.sum(1),
               "the sum over out, too: b has one number per output": gradient.sum(),
               "the sum over out, not over batch and seq": gradient.sum(2),
               "the sum over seq and the mean over batch: it is the sum": gradient.sum(1).mean(0),
               "the last token's gradient alone: b is added to every token": gradient[:, -1].sum(0)})


def gradients(answer: ModuleType) -> None:
    layer, x = nn.Linear(3, 2).double(), torch.randn(2, 4, 3, dtype=torch.float64)
    y = layer(x)
    (slope,) = torch.autograd.grad(y.square().sum(), y, retain_graph=True)
    expect("bias_gradient(output_gradient)", answer.bias_gradient(slope),
           torch.autograd.grad(y.square().sum(), layer.bias)[0], "the gradient of a random layer's output")
    model = gpt2()
    answer.bitfit(model, "score")
    output = model(IDS)
    if not output.requires_grad:
        raise Refused("model(ids).requires_grad", "False", "True", because="all is frozen: nothing can learn")
    output.sum().backward()
    for name, tensor in model.named_parameters():
        if name in right_names(model) and tensor.grad is None and tensor.requires_grad:
            raise Refused(f"{name}.grad after backward", "none", "one", because=f"no gradient reaches {name}")


def _wrong_names(model: nn.Module) -> dict[str, set[str]]:
    """Misconception -> the names it trains."""
    right, everything = set(right_names(model)), {name for name, _ in model.named_parameters()}
    norms = {f"{name}.{key}" for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)
             for key in ("weight", "bias")}
    head = {"score.weight", "score.bias"} & everything
    return {"what has bias within its name is trained, too: relative_attention_bias.weight is no bias":
                right | {name for name in everything if "bias" in name},
            "what ends in bias is trained, too: q_bias is another name": right | {
                name for name in everything if name.endswith("bias")},
            "what begins with the head's name is trained, too: score_norm is not the head":
                right | {name for name in everything if name.startswith("score")},
            "the head is missing: it starts random, and has to be trained": right - head,
            "the head's weight is missing: all of the head starts random": right - {"score.weight"},
            "the LayerNorms' biases are missing": right - norms,
            "the LayerNorms' weights are trained, too: only their biases are": right | norms,
            "only attention's biases are trained": {name for name in right if ".attn." in name} | head,
            "the last LayerNorm, ln_f, is missing": right - {"transformer.ln_f.bias"},
            "the embeddings are trained, too":
                right | {name for name in everything if ".wte." in name or ".wpe." in name},
            "all is trained": everything,
            "nothing is trained": set()}


def trained(answer: ModuleType) -> None:
    _trained(answer, gpt2(), "score", "GPT-2 of two blocks", _wrong_names)
    _trained(answer, relative(), "score", "a model with a q_bias, and T5's relative_attention_bias", _wrong_names)
    _trained(answer, deep(), "classifier", "a head of layers, and a part of the body with its name", _wrong_heads)
    _trained(answer, nn.Linear(3, 2), "score", "one nn.Linear, whose bias is called bias", lambda model: {
        "a name without a dot is missed: the whole name may be bias": set()})
    _trained(answer, gpt2().requires_grad_(False), "score", "GPT-2, of which all was frozen before", lambda model: {
        "bitfit freezes only: what is trained has to require a gradient, whatever it did before": set()})


def _wrong_heads(model: nn.Module) -> dict[str, set[str]]:
    """Misconception -> the names it trains of `deep`."""
    everything, biases = {name for name, _ in model.named_parameters()}, {
        name for name, _ in model.named_parameters() if name.endswith("bias")}
    return {"the head's name is not looked at: it is the second argument": biases | {"score.weight"},
            "only the weight of the head itself is trained: a head may have layers": biases,
            "what has the head's name in another place is trained, too: body.classifier is not the head":
                biases | {name for name in everything if "classifier" in name}}


def _trained(answer: ModuleType, model: nn.Module, head: str, text: str,
             wrong_names: Callable[[nn.Module], dict[str, set[str]]]) -> None:
    """The names, and what requires a gradient, in one model."""
    right = set(right_names(model, head))
    answer.bitfit(model, head)
    flags = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    for what, names in ((f"trained_names(model, '{head}')", set(answer.trained_names(model, head))),
                        (f"what requires a gradient after bitfit(model, '{head}')", flags)):
        if names != right:
            because = next((name for name, wrong in wrong_names(model).items() if wrong == names), "")
            if because == "all is trained" and what.startswith("what"):
                because = "nothing is frozen: the rest has to stop requiring a gradient"
            raise Refused(what, _difference(names - right, right - names), f"{len(right)} names", text, because)


def _difference(more: set[str], fewer: set[str]) -> str:
    """Two sets of names in a few words."""
    both = ((more, "many"), (fewer, "few"))
    return "; ".join(f"{len(names)} too {word}, such as {min(names)}" for names, word in both if names)


def count(answer: ModuleType) -> None:
    model = gpt2()
    answer.bitfit(model, "score")
    expect_same("trained parameters: L (7 C + m) + C, and K C of the head", trained_count(model.parameters()),
                L * (7 * C + M) + C + K * C, given(L=L, C=C, m=M, K=K))


def saved(answer: ModuleType) -> None:
    model = gpt2()
    answer.bitfit(model, "score")
    kept, right = answer.to_save(model, "score"), set(right_names(model))
    if kept.keys() != right:
        because = "more than what is trained is saved" if kept.keys() > right else ""
        if right - kept.keys() == {"score.weight"}:
            because = "the head is not saved: predictions are random after loading"
        raise Refused("the names of to_save(model, 'score')", _difference(kept.keys() - right, right - kept.keys()),
                      f"{len(right)} names", because=because)
    values, base = {name: tensor.detach().clone() for name, tensor in kept.items()}, gpt2(seed=1)
    output = model(IDS).detach()
    for name, tensor in kept.items():
        expect(f"to_save(model, 'score')['{name}']", tensor, model.get_parameter(name).detach(), "random values")
        if tensor.requires_grad:
            raise Refused(f"to_save(model, 'score')['{name}'].requires_grad", "True", "False",
                          because="a saved tensor is a part of the graph, or a Parameter: detach the copy")
    randomized(model, seed=2)
    if not all(torch.equal(kept[name], values[name]) for name in values):
        raise Refused("a saved tensor after a training step", "other values", "those from before",
                      because="to_save returns the model's own tensors: they change with training; copy them")
    _loaded(answer, base, values, output)


def _loaded(answer: ModuleType, model: nn.Module, values: dict[str, Tensor], output: Tensor) -> None:
    """Loading into a model with the base's frozen values, and others in what is trained."""
    own = gpt2()
    for name, tensor in model.named_parameters():
        if name not in values:
            tensor.data.copy_(own.get_parameter(name))
    answer.bitfit(model, "score")
    objects, before = dict(model.named_parameters()), model(IDS).detach()
    answer.load(model, values)
    trained = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    half = gpt2(seed=1)
    half.load_state_dict({**model.state_dict(), "score.weight": half.score.weight})
    expect("model(ids) after load", model(IDS), output, given(ids=IDS),
           {"load changes nothing": before, "load leaves the head out": half(IDS)}
           if not close(half(IDS), output) else {})
    for name, tensor in model.named_parameters():
        if tensor is not objects[name]:
            raise Refused(f"{name} after load", "another object", "the same nn.Parameter", because=
                          "load puts new Parameters into the model: an optimizer still holds the old ones")
    if trained != set(right_names(model)):
        raise Refused("what requires a gradient after load", f"{len(trained)} tensors", f"{len(right_names(model))}",
                      because="load changes what is trained: training goes on after it")
    for name, values_before in {name: tensor.clone() for name, tensor in values.items()}.items():
        with torch.no_grad():
            model.get_parameter(name).add_(1)
        if not torch.equal(values[name], values_before):
            raise Refused(f"saved['{name}'] when the model is trained after load", "other values", "those of before",
                          because="load makes the saved tensors the model's own: they change with training; copy them")


def reference(answer: ModuleType) -> None:
    case = reference_case("bitfit")
    expect_same("trained_names(model, 'score')", sorted(answer.trained_names(gpt2(), "score")), case["names"],
                "this library's case bitfit in minipeft/check/references.json")
