"""The public names, each from the module where it is at home; `import minipeft` offers them, see __init__.py.

`name as name` says to editors and type checkers that the name is meant for users.
"""

from minipeft.errors import MinipeftError as MinipeftError
from minipeft.methods import METHODS as METHODS
from minipeft.methods import inject as inject
from minipeft.methods.adapter import BottleneckConfig as BottleneckConfig
from minipeft.methods.bitfit import BitFitConfig as BitFitConfig
from minipeft.methods.dora import DoraConfig as DoraConfig
from minipeft.methods.full import FullConfig as FullConfig
from minipeft.methods.head import HeadConfig as HeadConfig
from minipeft.methods.ia3 import IA3Config as IA3Config
from minipeft.methods.injection import trainable_parameters as trainable_parameters
from minipeft.methods.lora import LoraConfig as LoraConfig
from minipeft.methods.prefix import PrefixTuningConfig as PrefixTuningConfig
from minipeft.methods.prompt import PromptTuningConfig as PromptTuningConfig
from minipeft.methods.ptuning import PromptEncoderConfig as PromptEncoderConfig
from minipeft.methods.saving import load_adapter as load_adapter
from minipeft.methods.saving import save_adapter as save_adapter
from minipeft.methods.switch import disable_adapter as disable_adapter
from minipeft.methods.switch import merge as merge
from minipeft.methods.switch import remove as remove
from minipeft.methods.switch import set_adapter as set_adapter
from minipeft.methods.switch import unmerge as unmerge
from minipeft.methods.vera import VeraConfig as VeraConfig
from minipeft.model.config import GPT2Config as GPT2Config
from minipeft.model.gpt2 import GPT2ForSequenceClassification as GPT2ForSequenceClassification
from minipeft.model.gpt2 import GPT2ForTokenClassification as GPT2ForTokenClassification
from minipeft.model.gpt2 import GPT2LMHeadModel as GPT2LMHeadModel
from minipeft.model.gpt2 import GPT2Model as GPT2Model
from minipeft.model.kv_cache import KVCache as KVCache
from minipeft.model.tokenizer import get_tokenizer as get_tokenizer
from minipeft.tasks.decoding import generate as generate
