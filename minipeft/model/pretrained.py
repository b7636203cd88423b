"""Where a model's parameters come from: drawn at random, or read from official files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn as nn
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minipeft.errors import ConfigError, WeightsError, first_few
from minipeft.model import weights
from minipeft.model.config import GPT2Config
from minipeft.model.hub import find

Model = TypeVar("Model", bound="PretrainedModel")


def initialize(module: nn.Module, config: GPT2Config) -> None:
    """GPT-2's initialization: N(0, 0.02) matrices, zero biases, unit LayerNorms.

    The projections that write into the residual stream get a standard deviation smaller by sqrt(2 n_layer), so that
    the stream's variance does not grow with the depth.
    """
    for name, child in module.named_modules():
        if isinstance(child, (nn.Linear, nn.Embedding)):
            residual = name.endswith("c_proj")
            std = config.initializer_range / ((2 * config.n_layer) ** 0.5 if residual else 1.0)
            nn.init.normal_(child.weight, std=std)
        if isinstance(child, nn.LayerNorm):
            nn.init.ones_(child.weight)
        if getattr(child, "bias", None) is not None and isinstance(child.bias, Tensor):
            nn.init.zeros_(child.bias)


class _NoInitialValues(TorchFunctionMode):
    """Within the block torch.nn.init does nothing. On the meta device there is nowhere to put a value, and yet it would
    import torch's compiler, which takes longer than reading mini."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


@contextmanager
def on_paper() -> Iterator[None]:
    """Within the block modules are made of shapes alone: on the meta device, without memory and without values."""
    with torch.device("meta"), _NoInitialValues():
        yield


class PretrainedModel(nn.Module):
    """What the base model and its three heads share: reading and writing the official layout.

    Attributes:
        prefix: how the class's names for the base's tensors start.
        head: the name of its head, or None.
        has_new_head: whether pretraining leaves the head random, so that every method trains it.
        task_type: what the model is for, in peft's word.
        folder: from which it was loaded, wherever the process goes afterwards; None where its values were drawn.
    """

    prefix: ClassVar[str] = "transformer."
    head: ClassVar[str | None] = None
    has_new_head: ClassVar[bool] = False
    task_type: ClassVar[str] = "FEATURE_EXTRACTION"
    folder: Path | None = None

    @property
    def tied(self) -> dict[str, str]:
        """The tensors that are another one: their names, and the name of that one."""
        return {}

    @classmethod
    def from_pretrained(cls: type[Model], name_or_folder: str | Path, dtype: torch.dtype = torch.float32,
                        **config: Any) -> Model:
        """Load weights from "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "mini", or a folder.

        A name is looked up on disk first and downloaded from the Hugging Face hub otherwise. Keyword arguments such
        as `num_labels` replace fields of config.json. A head that the file lacks keeps its random initialization.

        Args:
            name_or_folder: a model's name, or a folder with config.json and model.safetensors.
            dtype: type of the loaded parameters, whatever the file stores. Default float32.

        Returns:
            The model, in eval mode.

        Raises:
            WeightsError: nothing found, no network, a damaged file, or tensors missing, left over or misshapen.
            ConfigError: a config.json that is not a GPT-2 this library implements, or a keyword argument that is no
                field of a configuration.
        """
        if unknown := config.keys() - {field.name for field in dataclasses.fields(GPT2Config)}:
            raise ConfigError(f"from_pretrained takes dtype and fields of GPT2Config, not {', '.join(sorted(unknown))}")
        if not isinstance(dtype, torch.dtype):
            raise ConfigError(f"dtype must be a torch.dtype, such as torch.bfloat16, got {dtype!r}")
        folder = find(name_or_folder)
        model_config = GPT2Config.from_dict({**weights.read_config(folder), **config})
        with on_paper():  # each tensor is allocated as it is read
            model = cls(model_config)
        heads = {kind.head for kind in PretrainedModel.__subclasses__() if kind.head is not None}
        weights.load(model, folder, dtype, heads, initialize=lambda module: initialize(module, model_config))
        model.name_or_path, model.folder = str(name_or_folder), folder.resolve()
        return model.eval()

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None,
                        state_dict: dict[str, Tensor] | None = None) -> None:
        """Write config.json and model.safetensors in the official layout; transformers loads the folder.

        A vocabulary of its own, `vocab.tiktoken` in the folder that the model was loaded from, comes along.

        Args:
            folder: created if absent.
            dtype: stored type; None keeps each parameter's own.
            state_dict: the whole tensors of a model that is spread over processes; default the model's own.

        Raises:
            WeightsError: the model is not the GPT-2 that its configuration describes, such as one that carries an
                adapter: nobody could read the folder.
            OutputError: the folder cannot be written, or the disk is full.
        """
        config = {"architectures": [type(self).__name__], **self.config.to_dict()}
        tensors = weights.bare_names(self.state_dict() if state_dict is None else state_dict)
        self._check_described(tensors)
        weights.save(self, config, folder, dtype, tensors, self.folder)

    def _check_described(self, tensors: dict[str, Tensor]) -> None:
        """Refuse tensors other than those of a model that is made from the same configuration.

        Raises:
            WeightsError: naming some.
        """
        with on_paper():
            described = type(self)(self.config).state_dict()
        added = [name for name in tensors if name not in described]
        if added:
            raise WeightsError(f"this model carries what is no part of a {type(self).__name__}: {first_few(added, 3)}. "
                               "Merge an adapter into the weights first, or write it alone with save_adapter")
        apart = [f"{name} is another tensor than {of}, of which config.json says that they are one"
                 for name, of in self.tied.items() if name in tensors and of in tensors
                 and tensors[name] is not tensors[of] and not torch.equal(tensors[name], tensors[of])]
        others = apart + [f"{name} is {tuple(tensors[name].shape)}, not {tuple(expected.shape)}" if name in tensors else
                  f"{name} is missing" for name, expected in described.items()
                  if name not in tensors or tensors[name].shape != expected.shape]
        if others:
            raise WeightsError(f"this model is not the one that its configuration describes: {first_few(others)}")
