"""The sizes of a GPT-2, read from and written to the official config.json."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from minipeft.errors import ConfigError

# name -> (n_layer, n_head, n_embd): the four models OpenAI released.
OFFICIAL_SIZES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280),
                  "gpt2-xl": (48, 25, 1600)}

# Fields of transformers' config.json that change the numbers, with the only value implemented here.
_UNSUPPORTED = {"add_cross_attention": False, "scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True}
_ALIASES = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions"}


@dataclass
class GPT2Config:
    """The sizes of a GPT-2, under the field names of the official config.json.

    Args:
        vocab_size: number of token ids.
        n_positions: longest sequence, in tokens, counting cached and virtual ones.
        n_embd, n_layer, n_head: channels C, blocks, attention heads H; H must divide C.
        n_inner: width of the feed-forward layer; None means 4 * n_embd.
        resid_pdrop, embd_pdrop, attn_pdrop: dropout probabilities, active in training mode only.
        initializer_range: standard deviation of the initial matrices.
        num_labels: K, outputs of the classification heads.
        classifier_dropout: dropout before the token-classification head.

    Raises:
        ConfigError: a size that is not a positive integer, a probability outside [0, 1), or H not dividing C.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    activation_function: str = "gelu_new"
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | None = 50256
    num_labels: int = 2
    classifier_dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "num_labels"):
            value = getattr(self, name)
            if name == "n_inner" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"GPT-2 config: {name} must be a positive integer, got {value!r}")
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "classifier_dropout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise ConfigError(f"GPT-2 config: {name} must be a probability in [0, 1), got {value!r}")
        for name in ("layer_norm_epsilon", "initializer_range"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
                raise ConfigError(f"GPT-2 config: {name} must be a number between 0 and 1, got {value!r}")
        if self.n_embd % self.n_head:
            raise ConfigError(f"GPT-2 config: n_head={self.n_head} does not divide n_embd={self.n_embd}")
        if self.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
            raise ConfigError(f"GPT-2 config: activation_function {self.activation_function!r} is not GPT-2's "
                              "gelu_new")

    @property
    def inner_size(self) -> int:
        """Width of the feed-forward layer."""
        return self.n_inner or 4 * self.n_embd

    @classmethod
    def official(cls, name: str) -> GPT2Config:
        """The configuration of one of OpenAI's four models: "gpt2", "gpt2-medium", "gpt2-large" or "gpt2-xl"."""
        n_layer, n_head, n_embd = OFFICIAL_SIZES[name]
        return cls(n_layer=n_layer, n_head=n_head, n_embd=n_embd)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GPT2Config:
        """Read a config.json's content; keys that change no number are ignored, unsupported ones are refused."""
        if values.get("model_type", "gpt2") != "gpt2":
            raise ConfigError(f"config.json describes a {values['model_type']!r} model, not a GPT-2")
        for key, supported in _UNSUPPORTED.items():
            if values.get(key, supported) != supported:
                raise ConfigError(f"config.json sets {key}={values[key]!r}, which minipeft does not implement")
        values = {_ALIASES.get(key, key): value for key, value in values.items()}
        if "num_labels" not in values and values.get("id2label"):
            values["num_labels"] = len(values["id2label"])
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in values.items()
                      if key in known and (value is not None or key.endswith("_token_id") or key == "n_inner")})

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json that transformers reads too."""
        values = dataclasses.asdict(self)
        num_labels = values.pop("num_labels")
        if num_labels != 2:  # transformers stores the label names, not their number
            values["id2label"] = {str(i): f"LABEL_{i}" for i in range(num_labels)}
            values["label2id"] = {f"LABEL_{i}": i for i in range(num_labels)}
        return {"model_type": "gpt2", **values}
