"""minipeft: parameter-efficient fine-tuning of GPT-2, written to be read."""

from minipeft.checkpoint import load_adapter, save_adapter
from minipeft.errors import MinipeftError
from minipeft.generate import generate
from minipeft.gpt2 import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    KVCache,
)
from minipeft.methods import METHODS, inject
from minipeft.methods.full import FullConfig
from minipeft.methods.lora import LoraConfig
from minipeft.methods.surgery import disable_adapter, merge, remove, trainable_parameters, unmerge
from minipeft.tokenizer import get_tokenizer

__all__ = [
    "METHODS", "FullConfig", "GPT2Config", "GPT2ForSequenceClassification", "GPT2ForTokenClassification",
    "GPT2LMHeadModel", "GPT2Model", "KVCache", "LoraConfig", "MinipeftError", "disable_adapter", "generate",
    "get_tokenizer", "inject", "load_adapter", "merge", "remove", "save_adapter", "trainable_parameters", "unmerge",
]
