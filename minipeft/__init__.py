"""minipeft: parameter-efficient fine-tuning of GPT-2, written to be read.

The names below are imported when the first of them is asked for: a command says `--help` long before torch is there.
"""

from importlib import import_module as _import_module

_NAMES = {  # by the module where each is at home
    "errors": ("MinipeftError",),
    "methods": ("METHODS", "inject"),
    "methods.adapter": ("BottleneckConfig",),
    "methods.bitfit": ("BitFitConfig",),
    "methods.dora": ("DoraConfig",),
    "methods.full": ("FullConfig",),
    "methods.head": ("HeadConfig",),
    "methods.ia3": ("IA3Config",),
    "methods.injection": ("trainable_parameters",),
    "methods.lora": ("LoraConfig",),
    "methods.prefix": ("PrefixTuningConfig",),
    "methods.prompt": ("PromptTuningConfig",),
    "methods.ptuning": ("PromptEncoderConfig",),
    "methods.saving": ("load_adapter", "save_adapter"),
    "methods.switch": ("disable_adapter", "merge", "remove", "set_adapter", "unmerge"),
    "methods.vera": ("VeraConfig",),
    "model.config": ("GPT2Config",),
    "model.gpt2": ("GPT2ForSequenceClassification", "GPT2ForTokenClassification", "GPT2LMHeadModel", "GPT2Model"),
    "model.kv_cache": ("KVCache",),
    "model.tokenizer": ("get_tokenizer",),
    "tasks.decoding": ("generate",),
}
__all__ = [name for names in _NAMES.values() for name in names]


def __getattr__(name: str) -> object:
    """What Python calls for a name that is not here yet: all of them are imported, and the packages they are in."""
    if not name.startswith("_"):
        for module, names in _NAMES.items():
            globals().update({each: getattr(_import_module(f"minipeft.{module}"), each) for each in names})
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module 'minipeft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
