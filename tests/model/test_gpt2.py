"""The base model against its formulas: attention, padding, cache, heads, initialisation, configuration."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minipeft.errors import ConfigError
from minipeft.model import gpt2
from minipeft.model.attention import attend
from minipeft.model.config import OFFICIAL_SIZES, GPT2Config
from minipeft.model.gpt2 import (
    Attention,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    attention_mask_for,
    last_real_token,
)
from minipeft.model.kv_cache import MORE_ROOM, KVCache
from minipeft.training.hardware import computing_in

CPU = torch.device("cpu")
EVERY_CLASS = [GPT2Model, GPT2LMHeadModel, GPT2ForSequenceClassification, GPT2ForTokenClassification]
SIZES = ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "num_labels"]
PROBABILITIES = ["resid_pdrop", "embd_pdrop", "attn_pdrop", "classifier_dropout"]


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_every_class_says_what_it_is_for_and_whether_its_head_is_new():
    said = {cls: (cls.prefix, cls.head, cls.has_new_head, cls.task_type) for cls in EVERY_CLASS}
    assert said == {GPT2Model: ("", None, False, "FEATURE_EXTRACTION"),
                    GPT2LMHeadModel: ("transformer.", "lm_head", False, "CAUSAL_LM"),
                    GPT2ForSequenceClassification: ("transformer.", "score", True, "SEQ_CLS"),
                    GPT2ForTokenClassification: ("transformer.", "classifier", True, "TOKEN_CLS")}


# --- configuration ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("value", [0, -1, 1.5, "8", True, None])
@pytest.mark.parametrize("name", SIZES)
def test_config_refuses_a_size_that_is_not_a_positive_integer(name, value):
    with pytest.raises(ConfigError, match=rf"{name} must be (a positive integer up to [\d,]+|int), got {value!r}"):
        GPT2Config(**{name: value})


@pytest.mark.parametrize("name", [*SIZES, "n_inner"])
def test_a_size_beyond_that_of_any_gpt2_is_refused_before_modules_are_made_of_it(name):
    with pytest.raises(ConfigError, match=rf"{name} must be a positive integer up to [\d,]+, got 10000001"):
        GPT2Config(**{name: 10_000_001})


@pytest.mark.parametrize("value", [0, -8, 2.5, "64", True])
def test_config_refuses_an_inner_width_that_is_not_a_positive_integer(value):
    with pytest.raises(ConfigError, match="n_inner"):
        GPT2Config(n_inner=value)


@pytest.mark.parametrize("value", [-0.1, 1.0, 1, 2.0, float("nan"), "0.1", True, None])
@pytest.mark.parametrize("name", PROBABILITIES)
def test_config_refuses_a_dropout_outside_zero_to_one(name, value):
    with pytest.raises(ConfigError, match=f"{name} must be (a probability|float)"):
        GPT2Config(**{name: value})


@pytest.mark.parametrize("value", [-1.0, float("nan"), "1e-5", None])
@pytest.mark.parametrize("name", ["layer_norm_epsilon", "initializer_range"])
def test_config_refuses_a_negative_or_non_numeric_epsilon_and_initialiser(name, value):
    with pytest.raises(ConfigError, match=name):
        GPT2Config(**{name: value})


def test_config_refuses_heads_that_do_not_divide_the_channels():
    with pytest.raises(ConfigError, match="n_head=5 does not divide n_embd=24"):
        GPT2Config(n_embd=24, n_head=5)


def test_config_refuses_another_activation_function():
    with pytest.raises(ConfigError, match="'relu'"):
        GPT2Config(activation_function="relu")


@pytest.mark.parametrize("name, value", [("add_cross_attention", True), ("scale_attn_by_inverse_layer_idx", True),
                                         ("scale_attn_weights", False)])
def test_from_dict_refuses_what_would_silently_change_the_numbers(name, value):
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        GPT2Config.from_dict({name: value})
    assert GPT2Config.from_dict({name: not value}) == GPT2Config()


def test_from_dict_refuses_another_model_type():
    with pytest.raises(ConfigError, match="'bert'"):
        GPT2Config.from_dict({"model_type": "bert"})


def test_from_dict_reads_the_aliases_of_the_size_fields():
    config = GPT2Config.from_dict({"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
                                   "max_position_embeddings": 50})
    assert (config.n_embd, config.n_layer, config.n_head, config.n_positions) == (32, 3, 4, 50)


def test_from_dict_ignores_keys_that_change_no_number():
    assert GPT2Config.from_dict({"n_ctx": 7, "summary_type": "cls_index", "use_cache": False, "made_up": [1]}) \
        == GPT2Config()


def test_from_dict_takes_null_as_absent_except_for_token_ids():
    config = GPT2Config.from_dict({"n_embd": None, "classifier_dropout": None, "n_inner": None, "bos_token_id": None})
    assert (config.n_embd, config.classifier_dropout, config.n_inner, config.bos_token_id) == (768, 0.1, None, None)


def test_from_dict_counts_the_labels_of_id2label_unless_num_labels_is_given():
    labels = {"id2label": {"0": "a", "1": "b", "2": "c"}}
    assert GPT2Config.from_dict(labels).num_labels == 3
    assert GPT2Config.from_dict({**labels, "num_labels": 5}).num_labels == 5


@pytest.mark.parametrize("value", [5, "ab", ["a", "b"]])
def test_from_dict_refuses_labels_that_are_no_object(value):
    with pytest.raises(ConfigError, match=rf"config\.json: id2label must be an object, got {type(value).__name__}"):
        GPT2Config.from_dict({"id2label": value})


@pytest.mark.parametrize("num_labels", [1, 2, 7])
def test_to_dict_and_from_dict_are_inverses(tiny_config, num_labels):
    tiny_config.num_labels, tiny_config.n_inner = num_labels, 60
    assert GPT2Config.from_dict(tiny_config.to_dict()) == tiny_config


@pytest.mark.parametrize("name, count", [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168),
                                         ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)])
def test_official_sizes_have_their_published_parameter_counts(name, count):
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config.official(name))
    assert name in OFFICIAL_SIZES and sum(p.numel() for p in model.parameters()) == count


def test_the_figures_of_the_docstring_are_the_codes():
    """The sum that makes GPT-2 124M's size, its heads, and the rate of every dropout."""
    text, config = " ".join(gpt2.__doc__.split()), GPT2Config.official("gpt2")
    C, H, L = config.n_embd, config.n_head, config.n_layer
    assert f"C = {C}, H = {H}, D = {C // H} and {L} blocks" in text
    left, right = re.search(r"in all ([\d,+*() ]+) = ([\d,]+) parameters", text).groups()
    with torch.device("meta"):
        count = sum(p.numel() for p in GPT2Model(config).parameters())
    assert eval(left.replace(",", "")) == int(right.replace(",", "")) == count
    assert {f"p = {getattr(config, name)} " in text for name in PROBABILITIES} == {True}


def test_the_example_of_attention_worked_by_hand_comes_to_what_the_docstring_says():
    q, k, v = torch.ones(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4)
    k[..., 1, :] = 2 * math.log(3) / 4
    v[..., 2] = torch.tensor([4.0, 8.0])
    close((q @ k.mT)[0, 0, 1], torch.tensor([0, 2 * math.log(3)]))
    close(attend(q, k, v)[0, 0, :, 2], torch.tensor([4.0, 7.0]))
    assert "q k^T = 0, 2 ln 3" in gpt2.__doc__ and "1/4 * 4 + 3/4 * 8 = 7." in gpt2.__doc__


def test_an_untrained_model_guesses_as_the_docstring_says():
    torch.manual_seed(0)
    model, ids = GPT2LMHeadModel(GPT2Config(n_layer=1)).eval(), torch.randint(50257, (1, 65))
    logits = model(ids)[0]
    assert logits.std().item() == pytest.approx(0.55, abs=0.01)
    loss = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:]).item()
    assert loss == pytest.approx(math.log(50257) + 0.55 ** 2 / 2, abs=0.2)
    assert "= 0.55 and a loss of about ln 50,257 + 0.55^2 / 2 = 10.98, near the 10.82 of" in " ".join(
        gpt2.__doc__.split())
    assert round(math.log(50257) + 0.55 ** 2 / 2, 2) == 10.98 and round(math.log(50257), 2) == 10.82


def test_a_position_beyond_the_table_is_an_index_error_on_a_cpu(make_model, make_ids):
    with pytest.raises(IndexError):
        make_model(GPT2Model)(make_ids(1, 2), position_ids=torch.tensor([0, 40]))


def test_what_gradient_checkpointing_keeps_is_one_input_per_block(tiny_config, make_model, make_ids):
    """(B, T, C) of each of the blocks, and what the last LayerNorm keeps."""
    tiny_config.embd_pdrop, kept = 0.0, []
    model = make_model(GPT2Model).train()
    model.gradient_checkpointing = True
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        model(make_ids(3, 9))
    assert len({tensor.data_ptr() for tensor in kept if tensor.shape == (3, 9, 24)}) == tiny_config.n_layer + 1


# --- shapes and names -------------------------------------------------------------------------------------------------

def test_the_heads_give_a_score_per_word_per_text_and_per_token(tiny_config, make_model, make_ids):
    tiny_config.num_labels = 5
    ids = make_ids(3, 7)
    assert make_model(GPT2Model)(ids).shape == (3, 7, 24)
    assert make_model(GPT2LMHeadModel)(ids).shape == (3, 7, 97)
    assert make_model(GPT2ForSequenceClassification)(ids).shape == (3, 5)
    assert make_model(GPT2ForTokenClassification)(ids).shape == (3, 7, 5)


def test_parameters_carry_the_official_names(tiny_config):
    block = {f"{module}.{kind}" for kind in ("weight", "bias")
             for module in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")}
    base = {"wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias"} | {f"h.{i}.{n}" for i in (0, 1) for n in block}
    under = {f"transformer.{name}" for name in base}
    assert set(GPT2Model(tiny_config).state_dict()) == base
    assert set(GPT2LMHeadModel(tiny_config).state_dict()) == under | {"lm_head.weight"}
    assert set(GPT2ForSequenceClassification(tiny_config).state_dict()) == under | {"score.weight"}
    assert set(GPT2ForTokenClassification(tiny_config).state_dict()) == under | {"classifier.weight", "classifier.bias"}


def test_n_inner_sets_the_width_of_the_feed_forward_layer(tiny_config):
    assert GPT2Model(tiny_config).h[0].mlp.c_fc.weight.shape == (96, 24)
    tiny_config.n_inner = 60
    assert GPT2Model(tiny_config).h[0].mlp.c_fc.weight.shape == (60, 24)


def test_inputs_embeds_stand_in_for_the_embedding_of_the_ids(make_model, make_ids):
    ids = make_ids(2, 6)
    for cls in EVERY_CLASS[1:]:
        model = make_model(cls)
        assert torch.equal(model(inputs_embeds=model.transformer.wte(ids)), model(ids))


@pytest.mark.parametrize("model_class", EVERY_CLASS)
def test_a_call_with_neither_ids_nor_embeds_is_an_error_that_says_so(make_model, model_class):
    with pytest.raises(ConfigError, match="there is nothing to read: neither input_ids nor inputs_embeds"):
        make_model(model_class)()


# --- cost and number formats ------------------------------------------------------------------------------------------

def test_a_forward_pass_takes_the_operations_that_the_docstring_counts(tiny_config, make_model, make_ids):
    """24 C^2 per token in a block's matrices, 4 S C in its attention, and 2 C vocabulary in lm_head."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # of a fused kernel it counts nothing
        make_model(GPT2LMHeadModel)(make_ids(2, 9))
    C, S, L = 24, 9, 2
    assert counter.get_total_flops() == 2 * 9 * (L * (24 * C**2 + 4 * S * C) + 2 * C * 97)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_products_are_in_its_format_and_what_the_blocks_add_to_is_float32(make_model, make_ids, dtype):
    model, seen = make_model(GPT2LMHeadModel), {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, args, output, name=name: seen.update({name: output.dtype}))
    with computing_in(dtype, CPU):
        model(make_ids(2, 9))
    half = {name for name, found in seen.items() if found == dtype}
    products = ("attn", "c_attn", "c_proj", "resid_dropout", "mlp", "c_fc", "mlp.dropout", "lm_head")
    assert half - {""} == {name for name in seen if name.endswith(products)}
    assert {seen[name] for name in seen.keys() - half} == {torch.float32}


# --- formulas ---------------------------------------------------------------------------------------------------------

def attention_by_formula(attention, x):
    """softmax(q k^T / sqrt(D) + causal mask) v, one text and one head at a time."""
    C = x.shape[2]
    D = C // attention.n_head
    rows = []
    for text in x:
        q, k, v = (text @ attention.c_attn.weight.T + attention.c_attn.bias).split(C, dim=1)      # each (T, C)
        heads = []
        for j in range(attention.n_head):
            mine = slice(j * D, (j + 1) * D)
            scores = q[:, mine] @ k[:, mine].T / math.sqrt(D)                                     # (T, T)
            scores = scores + torch.full_like(scores, -math.inf).triu(1)
            heads.append(torch.softmax(scores, dim=1) @ v[:, mine])                               # (T, D)
        rows.append(torch.cat(heads, dim=1) @ attention.c_proj.weight.T + attention.c_proj.bias)
    return torch.stack(rows)


def gelu_by_formula(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def layer_norm_by_formula(norm, x, eps=1e-5):
    return (x - x.mean(-1, True)) / torch.sqrt(x.var(-1, keepdim=True, correction=0) + eps) * norm.weight + norm.bias


def test_attention_is_its_formula(tiny_config):
    torch.manual_seed(0)
    attention = Attention(tiny_config, layer=0).eval()
    x = torch.randn(2, 9, 24)
    close(attention(x), attention_by_formula(attention, x))


def test_the_whole_model_is_its_formula(make_model, make_ids):
    model, ids = make_model(GPT2LMHeadModel), make_ids(2, 9)
    base = model.transformer
    x = base.wte.weight[ids] + base.wpe.weight[torch.arange(9)]
    for block in base.h:
        x = x + attention_by_formula(block.attn, layer_norm_by_formula(block.ln_1, x))
        inner = gelu_by_formula(layer_norm_by_formula(block.ln_2, x) @ block.mlp.c_fc.weight.T + block.mlp.c_fc.bias)
        x = x + inner @ block.mlp.c_proj.weight.T + block.mlp.c_proj.bias
    close(model(ids), layer_norm_by_formula(base.ln_f, x) @ base.wte.weight.T)


def test_no_position_sees_what_comes_after_it(make_model, make_ids):
    model, ids = make_model(GPT2LMHeadModel), make_ids(1, 12)
    changed = ids.clone()
    changed[0, 7] = (ids[0, 7] + 1) % 97
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] - after[:, 7:]).abs().amax(-1).min() > 1e-3


def test_classification_scores_are_the_head_on_the_final_hidden_states(make_model, make_ids):
    ids = make_ids(2, 6)
    texts, tokens = make_model(GPT2ForSequenceClassification), make_model(GPT2ForTokenClassification)
    close(texts(ids), texts.transformer(ids)[:, -1] @ texts.score.weight.T)
    close(tokens(ids), tokens.transformer(ids) @ tokens.classifier.weight.T + tokens.classifier.bias)


def test_dropout_acts_in_training_mode_only(tiny_config, make_model, make_ids):
    for name in PROBABILITIES:
        setattr(tiny_config, name, 0.3)
    ids = make_ids(2, 6)
    for cls in EVERY_CLASS:
        model = make_model(cls)
        assert torch.equal(model(ids), model(ids))
        model.train()
        assert not torch.equal(model(ids), model(ids))


# --- padding ----------------------------------------------------------------------------------------------------------

LENGTHS = [11, 4, 1, 8]


@pytest.mark.parametrize("cls", EVERY_CLASS)
def test_a_text_alone_and_in_a_right_padded_batch_give_the_same(make_model, make_ids, make_mask, cls):
    model, ids, mask = make_model(cls), make_ids(len(LENGTHS), max(LENGTHS)), make_mask(LENGTHS)
    batch = model(ids, attention_mask=mask)
    for row, length in enumerate(LENGTHS):
        alone = model(ids[row:row + 1, :length])[0]
        close(batch[row] if alone.dim() == 1 else batch[row, :length], alone)


@pytest.mark.parametrize("cls", EVERY_CLASS)
def test_a_text_alone_and_in_a_left_padded_batch_give_the_same(make_model, make_ids, make_mask, cls):
    model, ids, mask = make_model(cls), make_ids(len(LENGTHS), max(LENGTHS)), make_mask(LENGTHS, side="left")
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    batch = model(ids, attention_mask=mask, position_ids=position_ids)
    for row, length in enumerate(LENGTHS):
        alone = model(ids[row:row + 1, -length:])[0]
        close(batch[row] if alone.dim() == 1 else batch[row, -length:], alone)


@pytest.mark.parametrize("cls", EVERY_CLASS)
@pytest.mark.parametrize("width", [1, 5, 7])
def test_a_mask_of_the_wrong_width_is_an_error_even_where_no_mask_is_needed(make_model, make_ids, cls, width):
    with pytest.raises(ConfigError, match=f"attention_mask is {width} wide, for 0 cached and 6 new tokens"):
        make_model(cls)(make_ids(2, 6), attention_mask=torch.ones(2, width, dtype=torch.long))


def test_a_mask_that_does_not_count_the_cached_tokens_is_an_error(make_model, make_ids):
    """A single 1 for a new token would be taken to say that none of the cached ones is a pad."""
    model, cache, mask = make_model(GPT2LMHeadModel), KVCache(), torch.tensor([[0, 0, 1, 1]])
    model(make_ids(1, 4), attention_mask=mask, cache=cache)
    with pytest.raises(ConfigError, match="attention_mask is 1 wide, for 4 cached and 1 new tokens"):
        model(make_ids(1, 1), attention_mask=mask[:, -1:], cache=cache)


def test_of_a_text_of_pads_only_the_first_position_is_read():
    x = torch.randn(2, 4, 24)
    assert torch.equal(last_real_token(x, torch.tensor([[0, 0, 0, 0], [0, 1, 1, 0]])), x[[0, 1], [0, 2]])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cls", EVERY_CLASS)
def test_the_ids_of_the_padding_do_not_matter(make_model, make_ids, make_mask, cls, side):
    model, ids, mask = make_model(cls), make_ids(len(LENGTHS), max(LENGTHS)), make_mask(LENGTHS, side)
    zeros, nines = (model(ids.masked_fill(mask == 0, pad), attention_mask=mask) for pad in (0, 9))
    real = mask.bool() if zeros.dim() == 3 else slice(None)
    assert torch.equal(zeros[real], nines[real])
    assert torch.isfinite(zeros).all()


def test_masks_of_any_number_type_mean_the_same(make_model, make_ids, make_mask):
    model, ids, mask = make_model(GPT2ForSequenceClassification), make_ids(4, 11), make_mask(LENGTHS, side="left")
    for dtype in (torch.bool, torch.int32, torch.float32):
        assert torch.equal(model(ids, mask.to(dtype)), model(ids, mask))


def test_last_real_token_comes_from_the_mask_on_either_side(make_mask):
    x = torch.arange(4 * 11.0).view(4, 11, 1)                                    # row b, position t holds 11 b + t
    assert last_real_token(x, None).flatten().tolist() == [10, 21, 32, 43]
    assert last_real_token(x, make_mask(LENGTHS)).flatten().tolist() == [10, 11 + 3, 22 + 0, 33 + 7]
    assert last_real_token(x, make_mask(LENGTHS, side="left")).flatten().tolist() == [10, 21, 32, 43]


def test_a_pad_id_that_occurs_as_a_real_token_is_pooled_like_any_other(make_model, make_mask):
    model, pad = make_model(GPT2ForSequenceClassification), 0
    ids = torch.tensor([[5, pad, 7, pad, pad], [5, 6, 7, 8, pad]])                # real: 5 0 7 0 | 5 6 7 8 0
    close(model(ids, make_mask([4, 5])), torch.cat((model(ids[:1, :4]), model(ids[1:]))))


# --- the attention mask -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mask, T, past", [
    (None, 5, 0), (None, 1, 0), (None, 1, 4), (torch.ones(2, 5), 5, 0), (torch.ones(2, 5), 1, 4),
    (torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]), 5, 0), (torch.ones(2, 1), 1, 0)],
    ids=["no mask", "one token", "one token after a cache", "all real", "all real after a cache", "right padding",
         "one real token"])
def test_the_fast_causal_kernel_needs_no_mask(mask, T, past):
    assert attention_mask_for(mask, T, past, CPU) is None


def test_several_tokens_after_a_cache_see_a_lower_right_triangle():
    assert attention_mask_for(None, 3, 2, CPU).int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


@pytest.mark.kind("8: masked attention keeps a fast kernel")
def test_right_padding_after_a_prefix_adds_nothing_to_the_triangle():
    """A real token never looks to its right. So all texts share one small mask, which follows from the sizes alone."""
    mask = attention_mask_for(torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]), 3, 2, CPU)
    assert mask.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert mask.dtype == torch.bool and mask.stride(-1) == 1  # what the memory-efficient kernel takes


def test_left_padding_is_hidden_from_all_but_itself():
    mask = attention_mask_for(torch.tensor([[0, 0, 1, 1]]), 4, 0, CPU)
    assert mask.shape == (1, 1, 4, 4)
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_padding_inside_the_cache_stays_hidden():
    mask = attention_mask_for(torch.tensor([[0, 1, 1, 1], [1, 0, 0, 1]]), 1, 3, CPU)
    assert mask.int().flatten(1).tolist() == [[0, 1, 1, 1], [1, 0, 0, 1]]


def test_the_choice_of_a_mask_stands_outside_of_what_is_compiled(make_model, make_ids, make_mask):
    """It depends on values. Compiled, it would be compiled anew for each new mixture of lengths."""
    model, graphs = make_model(GPT2Model), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, dynamic=True)
    for T in (7, 8, 9):
        for side in ("right", "left"):
            ids, mask = make_ids(2, T), make_mask([T, 4], side)
            torch.testing.assert_close(compiled(ids, attention_mask=mask), model(ids, attention_mask=mask))
        assert len(graphs) == 3, "embeddings; blocks without a mask and with one"


# --- cache ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 7], [4, 1, 1, 3, 2, 1]], ids=str)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_the_cache_gives_what_one_full_pass_gives(make_model, make_ids, make_mask, padding, chunks):
    model, ids = make_model(GPT2LMHeadModel), make_ids(3, 12)
    mask = None if padding == "none" else make_mask([12, 7, 3], padding)
    expected = model(ids, attention_mask=mask)
    cache, start, parts = KVCache(), 0, []
    for size in chunks:
        seen = slice(0, start + size)
        parts.append(model(ids[:, start:start + size], None if mask is None else mask[:, seen], cache=cache))
        start += size
        assert cache.length == start
    real = slice(None) if mask is None else mask.bool()
    close(torch.cat(parts, dim=1)[real], expected[real])


@pytest.mark.parametrize("modes", ["nngngnn", "gnnggnn", "iinnign", "inginin"])
def test_a_cache_may_go_through_calls_with_gradients_without_and_in_inference_mode(make_model, make_ids, modes):
    model, ids, cache = make_model(GPT2LMHeadModel), make_ids(2, 7), KVCache()
    mode = {"n": torch.no_grad, "g": torch.enable_grad, "i": torch.inference_mode}
    for number, letter in enumerate(modes):
        with mode[letter]():
            if letter == "g" and "i" in modes[:number]:  # what was made in inference mode cannot be trained through
                model.requires_grad_(False)
            found = model(ids[:, number:number + 1], cache=cache)
    close(found[:, 0], model(ids)[:, -1])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad], ids=["without gradients", "with gradients"])
def test_a_cache_for_one_call_holds_nothing_that_the_call_appended(make_model, make_ids, mode):
    """Of a large batch all blocks' keys and values would lie in memory until the call ends."""
    model, prefix, cache = make_model(GPT2Model), KVCache(), None
    model(make_ids(2, 5), cache=prefix)
    with mode():
        cache = KVCache(list(prefix.layers), kept=False)
        found = model(make_ids(2, 3, seed=1), cache=cache)
    close(found, model(make_ids(2, 3, seed=1), cache=prefix))
    assert cache.length == 5 and not cache.room


def test_a_cache_that_is_reordered_takes_its_room_along(make_model, make_ids):
    model, ids, cache = make_model(GPT2LMHeadModel), make_ids(2, 7), KVCache()
    with torch.no_grad():
        for step in range(5):
            model(ids[:, step:step + 1], cache=cache)
        room = cache.room[0][0][0]
        cache.reorder(torch.tensor([1, 0]))
        moved = cache.room[0][0][0]
        found = [model(ids[[1, 0], step:step + 1], cache=cache) for step in (5, 6)]
    assert torch.equal(moved[:, :, :5], room[[1, 0], :, :5]) and cache.room[0][0][0] is moved
    close(torch.cat(found, dim=1), model(ids)[[1, 0], 5:])


def test_the_room_of_a_cache_is_little_more_than_what_it_holds(make_model, make_ids):
    model, cache = make_model(GPT2LMHeadModel), KVCache()
    with torch.no_grad():
        for size in (4, 1, 1):
            model(make_ids(1, size), cache=cache)
    assert cache.room[0][0][0].shape[2] == 5 + MORE_ROOM


def test_position_ids_are_one_for_each_token(make_model, make_ids):
    model, ids = make_model(GPT2LMHeadModel), make_ids(2, 5)
    assert torch.equal(model(ids, position_ids=torch.arange(5)), model(ids))
    for positions in (torch.zeros(2, 1, dtype=torch.long), torch.arange(6).expand(2, 6)):
        with pytest.raises(ConfigError, match=f"position_ids are for {positions.shape[1]} tokens, and 5 are read"):
            model(ids, position_ids=positions)


def test_a_cache_that_is_given_keys_and_values_is_attended_to(make_model, make_ids, tiny_config):
    """What prefix tuning builds on: the cache may start with vectors that no token produced."""
    model, ids = make_model(GPT2Model), make_ids(2, 5)
    filled = KVCache()
    model(ids, cache=filled)
    rest = model(make_ids(2, 3, seed=1), cache=KVCache(list(filled.layers)))
    close(rest, model(torch.cat((ids, make_ids(2, 3, seed=1)), dim=1))[:, 5:])
    assert filled.length == 5 and filled.layers[1][0].shape == (2, 3, 5, 8)


def test_more_tokens_than_positions_is_an_error_that_names_both(make_model, make_ids):
    model = make_model(GPT2LMHeadModel)
    assert model(make_ids(1, 40)).shape == (1, 40, 97)
    with pytest.raises(ConfigError, match="41 tokens do not fit this model: it has 40"):
        model(make_ids(1, 41))
    cache = KVCache()
    model(make_ids(1, 38), cache=cache)
    with pytest.raises(ConfigError, match="41 tokens"):
        model(make_ids(1, 3), cache=cache)


# --- training ---------------------------------------------------------------------------------------------------------

def gradients(model, ids, mask, precision=torch.float32):
    torch.manual_seed(7)                                                          # the same dropout each time
    model.zero_grad()
    with computing_in(precision, torch.device("cpu")):
        output = model(ids, attention_mask=mask)
    output.float().square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing_gives_the_same_gradients(tiny_config, make_model, make_ids, make_mask, dropout,
                                                         precision):
    for name in PROBABILITIES:
        setattr(tiny_config, name, dropout)
    model = make_model(GPT2ForTokenClassification).train()
    passes = []
    model.transformer.h[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    ids, mask = make_ids(3, 9), make_mask([9, 4, 6], side="left")
    expected = gradients(model, ids, mask, precision)
    assert len(passes) == 1
    model.transformer.gradient_checkpointing = True
    checkpointed = gradients(model, ids, mask, precision)
    assert len(passes) == 3                                                       # forward, and again in backward
    for name, gradient in expected.items():
        close(checkpointed[name], gradient, 1e-7)


def test_the_input_and_output_embeddings_are_one_tensor(tiny_config, make_ids):
    model = GPT2LMHeadModel(tiny_config)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "lm_head.weight" not in dict(model.named_parameters())
    model(make_ids(2, 5)).square().mean().backward()
    # Words that occur in no text still get a gradient, through the output side.
    assert (model.transformer.wte.weight.grad.abs().sum(dim=1) > 0).all()


def test_embeddings_can_be_untied(tiny_config):
    tiny_config.tie_word_embeddings = False
    model = GPT2LMHeadModel(tiny_config)
    assert model.lm_head.weight is not model.transformer.wte.weight
    assert not torch.equal(model.lm_head.weight, model.transformer.wte.weight)


@pytest.mark.parametrize("initializer_range", [0.02, 0.1])
def test_initialisation_is_gpt2s(initializer_range):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=500, n_positions=200, n_embd=128, n_layer=8, n_head=4, num_labels=200,
                        initializer_range=initializer_range)
    for cls in EVERY_CLASS:
        for name, parameter in cls(config).named_parameters():
            if name.endswith("bias"):
                assert not parameter.any(), name
            elif "ln_" in name:
                assert (parameter == 1).all(), name
            else:
                std = initializer_range / (math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 1)
                assert parameter.std().item() == pytest.approx(std, rel=0.03), name
                assert abs(parameter.mean().item()) < 0.05 * std, name


def test_the_initial_models_next_word_is_nearly_uniform(tiny_config, make_ids):
    torch.manual_seed(0)
    logits = GPT2LMHeadModel(tiny_config).eval()(make_ids(4, 20))
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), make_ids(4, 20)[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(97), abs=0.2)
