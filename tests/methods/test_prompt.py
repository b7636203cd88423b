"""Prompt tuning against its formula: the base model reads [P; wte[ids]], and the virtual positions are cut off."""

import dataclasses

import pytest
import torch
from helpers import MERGES, VOCAB_SIZE, write_tiny_model, write_vocabulary

from minipeft import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
    PromptTuningConfig,
    get_tokenizer,
    inject,
    trainable_parameters,
)
from minipeft.methods import prompt
from minipeft.methods.injection import active_injections

IDS = torch.tensor([[5, 17, 80, 3, 41, 9, 60], [70, 2, 2, 33, 8, 95, 1]])


def table(model):
    return next(iter(active_injections(model)[0].layers.values())).encoder.weight


# --- the formula ------------------------------------------------------------------------------------------------------

def test_the_base_model_reads_the_prompt_as_if_it_were_the_texts_first_embeddings(make_model):
    base, model = make_model(GPT2Model), inject(make_model(GPT2Model), PromptTuningConfig(num_virtual_tokens=3))
    embeddings = torch.cat((table(model).expand(2, 3, 24), base.wte(IDS)), dim=1)
    torch.testing.assert_close(model(IDS), base(inputs_embeds=embeddings)[:, 3:], atol=1e-6, rtol=1e-6)


def test_an_example_worked_out_by_hand(make_model):
    """Blocks that add nothing: what comes out is LayerNorm(wte[id] + wpe[V + t]), the prompt itself being cut off."""
    model = make_model(GPT2Model)
    with torch.no_grad():
        for block in model.h:
            for c_proj in (block.attn.c_proj, block.mlp.c_proj):
                c_proj.weight.zero_()
                c_proj.bias.zero_()
    inject(model, PromptTuningConfig(num_virtual_tokens=5))
    expected = torch.stack([model.ln_f(model.wte.weight[id] + model.wpe.weight[5 + t]) for t, id in enumerate(IDS[0])])
    torch.testing.assert_close(model(IDS)[0], expected, atol=1e-6, rtol=1e-6)


def test_a_prompt_of_words_is_the_text_with_these_words_before_it(make_model):
    model, base = make_model(GPT2LMHeadModel), make_model(GPT2LMHeadModel)
    inject(model, PromptTuningConfig(num_virtual_tokens=3))
    words = torch.tensor([11, 60, 7])
    with torch.no_grad():
        table(model).copy_(base.transformer.wte.weight[words])
    longer = torch.cat((words.expand(2, 3), IDS), dim=1)
    torch.testing.assert_close(model(IDS), base(longer)[:, 3:], atol=1e-5, rtol=1e-5)


def test_on_a_bfloat16_base_the_prompt_is_float32(make_model):
    model = inject(make_model(GPT2LMHeadModel).bfloat16(), PromptTuningConfig(num_virtual_tokens=3))
    assert table(model).dtype == torch.float32
    model(IDS).float().sum().backward()
    assert table(model).grad.dtype == torch.float32 and table(model).grad.isfinite().all()


# --- the start --------------------------------------------------------------------------------------------------------

def test_a_random_start_is_standard_normal_and_decided_by_the_seed(tiny_config, make_model):
    def start(seed):
        model = make_model(GPT2Model, dataclasses.replace(tiny_config, n_positions=400))
        torch.manual_seed(seed)
        return table(inject(model, PromptTuningConfig(num_virtual_tokens=300))).detach()

    drawn = start(1)
    assert drawn.mean().abs() < 0.05 and drawn.std().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(drawn, start(1)) and not torch.equal(drawn, start(2))


def test_a_start_from_the_vocabulary_is_rows_of_the_embedding(make_model):
    torch.manual_seed(0)
    model = make_model(GPT2LMHeadModel)
    inject(model, PromptTuningConfig(num_virtual_tokens=30, prompt_tuning_init="SAMPLE_VOCAB"))
    same = (table(model)[:, None] == model.transformer.wte.weight[None]).all(dim=2)          # (V, vocabulary)
    assert same.any(dim=1).all()
    assert len(same.int().argmax(dim=1).unique()) > 15


@pytest.mark.parametrize(("V", "ids"), [
    (3, [97, 259, 262]), (2, [97, 259]), (7, [97, 259, 262, 97, 259, 262, 97])], ids=["exact", "cut", "repeated"])
def test_a_start_from_a_text_is_its_words_cut_or_repeated_to_v(tiny_config, make_model, tmp_path, V, ids):
    write_vocabulary(tmp_path)
    assert (MERGES[3], MERGES[6]) == (" good", " bad")
    model = make_model(GPT2LMHeadModel, dataclasses.replace(tiny_config, vocab_size=VOCAB_SIZE))
    inject(model, PromptTuningConfig(num_virtual_tokens=V, prompt_tuning_init="TEXT",
                                     prompt_tuning_init_text="a good bad", tokenizer_name_or_path=str(tmp_path)))
    assert torch.equal(table(model), model.transformer.wte.weight[ids])


def test_a_start_from_a_text_uses_the_models_own_vocabulary_unless_told_otherwise(tmp_path):
    model = GPT2LMHeadModel.from_pretrained(write_tiny_model(tmp_path))
    inject(model, PromptTuningConfig(num_virtual_tokens=2, prompt_tuning_init="TEXT", prompt_tuning_init_text=" good"))
    assert torch.equal(table(model), model.transformer.wte.weight[[259, 259]])


def test_a_start_from_a_text_with_the_bundled_vocabulary(tiny_config, make_model):
    model = make_model(GPT2ForSequenceClassification, dataclasses.replace(tiny_config, vocab_size=8192))
    text = "Is this film review positive or negative?"
    inject(model, PromptTuningConfig(num_virtual_tokens=5, prompt_tuning_init="TEXT", prompt_tuning_init_text=text,
                                     tokenizer_name_or_path="mini"))
    assert torch.equal(table(model), model.transformer.wte.weight[get_tokenizer("mini").encode(text)[:5]])


@pytest.mark.parametrize("fields", [{"prompt_tuning_init": "SAMPLE_VOCAB"}, {
    "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a film", "tokenizer_name_or_path": "mini"}], ids=str)
def test_training_a_prompt_of_words_does_not_move_the_words(tiny_config, make_model, fields):
    model = make_model(GPT2LMHeadModel, dataclasses.replace(tiny_config, vocab_size=8192))
    words = model.transformer.wte.weight.detach().clone()
    inject(model, PromptTuningConfig(num_virtual_tokens=2, **fields))
    before = table(model).detach().clone()
    model(IDS).square().mean().backward()
    torch.optim.SGD([table(model)], lr=1.0).step()
    assert not torch.equal(table(model), before)
    assert torch.equal(model.transformer.wte.weight, words)


# --- counts -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("V", "C"), [(1, 24), (7, 24), (20, 12)])
def test_trained_parameters_are_v_times_the_width(V, C):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=40, n_embd=C, n_layer=1, n_head=3))
    assert trainable_parameters(inject(model, PromptTuningConfig(num_virtual_tokens=V))).trainable == V * C


def test_the_count_at_gpt2s_size():
    with torch.device("meta"):
        model = GPT2ForSequenceClassification(GPT2Config.official("gpt2"))
    assert trainable_parameters(inject(model, PromptTuningConfig())).trainable == 15_360 + 2 * 768
    assert "20 * 768 = 15,360" in prompt.__doc__
