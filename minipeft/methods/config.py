"""What every method's configuration class shares: checked fields, and how peft's adapter_config.json holds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from minipeft.settings import Settings

if TYPE_CHECKING:
    import torch.nn as nn
    from typing_extensions import Self

    from minipeft.methods.layers import AdapterLayer


@dataclass
class MethodConfig(Settings):
    """Base of the methods' configurations. What a class says here is how its method is known, and how it is stored.

    Attributes:
        method: its name in METHODS.
        saves_adapter: whether an adapter folder can hold the method; full fine-tuning leaves a whole model instead.
        peft_type: its name in adapter_config.json.
        base_prefix: before the names of the base model's own tensors in an adapter file.
        harmless: keys of peft's that do not change what this method computes, whatever they say.
        more_fields: keys that `from_saved` reads beside the configuration's own fields.
        needs_task: whether a file that does not say its task_type has no meaning.

    Raises:
        ConfigError: a value of the wrong type or out of range; the field is named.
    """

    method: ClassVar[str]
    saves_adapter: ClassVar[bool] = True
    peft_type: ClassVar[str]
    base_prefix: ClassVar[str] = "base_model.model."
    harmless: ClassVar[tuple[str, ...]] = ()
    more_fields: ClassVar[tuple[str, ...]] = ()
    needs_task: ClassVar[bool] = False

    def to_saved(self, model: nn.Module, layers: dict[str, AdapterLayer]) -> dict[str, Any]:
        """What adapter_config.json says beyond, or other than, the configuration's fields."""
        return {}

    @classmethod
    def from_saved(cls, values: dict[str, Any], model: nn.Module) -> Self:
        """A configuration from adapter_config.json's values."""
        return cls(**values)
