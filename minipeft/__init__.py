"""minipeft: parameter-efficient fine-tuning of GPT-2, written to be read."""

from minipeft.errors import MinipeftError
from minipeft.methods import METHODS, inject
from minipeft.methods.adapter import BottleneckConfig
from minipeft.methods.bitfit import BitFitConfig
from minipeft.methods.dora import DoraConfig
from minipeft.methods.full import FullConfig
from minipeft.methods.head import HeadConfig
from minipeft.methods.ia3 import IA3Config
from minipeft.methods.injection import trainable_parameters
from minipeft.methods.lora import LoraConfig
from minipeft.methods.prefix import PrefixTuningConfig
from minipeft.methods.prompt import PromptTuningConfig
from minipeft.methods.ptuning import PromptEncoderConfig
from minipeft.methods.saving import load_adapter, save_adapter
from minipeft.methods.switch import disable_adapter, merge, remove, set_adapter, unmerge
from minipeft.methods.vera import VeraConfig
from minipeft.model.config import GPT2Config
from minipeft.model.gpt2 import (
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)
from minipeft.model.kv_cache import KVCache
from minipeft.model.tokenizer import get_tokenizer
from minipeft.tasks.decoding import generate

__all__ = [
    "METHODS", "BitFitConfig", "BottleneckConfig", "DoraConfig", "FullConfig", "GPT2Config",
    "GPT2ForSequenceClassification", "GPT2ForTokenClassification", "GPT2LMHeadModel", "GPT2Model", "HeadConfig",
    "IA3Config", "KVCache", "LoraConfig", "MinipeftError", "PrefixTuningConfig", "PromptEncoderConfig",
    "PromptTuningConfig", "VeraConfig", "disable_adapter", "generate", "get_tokenizer", "inject", "load_adapter",
    "merge", "remove", "save_adapter", "set_adapter", "trainable_parameters", "unmerge",
]
