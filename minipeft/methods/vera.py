r"""VeRA: vector-based random matrix adaptation.

LoRA with its two matrices drawn at random once, frozen, and shared by all targets. What is trained are two vectors per
target, one between the matrices and one after them. The matrices follow from a seed and need not be stored.

    y = x W^T + bias + b * ((d * (dropout(x) A^T)) B^T)

                x (batch, seq, in)
                |         \
                |        A (r, in)            A and B are random and frozen, one pair for all targets
         W (out, in)        |  * d (r,)       d starts at d_initial
          frozen            |
                |        B (out, r)
                |         /  * b (out,)       b starts at zero: step 0 is the base model, exactly
                +--------+
                |
                y (batch, seq, out)

By hand: r = 1, W = [[1, 0], [0, 1]], bias = [0, 0], A = [[1, 2]], d = [0.5], B = [[2], [1]], b = [1, 3], x = [1, 1]
give x A^T = [3], d * (x A^T) = [1.5], y = [4, 5.5].

Symbols
    x (batch, seq, in) the layer's input      y (batch, seq, out) its output      * multiplies number by number
    W (out, in) frozen; bias (out,) frozen, too, by default      r the rank; it may be larger than in and out
    A (r, in) is vera_A, uniform between -sqrt(6 / in) and sqrt(6 / in); B (out, r) is vera_B, uniform between
    -sqrt(6 / r) and sqrt(6 / r). All targets share this pair. Its `in`, also under the root, is the largest among the
    targets', and so is its `out`. A smaller target uses A's first columns and B's first rows.
    d (r,) is vera_lambda_d, b (out,) is vera_lambda_b: trained, each target has its own
    dropout(x) is x; in training each number is set to 0 with probability vera_dropout, else divided by 1 - vera_dropout
Trained
    d and b of each target, a linear layer that is adapted; a new classification head. By default the targets are all
    modules called c_attn. With `bias` "vera_only" the targets' biases too, with "all" every bias of the base, those of
    LayerNorms included.
Frozen
    Everything else: `inject`, which puts the method into a model, sets requires_grad to False. By default these are
    124,439,808 numbers, with `bias` "vera_only" 27,648 fewer, with "all" 102,144 fewer. A and B are buffers, not
    parameters: no optimizer sees them, and the model's state_dict does not hold them.
At step 0
    VeraConfig()                 is the base model, bit for bit: b = 0, so the update is 0
    VeraConfig(d_initial=1.0)    is the base model, bit for bit: b = 0, whatever d is. b always starts at 0.
    While b = 0, d's gradient is 0 too: the first step learns b, the new head and trained biases, not d. With
    d_initial=0.0 b's gradient is 0, too, and neither is ever learned.
    Both models, this one and the base, have the same new head here; it is random. On a half-precision base it is
    float32, and its logits equal the base's up to rounding.
Positions and mask
    Untouched. Each token is updated by itself; a text may have all 1,024 positions, as before; one with more is a
    ConfigError.
    KV cache. As large as the base's. It holds adapted keys and values: when the adapter changes, begin a new one.
    Pads. They are changed, too, but no real token sees a pad, on either side.
    Gradient checkpointing. All of this is a part of its block and is computed again with it.
Saved
    In adapter_model.safetensors:
    base_model.model.transformer.h.0.attn.c_attn.vera_lambda_d (256,)
    base_model.model.transformer.h.0.attn.c_attn.vera_lambda_b (2304,)
    base_model.vera_A (256, 768)
    base_model.vera_B (2304, 256)
    base_model.model.score.weight (2, 768)
    and so d and b for every target. score.weight is (labels, 768); all totals here are for 2 labels. Tagging has
    classifier.weight (labels, 768) and classifier.bias (labels,) in its place, a language model nothing.
    adapter_config.json must say peft_type VERA, r, target_modules, projection_prng_key and save_projection. d_initial
    need not be there, since d is. `save_adapter` writes every setting; "all-linear" becomes full names of modules. For
    peft, Hugging Face's library, it adds init_weights true and fan_in_fan_out true, as transformers stores GPT-2's
    matrices as (in, out).
    With `bias` "vera_only" also the bias of every target, with "all" every bias of the base. In block 0, and last:
        base_model.model.transformer.h.0.attn.c_attn.base_layer.bias (2304,)
        base_model.model.transformer.h.0.ln_1.bias (768,)
        base_model.model.transformer.h.0.attn.c_proj.bias (768,)
        base_model.model.transformer.h.0.ln_2.bias (768,)
        base_model.model.transformer.h.0.mlp.c_fc.bias (3072,)
        base_model.model.transformer.h.0.mlp.c_proj.bias (768,)
        base_model.model.transformer.ln_f.bias (768,)
    Only the bias of a target has `base_layer` in its name. adapter_config.json must then say `bias`.
    With save_projection=False the file holds no A and B: loading draws them again from projection_prng_key, the seed.
    peft draws the same numbers from it. A version of PyTorch that draws others gives another update, and nothing
    notices.
    All tensors are float32, but for a model that was cast after `inject`. A third file, minipeft.json, holds the base
    model's fingerprint, the digests of the other two files, and what a run adds, such as the labels' names. Without it
    the folder loads, too. Where several methods work under one name, each has a sub-folder with these three files, such
    as lora/ and bitfit/. A minipeft.json beside the sub-folders names them.
Merging
    W <- W + diag(b) B diag(d) A, the layer's own `weight`; its bias stays. Every target can be merged; dropout is not
    part of W. `merge` keeps the W it found, and `unmerge` puts it back, bit for bit. Merged and unmerged outputs agree
    up to rounding. On a half-precision base d, b, A and B are float32. The sum is rounded once, to W's type: an element
    of the update that is too small beside W's is lost. Unmerged, y is rounded before the update is added, and again
    after it.
    Order. `merge` folds in the active adapter. While it is merged, a second `merge`, `inject`, `load_adapter`,
    `set_adapter` and `disable_adapter` are an InjectionError, and `save_adapter` is an AdapterError; `remove` unmerges
    first. When nothing is merged, `unmerge` is an InjectionError.
    Several adapters. A second `inject` of the same method is an InjectionError. `load_adapter(model, folder, name)`
    adds a saved adapter, of this method or another, under another name. It becomes the active one, the one that
    computes. The others stay, switched off. The model is in eval mode then. `set_adapter(model, name)` makes another
    one active. Under one name other methods may work along that have other targets or none, such as BitFit or a prompt,
    but neither full nor head. Beside a bottleneck adapter, a prompt or a prefix `merge` is refused, and nothing is
    merged. Beside BitFit it merges, and the trained biases stay.
    Each adapter has an A and a B of its own.
Cost
    r + out parameters per target: 256 + 2304 = 2,560 for a c_attn of GPT-2, and for all twelve 12 * 2,560 = 30,720.
    With the new head, which a language model lacks, 12 * 2,560 + 1,536 = 32,256 trained. A and B are
    256 * (768 + 2304) = 786,432 frozen numbers, once: 4 * 786,432 = 3,145,728 bytes in float32.
    VeraConfig(bias="vera_only")               trains 59,904: 12 * 2304 = 27,648 more
    VeraConfig(bias="all")                     trains 134,400: 12 * 8,448 + 768 = 102,144 more
    VeraConfig(target_modules="all-linear")    trains 96,768: c_attn, attn.c_proj, c_fc and mlp.c_proj of each block
                                                 have 2304 + 768 + 3072 + 768 = 6,912 in b, so in all
                                                 12 * (4 * 256 + 6,912) + 1,536 = 96,768; A (256, 3072), B (3072, 256)
    Forward: 2 r (in + out) operations per token and target beside 2 in out, 44 % more for a c_attn at r = 256. At
    inference the same; merged, not one more, but the kept W takes 4 * 1,769,472 = 7,077,888 bytes more per c_attn in
    float32.
    Backward: the gradient of x passes through W, and through B and A, 2 r (in + out) operations more. W, A and B have
    no gradients of their own. Kept: dropout(x) A^T (batch, seq, r) for d's gradient, (d * dropout(x) A^T) B^T
    (batch, seq, out) for b's, and with dropout its mask, a byte per number of x; x itself is not needed. In all a block
    above the lowest keeps 13 C + r numbers per token, C = 768 channels: these, and 10 C of the block itself (the inputs
    of both LayerNorms 2 C, q, k, v 3 C, attention's output C, gelu's input 4 C). Full fine-tuning keeps 16 C.
    Optimizer: 8 bytes per trained parameter for AdamW's two means, 258,048 bytes; gradients take half of that. The
    optimizer's time, too, grows with the trained parameters alone. Weight decay acts on the head's matrix alone.
Errors
    In this list the class of each error stands before its message. Most wrong values are found when the configuration
    is made, the others by `inject`, before it changes anything. `load_adapter` raises an AdapterError, and leaves the
    model as it was, in these cases. A file is missing, damaged or not the one whose digest minipeft.json holds. A
    tensor is missing, unexpected, of another shape, of integers or not finite; the message names it. minipeft.json has
    another base model's fingerprint; a base of another dtype is not compared. The folder is for another task. The
    peft_type is unknown. A setting in adapter_config.json that would change the numbers, and that minipeft does not
    implement, is a ConfigError. An adapter's name that is taken (`load_adapter`) or unknown (`set_adapter`, `remove`)
    is an InjectionError. A bad regular expression in a setting is a ConfigError when `inject` uses it.
    VeraConfig(projection_prng_key=-1)
        ConfigError: projection_prng_key must be a number from 0 to 2**63 - 1, got -1
    VeraConfig(vera_dropout=1.0)
        ConfigError: vera_dropout must be a probability in [0, 1), got 1.0
    VeraConfig(bias="lora_only")
        ConfigError: bias must be one of none, vera_only, all, got 'lora_only'
    inject(model, VeraConfig(target_modules=["score"]))
        InjectionError: target_modules 'score' match nothing; nearest names: attn.c_attn, attn.c_proj, c_attn, c_fc,
        c_proj, mlp.c_fc, mlp.c_proj
    inject(inject(model, LoraConfig()), VeraConfig())
        InjectionError: transformer.h.0.attn.c_attn already carries a LoRALinear: remove it first
Differs from the paper
    The paper adapts the query and the value matrix; GPT-2 has query, key and value in one matrix, c_attn, which is
    adapted whole. The paper keeps only the seed; here, as in peft, A and B are stored too by default, since another
    version of PyTorch may draw other numbers. That smaller targets use a part of A and B is peft's rule. From peft it
    differs in that each adapter draws an A and a B of its own, where peft wants one seed for all; and peft's unmerge
    computes W with rounding, its disable_adapter leaves trained biases in place.

Paper: Kopiczko, Blankevoort, Asano (2023), "VeRA: Vector-based Random Matrix Adaptation", arXiv 2310.11454.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from minipeft.methods.config import MethodConfig
from minipeft.methods.injection import Plan
from minipeft.methods.layers import AdapterLayer, ReplacementLayer, to_dtype_of
from minipeft.methods.symbols import Seen, Symbols
from minipeft.methods.targets import bias_names, find_targets, saved_targets
from minipeft.model.dropout import Dropout
from minipeft.model.linear import linear
from minipeft.settings import FINITE, POSITIVE_INTEGER, PROBABILITY, SEED, setting


@dataclass
class VeraConfig(MethodConfig):
    """peft's VeraConfig, as far as it changes GPT-2's numbers.

    The defaults are peft's. The command line starts from r 64 and all linear layers, which suit the bundled base: see
    runs/defaults.py.

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """

    method: ClassVar[str] = "vera"
    peft_type: ClassVar[str] = "VERA"
    # A field of peft's that a file may set and that changes nothing here.
    harmless: ClassVar[tuple[str, ...]] = ("init_weights",)

    r: int = setting(256, "rank of the shared matrices", POSITIVE_INTEGER)
    vera_dropout: float = setting(0.0, "dropout on the adapter's input", PROBABILITY)
    target_modules: str | list[str] | None = setting(
        None, "module names, one regular expression, or all-linear; default c_attn")
    layers_to_transform: int | list[int] | None = setting(None, "numbers of the blocks to adapt; default all")
    layers_pattern: str | list[str] | None = setting(None, "name before the block number, GPT-2: h")
    projection_prng_key: int = setting(0, "seed of the shared matrices", SEED)
    save_projection: bool = setting(True, "store the shared matrices in the adapter file too")
    d_initial: float = setting(0.1, "where d starts", FINITE)
    bias: str = setting("none", "biases to train too", choices=("none", "vera_only", "all"))

    def to_saved(self, model: nn.Module, layers: dict[str, AdapterLayer]) -> dict[str, Any]:
        """What adapter_config.json says beyond, or other than, the fields above."""
        return {"target_modules": saved_targets(self.target_modules, layers), "fan_in_fan_out": True,
                "init_weights": True}


class Projections(nn.Module):
    """The pair of frozen random matrices that all targets share: A (r, in) and B (out, r)."""

    def __init__(self, r: int, in_features: int, out_features: int, seed: int, device: torch.device) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        # Always drawn on the CPU, so that a seed means the same numbers on every device.
        vera_A = _uniform((r, in_features), generator)
        vera_B = _uniform((out_features, r), generator)
        self.register_buffer("vera_A", vera_A.to(device), persistent=False)
        self.register_buffer("vera_B", vera_B.to(device), persistent=False)


def _uniform(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A matrix (out, in) of numbers between -sqrt(6 / in) and sqrt(6 / in): Kaiming's rule."""
    bound = math.sqrt(6 / shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


class VeRALinear(ReplacementLayer):
    """A frozen linear layer with two trained vectors around the shared random matrices."""

    trained = ("vera_lambda_d", "vera_lambda_b")

    def __init__(self, base_layer: nn.Linear, projections: Projections, config: VeraConfig) -> None:
        super().__init__(base_layer)
        device = base_layer.weight.device
        self.projections, self.save_projection = projections, config.save_projection
        self.vera_dropout = Dropout(config.vera_dropout)
        self.vera_lambda_d = nn.Parameter(torch.full((config.r,), float(config.d_initial), device=device))
        self.vera_lambda_b = nn.Parameter(torch.zeros(base_layer.out_features, device=device))

    def matrices(self) -> tuple[Tensor, Tensor]:
        """This target's part of the shared matrices: the first columns of A, (r, in), the first rows of B, (out, r)."""
        base = self.base_layer
        return self.projections.vera_A[:, :base.in_features], self.projections.vera_B[:base.out_features]

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)                                                # (batch, seq, in) -> (batch, seq, out)
        A, B = self.matrices()
        x = self.vera_dropout(to_dtype_of(self.vera_lambda_d, x))             # float32 beside a half-precision W
        inner = self.vera_lambda_d * linear(x, A)                             # (batch, seq, r)
        update = self.vera_lambda_b * linear(inner, B)                        # (batch, seq, out)
        return (y + update).to(y.dtype)

    def merged(self) -> dict[str, Tensor]:
        """W + diag(b) B diag(d) A."""
        A, B = self.matrices()
        update = (self.vera_lambda_b[:, None] * B) @ (self.vera_lambda_d[:, None] * A)       # (out, in)
        return {"weight": (self.base_layer.weight + update).to(self.base_layer.weight.dtype)}

    def stored(self, name: str) -> dict[str, Tensor]:
        """d and b; also A and B, whole, unless loading is to draw them from the seed."""
        shared = {f"base_model.{key}": buffer for key, buffer in self.projections.named_buffers()}
        return super().stored(name) | (shared if self.save_projection else {})


def plan(model: nn.Module, config: VeraConfig) -> Plan:
    """Put two trained vectors and the shared matrices beside every targeted linear layer.

    Raises:
        ConfigError: a block that the model does not have.
        InjectionError: nothing targeted, or a target that cannot be adapted.
    """
    targets = {target: model.get_submodule(target) for target in find_targets(model, config, default=["c_attn"])}
    projections = Projections(config.r, max(layer.in_features for layer in targets.values()),
                              max(layer.out_features for layer in targets.values()), config.projection_prng_key,
                              next(iter(targets.values())).weight.device)
    layers = {target: VeRALinear(layer, projections, config) for target, layer in targets.items()}
    biases = [] if config.bias == "none" else bias_names(model, among=None if config.bias == "all" else layers)
    return Plan(layers, biases)


def symbols(seen: Seen) -> Symbols:
    """What the equation's symbols stand for at one target."""
    layer, base, (A, B) = seen.layer, seen.layer.base_layer, seen.layer.matrices()
    return Symbols({"x": seen.x, "W": base.weight, "bias": base.bias, "A": A, "B": B, "d": layer.vera_lambda_d,
                    "b": layer.vera_lambda_b, "dropout": layer.vera_dropout, "y": seen.y})
