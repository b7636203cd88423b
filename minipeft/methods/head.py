"""Head-only training: the base model is a fixed feature extractor, and a linear classifier is trained on its output.

Nothing below the head changes. So in text classification each text's feature has to be computed only once, however many
epochs follow. Also known as linear probing. What it reaches is what the base already knows; the other methods are
compared with it.

    logits = h_last W^T               text classification
    logits = dropout(h) W^T + bias    tagging

         input_ids (batch, seq)
                |
           base model  frozen
                |
         h (batch, seq, width)  the hidden states
                |
         h_last (batch, width)  that of the last real token
                |
         W (labels, width)  trained, starts random
                |
         logits (batch, labels)

The picture shows text classification. In tagging W reads dropout(h), all tokens' hidden states.

By hand: W = [[1, 2], [3, 4]], h_last = [1, 1] give logits = [3, 7].

Symbols
    h (batch, seq, width) the base model's output, after its last LayerNorm; width is 768 for GPT-2
    h_last (batch, width) the hidden state of each text's last real token, which has seen the whole text
    W (labels, width) is score.weight or, in tagging, classifier.weight      bias (labels,) is classifier.bias
    dropout(h) in training sets each number of h to 0 with probability p = classifier_dropout (0.1) and divides it by
    1 - p otherwise. Outside of training it is h.
    logits (batch, labels), in tagging (batch, seq, labels): one number per label, before the softmax
Trained
    The new head alone: W and, in tagging, bias. Every other method trains it too, beside its own parameters. W starts
    normal, with deviation 0.02 (initializer_range), and bias at 0. On a half-precision base both are float32.
Frozen
    The whole base model: `inject`, which puts the method into a model, sets requires_grad to False, so no gradient is
    computed for it and the optimizer never sees it.
At step 0
    HeadConfig()    is the base model, bit for bit: no layer is added
    Both models, this one and the base, have the same new head here; it is random. So the first predictions are guesses.
    On a half-precision base the head computes in float32: there the logits are equal up to rounding.
Positions and mask
    Untouched. The attention mask also says which token is a text's last real one, on whichever side the padding is.
    Without a mask it is the last token, padding or not. position_ids count as in the base, and a text may have all
    1,024 positions. The models with a new head take no KV cache.
Saved
    In adapter_model.safetensors:
    base_model.model.score.weight (2, 768)
    In tagging base_model.model.classifier.weight (2, 768) and base_model.model.classifier.bias (2,) take its place.
    adapter_config.json must say peft_type MINIPEFT_HEAD; there are no settings. It need not say task_type: the head's
    name shows it. Only this library reads the folder: peft, Hugging Face's library, has no such method.
    All tensors are float32, but for a model that was cast after `inject`. A third file, minipeft.json, holds the base
    model's fingerprint, the digests of the other two files, and what a run adds, such as the labels' names. Without it
    the folder loads, too.
Merging
    Not possible, and not needed: no layer is added. Switching exchanges heads: each adapter has one of its own, and
    `disable_adapter` and `remove` put back the one that the model had before, which is kept for that.
    Several adapters. A second `inject` of the same method is an InjectionError. `load_adapter(model, folder, name)`
    adds a saved adapter, of this method or another, under another name. It becomes the active one, the one that
    computes. The others stay, switched off. The model is in eval mode then. `set_adapter(model, name)` makes another
    one active. Head-only training combines with no other method.
Cost
    labels * width parameters: 2 * 768 = 1,536 trained and 124,441,344 - 1,536 = 124,439,808 frozen. Tagging has a bias
    besides: 2 * 768 + 2 = 1,538.
    Forward: the base, once per text. In eval mode, without dropout, a text's h_last is the same in every epoch;
    scripts/train.py computes it once (runs/features.py), and the base is in eval mode then. It is kept in float32:
    4 * 768 = 3,072 bytes per text. From then on a text costs 2 labels width operations.
    In tagging a text has a feature for each token. These are too many to keep, so the base reads each text in every
    epoch. It is in training mode then, and its dropout acts. A run sets resid_pdrop, embd_pdrop and attn_pdrop: to 0,
    or to what `--dropout` says. It leaves classifier_dropout as config.json has it.
    Backward: it ends at the head. The gradients of W and, in tagging, bias are all there is; W's takes as many
    operations as the head's forward. No gradient passes through the base, and of its activations only the head's input
    is kept.
    Optimizer: 8 bytes per trained parameter for AdamW's two means, 12,288 bytes, in tagging 12,304; gradients take half
    of that. The optimizer's time, too, grows with the trained parameters alone. Weight decay acts on W. The earlier
    head, kept aside: 4 * 1,536 = 6,144 bytes in float32, in tagging 6,152.
Errors
    In this list the class of each error stands before its message. There are no settings to be wrong; `inject` raises
    before it changes anything. `load_adapter` raises an AdapterError, and leaves the model as it was, in these cases. A
    file is missing, damaged or not the one whose digest minipeft.json holds. A tensor is missing, unexpected, of
    another shape, of integers or not finite; the message names it. minipeft.json has another base model's fingerprint;
    a base of another dtype is not compared. The folder is for another task. The peft_type is unknown. A setting in
    adapter_config.json that would change the numbers, and that minipeft does not implement, is a ConfigError. An
    adapter's name that is taken (`load_adapter`) or unknown (`set_adapter`, `remove`) is an InjectionError. A text with
    more tokens than positions is a ConfigError when the model reads it; values of a caller's own position_ids are not
    checked.
    inject(GPT2LMHeadModel(model.config), HeadConfig())
        InjectionError: GPT2LMHeadModel has no classification head to train
    inject(inject(model, HeadConfig()), LoraConfig())
        InjectionError: this model already carries head, which does not combine with lora: remove it, or start from a
        fresh model
    merge(inject(model, HeadConfig()))
        InjectionError: there is nothing to merge: head trains the model's own tensors
Differs from the paper
    The paper puts a probe on every layer, to see what each of them holds, and on image classifiers. Here there is one
    probe, on the last layer, and its labels are the result.

Paper: Alain, Bengio (2016), "Understanding intermediate layers using linear classifier probes", arXiv 1610.01644.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn as nn

from minipeft.errors import InjectionError
from minipeft.methods.config import MethodConfig
from minipeft.methods.injection import Plan
from minipeft.methods.symbols import Seen, Symbols


@dataclass
class HeadConfig(MethodConfig):
    """Head-only training has nothing to choose. Its adapter files are this library's own: peft has no such method."""

    method: ClassVar[str] = "head"
    peft_type: ClassVar[str] = "MINIPEFT_HEAD"


def plan(model: nn.Module, config: HeadConfig) -> Plan:
    """Train the new head, which every method does, and nothing else.

    Raises:
        InjectionError: a model without a new head.
    """
    if not getattr(model, "has_new_head", False):
        raise InjectionError(f"{type(model).__name__} has no classification head to train")
    return Plan()


def symbols(seen: Seen) -> Symbols:
    """What the equation's symbols stand for: the first line's in text classification, the second's in tagging.

    `minipeft anatomy --trace` computes with them. It runs the model in eval mode, where dropout changes nothing.
    """
    head, what_it_reads = seen.layer, seen.x
    if head.bias is None:
        return Symbols({"h_last": what_it_reads, "W": head.weight, "logits": seen.y})
    return Symbols({"h": what_it_reads, "dropout": nn.Identity(), "W": head.weight, "bias": head.bias,
                    "logits": seen.y})
