"""What prompt tuning, P-tuning and prefix tuning share: V learned tokens before the text.

The tokens are one layer, `VirtualTokens`, a child of the base model (GPT2Model). It stands around each call of the
base model, whichever head asks for it:

    before the call     the mask gets V ones on its left, (batch, seq) -> (batch, V + seq): here, in `before`
                        the tokens are put in, the text's positions move on by V: `put_into`, in prompt.py and prefix.py
    the call            the base model, unchanged
    after the call      prompt.py cuts the V virtual positions off, so that heads and losses see the text alone

What the tokens are comes from an encoder, which is called without arguments and gives a table of V rows: a plain
`Table`, or a small network that makes the table. Only the table is saved, as `prompt_embeddings`. So a model that loads
an adapter always has a `Table`, whatever network it was trained with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from minipeft.errors import ConfigError
from minipeft.methods.config import MethodConfig
from minipeft.methods.injection import base_of, positions_left
from minipeft.methods.layers import AdapterLayer, AddedLayer
from minipeft.methods.turn import without_autocast
from minipeft.model.gpt2 import check_not_empty

_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "cache", "inputs_embeds")   # of GPT2Model.forward


class Table(nn.Module):
    """Virtual tokens stored as they are: a (V, width) matrix. width is C for a prompt, 2 L C for a prefix."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self) -> Tensor:
        return self.weight                                                    # (V, width)


class VirtualTokens(AddedLayer):
    """Learned tokens before the text. Subclasses say what they are: input vectors, or keys and values.

    Attributes:
        encoder: called without arguments, gives the (V, width) table. All of its parameters are trained.
        num_virtual_tokens: V.
    """

    def __init__(self, encoder: nn.Module, num_virtual_tokens: int) -> None:
        super().__init__()
        self.encoder, self.num_virtual_tokens = encoder, num_virtual_tokens

    @property
    def trained(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.named_parameters())

    @without_autocast
    def stored(self, name: str) -> dict[str, Tensor]:
        """The table alone, as the encoder makes it in eval mode, without dropout."""
        training = self.encoder.training
        # Without a gradient an LSTM takes another kernel, which rounds differently.
        with torch.enable_grad():
            table = self.encoder.eval()().detach()
        self.encoder.train(training)
        return {"prompt_embeddings": table}

    def restore(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Take over a saved table, in place of the encoder that there was."""
        device = next(self.parameters()).device
        self.encoder = Table(tensors["prompt_embeddings"].float().to(device))

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The base model's arguments, all by name, with the virtual tokens in the mask and wherever else they go."""
        call = dict.fromkeys(_ARGUMENTS) | dict(zip(_ARGUMENTS, args)) | kwargs     # those not given are None
        check_not_empty(call["input_ids"] if call["inputs_embeds"] is None else call["inputs_embeds"])
        if call["attention_mask"] is not None:
            # (batch, seq) -> (batch, V + seq). seq counts cached tokens, and a caller does not know of the virtual ones
            # among them: so the mask gets them at later calls, too.
            call["attention_mask"] = F.pad(call["attention_mask"], (self.num_virtual_tokens, 0), value=1)
        self.put_into(call, module)
        return (), call

    def put_into(self, call: dict[str, Any], module: nn.Module) -> None:
        """Put the virtual tokens into one call of the base model.

        Args:
            call: the call's arguments by name, to be changed in place. Each is there; those not given are None.
            module: the base model.
        """
        raise NotImplementedError


def check_room(model: nn.Module, num_virtual_tokens: int) -> None:
    """Refuse more virtual tokens than fit: at least one position is left to the text.

    Raises:
        ConfigError: saying how many fit.
    """
    left = positions_left(model)
    if num_virtual_tokens >= left:
        raise ConfigError(f"num_virtual_tokens={num_virtual_tokens}: this model has {left} positions left, so between "
                          f"1 and {left - 1} virtual tokens fit before a text")


def place_of(model: nn.Module, child: str) -> str:
    """The name that a child of the base model has in `model`, which is the base model or one with a head."""
    return f"transformer.{child}" if base_of(model) is not model else child


@dataclass
class VirtualTokensConfig(MethodConfig):
    """How adapter_config.json describes virtual tokens: the fields that all three methods write and check.

    peft names the base's own tensors, the head's here, without the second "model." that other methods' files have.
    """

    base_prefix: ClassVar[str] = "base_model."
    needs_task: ClassVar[bool] = True
    more_fields: ClassVar[tuple[str, ...]] = ("token_dim", "num_layers", "num_attention_heads",
                                              "num_transformer_submodules")

    def to_saved(self, model: nn.Module, layers: dict[str, AdapterLayer]) -> dict[str, Any]:
        """What adapter_config.json says beyond the fields of the configuration."""
        return _dimensions(model)

    @classmethod
    def from_saved(cls, values: dict[str, Any], model: nn.Module) -> Any:
        """A configuration from adapter_config.json's values.

        Raises:
            ConfigError: it describes a model of other dimensions, or does not say num_virtual_tokens.
        """
        for key, wanted in _dimensions(model).items():
            if values.pop(key, None) not in (None, wanted):
                raise ConfigError(f"the adapter was made for another {key}; this model's is {wanted}")
        if "num_virtual_tokens" not in values:
            raise ConfigError("the adapter's configuration does not say num_virtual_tokens")
        return cls(**values)


def _dimensions(model: nn.Module) -> dict[str, int]:
    """The base model's dimensions, which fix the shape of the table, in peft's words."""
    config = model.config
    return {"token_dim": config.n_embd, "num_layers": config.n_layer, "num_attention_heads": config.n_head,
            "num_transformer_submodules": 1}
