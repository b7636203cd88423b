"""Full fine-tuning: every weight is trained. What parameter-efficient methods are compared with.

No layer is added or replaced: the model's own tensors move. Any change of W can be reached, where LoRA reaches only a
product of two thin matrices. The price is memory, and a file as large as the model for every task.

    y = x W^T + bias
    mean_next = 0.9 * mean + 0.1 * g
    square_next = 0.999 * square + 0.001 * g^2
    theta_next = theta - rate * (mean_next / (1 - 0.9^t) / (sqrt(square_next / (1 - 0.999^t)) + eps) + decay * theta)

                x (batch, seq, in)
                |
         W (out, in)  trained         its gradient is the sum over batch and seq of (y's gradient) x^T, (out, in)
                |
                |  + bias (out,)      trained; its gradient is the sum of y's gradient
                |
                y (batch, seq, out)

By hand: theta = 1, g = 0.5, mean = 0, square = 0, t = 1, rate = 0.1, decay = 0.01 and, to keep it short, eps = 0 give
mean_next = 0.05, square_next = 0.00025, theta_next = 0.899.

Symbols
    x (batch, seq, in) a layer's input      y (batch, seq, out) its output      W (out, in), bias (out,) trained
    theta any tensor of the model, theta_next what a step of AdamW makes of it; both in its own shape
    t the number of this step, 1 for the first      g the gradient of theta, in its shape. Training clips it before the
    step: all gradients together have a length of max_grad_norm at most, by default 1.
    mean, square AdamW's running means of g and g^2, each in theta's shape and 0 before the first step; mean_next,
    square_next are those after this step. As they begin at 0, they are too small in the first steps; to divide by
    1 - 0.9^t and 1 - 0.999^t corrects that. At t = 1 the quotients are g and g^2. So where g is not 0, theta moves by
    about rate against the sign of g; decay comes on top.
    rate the learning rate of this step. In the first w = round(warmup_ratio * N) of N steps (warmup_ratio is 0.06 by
    default) it is learning_rate * t / w, then learning_rate * (1 + cos(pi * (t - 1 - w) / (N - w))) / 2. As
    learning_rate `scripts/train.py --method full` takes 3e-4 for classification.
    decay is `weight_decay`, by default 0.01, for the matrices of linear layers, and 0 for all else. A language model's
    head that is wte, as GPT-2's is, does not decay.
    eps = 1e-8      sqrt the square root, number by number
Trained
    Everything: embeddings, matrices, biases, LayerNorms, and a new classification head. A model in half precision
    becomes float32: most small steps would change no half-precision number.
Frozen
    Nothing: `inject`, which puts the method into a model, sets requires_grad to True on every parameter.
At step 0
    FullConfig()    is the base model, bit for bit: nothing is added, and nothing has moved yet
    Both models, this one and the base, have the same new head here; it is random. A base in half precision computes in
    float32 from now on: there it is the base model up to rounding.
Positions and mask
    Untouched: positions, masks, the KV cache and the longest text, 1,024 tokens, are the base's.
Saved
    No adapter folder and no adapter_config.json: `save_adapter` answers "full has no adapter to save: use
    save_pretrained". `save_pretrained` writes the whole model, all 124,441,344 numbers, as config.json and
    model.safetensors, which transformers loads. Among its tensors are
    transformer.wte.weight (50257, 768)
    transformer.wpe.weight (1024, 768)
    transformer.h.0.ln_1.weight (768,)
    transformer.h.0.attn.c_attn.weight (768, 2304)
    transformer.h.0.attn.c_attn.bias (2304,)
    transformer.h.0.attn.c_proj.weight (768, 768)
    transformer.h.0.ln_2.weight (768,)
    transformer.h.0.mlp.c_fc.weight (768, 3072)
    transformer.h.0.mlp.c_proj.weight (3072, 768)
    transformer.ln_f.weight (768,)
    score.weight (2, 768)
    and so for every block. Every matrix and LayerNorm of this list but wte, wpe and score also has a bias. The 2 is the
    number of labels. Tagging has classifier.weight and classifier.bias in score's place, a language model nothing. The
    blocks' matrices are stored as (in, out), as GPT-2's always were, and the head as (out, in). peft has no such
    method.
Merging
    Not possible, and not needed: the trained weights are the model's own. No copy of the base is kept, so `remove`,
    `disable_adapter` and `load_adapter` raise the InjectionError that stands last under "Errors". A model that is
    fine-tuned whole carries no second method: for each task there is a whole model of its own.
Cost
    wte 50,257 * 768 = 38,597,376, wpe 1,024 * 768 = 786,432, ln_f 2 * 768 = 1,536, the head 2 * 768 = 1,536, and per
    block (768 * 2304 + 2304) + (768 * 768 + 768) + (768 * 3072 + 3072) + (3072 * 768 + 768) + 4 * 768 = 7,087,872.
    In all 38,597,376 + 786,432 + 12 * 7,087,872 + 1,536 + 1,536 = 124,441,344 trained; without a new head 124,439,808.
    Forward: what the base takes, 2 * in * out operations per token and matrix (in * out products, as many sums), and
    4 S C per token and block in attention, over the S tokens that it sees; C = 768 channels.
    Backward: per token and matrix 2 * in * out operations for the gradient of x, and as many for that of W, which is a
    product with x. So each layer keeps its x for the backward pass. Where W is frozen, its gradient is not computed and
    x is not kept for it.
    Kept are, per block and token, the inputs of both LayerNorms (2 C) and of the four matrices (7 C), one of which is
    attention's output, q, k, v (3 C) and gelu's input (4 C): 2 + 7 + 3 + 4 = 16 C numbers. Frozen matrices leave 10 C:
    of their inputs only attention's output is kept. The softmax's shares are not kept: attention computes them again.
    In training the base's dropout adds 2 C bytes per block and token. In attention (attn_pdrop) a CPU keeps a byte per
    share, and a GPU's fused attention nothing.
    Optimizer: 8 bytes per parameter for AdamW's two means, 995,530,752 bytes. With the gradient that is 12 bytes per
    parameter, beside 4 of its own: 16 * 124,441,344 = 1,991,061,504 bytes before any activation. A run that keeps its
    best values has 4 more per parameter. The optimizer's time, too, grows with the trained parameters, here all of
    them.
Errors
    In this list the class of each error stands before its message. There are no settings to be wrong; `inject` raises
    before it changes anything. A text with more tokens than positions is a ConfigError when the model reads it; values
    of a caller's own position_ids are not checked.
    inject(inject(model, LoraConfig()), FullConfig())
        InjectionError: this model already carries lora, which does not combine with full: remove it, or start from a
        fresh model
    merge(inject(model, FullConfig()))
        InjectionError: there is nothing to merge: full trains the model's own tensors
    save_adapter(inject(model, FullConfig()), "folder")
        AdapterError: full has no adapter to save: use save_pretrained
    remove(inject(model, FullConfig()))
        InjectionError: full keeps no copy of the base model's weights: load it anew
Differs from the paper
    The first paper unfreezes layer by layer, from the last one down, and gives lower layers smaller learning rates.
    Here all layers are trained from the start, at one rate. Loshchilov and Hutter let every weight decay, by an amount
    that does not depend on the peak rate. Here only the matrices of linear layers do, by decay * rate, as in PyTorch.

Papers: Howard, Ruder (2018), "Universal Language Model Fine-tuning for Text Classification", arXiv 1801.06146.
Loshchilov, Hutter (2017), "Decoupled Weight Decay Regularization", 1711.05101, for AdamW.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn as nn

from minipeft.methods.config import MethodConfig
from minipeft.methods.injection import Plan
from minipeft.methods.symbols import Seen, Symbols


@dataclass
class FullConfig(MethodConfig):
    """Full fine-tuning has nothing to choose, and leaves a whole model instead of an adapter."""

    method: ClassVar[str] = "full"
    saves_adapter: ClassVar[bool] = False


def plan(model: nn.Module, config: FullConfig) -> Plan:
    """Train every parameter; no layer is replaced, and no copy of the base is kept."""
    return Plan(trained=[name for name, _ in model.named_parameters()], keeps_base=False)


def symbols(seen: Seen) -> Symbols:
    """What the symbols stand for in one linear layer, W being theta: `minipeft anatomy --trace` computes with them."""
    layer = seen.layer
    if not isinstance(layer, nn.Linear):
        return Symbols({})
    step = seen.step(layer.weight)
    return Symbols({"x": seen.x, "W": layer.weight, "bias": layer.bias, "y": seen.y, "theta": step.before,
                    "g": step.gradient, "mean": step.means[0], "square": step.means[1], "t": step.number,
                    "rate": step.rate, "decay": step.decay, "eps": step.eps, "theta_next": step.after,
                    "mean_next": step.next_means[0], "square_next": step.next_means[1]})
