"""What prompt tuning, P-tuning and prefix tuning share: learned tokens before the text.

The virtual tokens are one module of the base model, computed by an encoder (a plain table, or a small network that only
training needs) as a table of V rows. They take the first V positions, and the text's own come after them.
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

_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "cache", "inputs_embeds")   # of GPT2Model.forward


class Table(nn.Module):
    """Virtual tokens stored as they are: a (V, width) matrix."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self) -> Tensor:
        return self.weight                                                    # (V, width)


class VirtualTokens(AddedLayer):
    """Learned tokens before the text. Subclasses say what they are: input vectors, or keys and values.

    Attributes:
        encoder: called without arguments, gives the (V, width) table.
        num_virtual_tokens: V.
    """

    def __init__(self, encoder: nn.Module, num_virtual_tokens: int) -> None:
        super().__init__()
        self.encoder, self.num_virtual_tokens = encoder, num_virtual_tokens

    @property
    def trained(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.named_parameters())

    def stored(self, name: str) -> dict[str, Tensor]:
        """Only the table: the network that made it is not needed any more. It is made in eval mode, without dropout."""
        training = self.encoder.training
        with torch.enable_grad():  # without a gradient an LSTM takes another kernel, which rounds differently
            table = self.encoder.eval()().detach()
        self.encoder.train(training)
        return {"prompt_embeddings": table}

    def restore(self, name: str, tensors: dict[str, Tensor]) -> None:
        device = next(self.parameters()).device
        self.encoder = Table(tensors["prompt_embeddings"].float().to(device))

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The base model's arguments, all by name, with the virtual tokens in the mask and wherever else they go."""
        call = dict.fromkeys(_ARGUMENTS) | dict(zip(_ARGUMENTS, args)) | kwargs
        if call["attention_mask"] is not None:
            call["attention_mask"] = F.pad(call["attention_mask"], (self.num_virtual_tokens, 0), value=1)
            # (batch, seq) -> (batch, V + seq): every token sees the virtual ones
        self.put_into(call, module)
        return (), call

    def put_into(self, call: dict[str, Any], module: nn.Module) -> None:
        """Change the arguments of one call of the base model, each of them there and perhaps None."""
        raise NotImplementedError


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of what the blocks compute."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def check_room(model: nn.Module, num_virtual_tokens: int) -> None:
    """Refuse more virtual tokens than fit, at least one position being the text's.

    Raises:
        ConfigError: saying how many fit.
    """
    left = positions_left(model)
    if num_virtual_tokens >= left:
        raise ConfigError(f"num_virtual_tokens={num_virtual_tokens}: this model has {left} positions left, so between "
                          f"1 and {left - 1} virtual tokens fit before a text")


def place_of(model: nn.Module, child: str) -> str:
    """The name of a child added to the base model."""
    return f"transformer.{child}" if base_of(model) is not model else child


@dataclass
class VirtualTokensConfig(MethodConfig):
    """How adapter_config.json describes virtual tokens: the fields that all three methods add and check."""

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
            ConfigError: it describes a model of other dimensions.
        """
        for key, wanted in _dimensions(model).items():
            if values.pop(key, None) not in (None, wanted):
                raise ConfigError(f"the adapter was made for another {key}; this model's is {wanted}")
        if "num_virtual_tokens" not in values:
            raise ConfigError("the adapter's configuration does not say num_virtual_tokens")
        return cls(**values)


def _dimensions(model: nn.Module) -> dict[str, int]:
    config = model.config
    return {"token_dim": config.n_embd, "num_layers": config.n_layer, "num_attention_heads": config.n_head,
            "num_transformer_submodules": 1}
