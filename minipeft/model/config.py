"""The sizes of a GPT-2, read from and written to the official config.json."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from minipeft.errors import ConfigError
from minipeft.settings import PROBABILITY, Range, Settings, setting

# name -> (n_layer, n_head, n_embd): the four models OpenAI released.
OFFICIAL_SIZES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280),
                  "gpt2-xl": (48, 25, 1600)}

# Fields of transformers' config.json that change the numbers, with the only value implemented here.
_UNSUPPORTED = {"add_cross_attention": False, "scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True}
_ALIASES = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions"}
_SMALL = Range("a number between 0 and 1", lambda value: 0 < value < 1)


def _up_to(most: int) -> Range:
    """A size, up to one beyond any GPT-2's: modules are made before a file is looked at, which could take forever."""
    return Range(f"a positive integer up to {most:,}", lambda value: 1 <= value <= most)


_BLOCKS, _LABELS, _SIZE = _up_to(1_000), _up_to(100_000), _up_to(10_000_000)


@dataclass
class GPT2Config(Settings):
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
        ConfigError: a value of the wrong type, a size that is not positive or beyond all measure, a probability outside
            [0, 1), another activation function, or H not dividing C.
    """

    where: ClassVar[str] = "GPT-2 config: "

    vocab_size: int = setting(50257, within=_SIZE)
    n_positions: int = setting(1024, within=_SIZE)
    n_embd: int = setting(768, within=_SIZE)
    n_layer: int = setting(12, within=_BLOCKS)
    n_head: int = setting(12, within=_SIZE)
    n_inner: int | None = setting(None, within=_SIZE)
    resid_pdrop: float = setting(0.1, within=PROBABILITY)
    embd_pdrop: float = setting(0.1, within=PROBABILITY)
    attn_pdrop: float = setting(0.1, within=PROBABILITY)
    layer_norm_epsilon: float = setting(1e-5, within=_SMALL)
    initializer_range: float = setting(0.02, within=_SMALL)
    activation_function: str = setting("gelu_new", choices=("gelu_new", "gelu_pytorch_tanh"))
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | None = 50256
    num_labels: int = setting(2, within=_LABELS)
    classifier_dropout: float = setting(0.1, within=PROBABILITY)

    def check(self) -> None:
        super().check()
        if self.n_embd % self.n_head:
            raise ConfigError(f"{self.where}n_head={self.n_head} does not divide n_embd={self.n_embd}")

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
        """Read a config.json's content; keys that change no number are ignored, unsupported ones are refused.

        Raises:
            ConfigError: another kind of model, or a value that makes no GPT-2 of this library.
        """
        if values.get("model_type", "gpt2") != "gpt2":
            raise ConfigError(f"config.json describes a {values['model_type']!r} model, not a GPT-2")
        for key, supported in _UNSUPPORTED.items():
            if values.get(key, supported) != supported:
                raise ConfigError(f"config.json sets {key}={values[key]!r}, which minipeft does not implement")
        values = {_ALIASES.get(key, key): value for key, value in values.items()}
        if "num_labels" not in values and (labels := values.get("id2label")):
            if not isinstance(labels, dict):
                raise ConfigError(f"config.json: id2label must be an object, got {type(labels).__name__}")
            values["num_labels"] = len(labels)
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
