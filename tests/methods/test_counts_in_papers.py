"""Trainable parameters against the numbers the papers print, on models of the papers' own shapes.

Weights are not needed: everything is on the meta device. Where a paper adapts the query and value matrices, which
GPT-2 keeps fused in one c_attn, the square attn.c_proj stands in: it has the shape of one of them, so that adapting W_q
and W_v is twice the count.

Not here, because the papers' own formulas do not give what they print: LoRA, Table 3, GPT-2 medium, 0.35M (r = 4 on W_q
and W_v makes 393,216), and Table 4, BitFit on GPT-3, 14.2M (all its biases make 13.0M).
"""

from __future__ import annotations

import pytest
import torch

from minipeft import (
    BitFitConfig,
    BottleneckConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    inject,
    trainable_parameters,
)
from minipeft.methods.vera import VeraConfig

SIZES = {  # blocks, width, heads
    "BERT-base, RoBERTa-base": (12, 768, 12),
    "BERT-large, RoBERTa-large, GPT-2 medium": (24, 1024, 16),
    "GPT-2 large": (36, 1280, 20),
    "GPT-3": (96, 12288, 96),
    "one block of T5 XXL's width": (1, 4096, 64),
}
MILLION, THOUSAND = 10**6, 10**3


def shapes_of(size):
    n_layer, n_embd, n_head = SIZES[size]
    with torch.device("meta"):
        return GPT2LMHeadModel(GPT2Config(n_layer=n_layer, n_embd=n_embd, n_head=n_head))


def trained(size, config):
    return trainable_parameters(inject(shapes_of(size), config)).trainable


def agrees(count, printed, unit):
    """As printed: rounded, or, as LoRA's tables do, cut off after the last digit shown."""
    digits = len(printed.partition(".")[2])
    return abs(count / unit - float(printed)) < 10**-digits


@pytest.mark.parametrize(("r", "matrices", "printed"), [
    (2, 1, "4.7"), (1, 2, "4.7"), (2, 2, "9.4"), (4, 2, "18.8"), (8, 2, "37.7"), (4, 4, "37.7"), (64, 2, "301.9")])
def test_lora_on_gpt3_as_in_table_15_of_hu_et_al(r, matrices, printed):
    one = trained("GPT-3", LoraConfig(r=r, target_modules=r".*attn\.c_proj"))
    assert agrees(matrices * one, printed, MILLION)


def test_lora_on_roberta_as_in_table_2_of_hu_et_al():
    """r = 8 on W_q and W_v: 0.3M for base, 0.8M for large."""
    config = LoraConfig(r=8, target_modules=r".*attn\.c_proj")
    assert agrees(2 * trained("BERT-base, RoBERTa-base", config), "0.3", MILLION)
    assert agrees(2 * trained("BERT-large, RoBERTa-large, GPT-2 medium", config), "0.8", MILLION)


@pytest.mark.parametrize(("r", "printed"), [(1, "7.1"), (4, "21.2"), (8, "40.1"), (16, "77.9"), (64, "304.4")])
def test_houlsby_adapters_on_gpt3_as_in_table_15_of_hu_et_al(r, printed):
    assert agrees(trained("GPT-3", BottleneckConfig(bottleneck_size=r)), printed, MILLION)


@pytest.mark.parametrize(("tokens", "printed"), [(64 + 8, "0.9"), (128 + 8, "1.7"), (256 + 8, "3.2"), (512 + 8, "6.4")])
def test_prompt_tuning_on_gpt3_as_prefix_embed_in_table_15_of_hu_et_al(tokens, printed):
    assert agrees(trained("GPT-3", PromptTuningConfig(num_virtual_tokens=tokens)), printed, MILLION)


def test_prompt_tuning_on_t5_xxl_as_in_figure_2_of_lester_et_al():
    assert trained("one block of T5 XXL's width", PromptTuningConfig(num_virtual_tokens=5)) == 20_480


def test_full_fine_tuning_of_gpt2_large_as_in_table_3_of_hu_et_al():
    assert agrees(trainable_parameters(shapes_of("GPT-2 large")).total, "774.03", MILLION)


@pytest.mark.parametrize(("size", "total", "printed"), [
    ("BERT-base, RoBERTa-base", 109_482_240, "0.09"), ("BERT-large, RoBERTa-large, GPT-2 medium", 335_141_888, "0.08")])
def test_bitfit_on_bert_as_in_table_1_of_ben_zaken_et_al(size, total, printed):
    """BERT's blocks have GPT-2's biases; `total` are BERT's own parameters, as its published weights have them."""
    assert agrees(trained(size, BitFitConfig()) / total, printed, 1 / 100)


@pytest.mark.parametrize(("size", "printed"), [
    ("BERT-large, RoBERTa-large, GPT-2 medium", "0.098"), ("GPT-2 large", "0.17")])
def test_vera_on_gpt2_as_in_table_3_of_kopiczko_et_al(size, printed):
    """r = 1024 on W_q and W_v."""
    assert agrees(2 * trained(size, VeraConfig(r=1024, target_modules=r".*attn\.c_proj")), printed, MILLION)


@pytest.mark.parametrize(("r", "printed"), [(1, "18.4"), (16, "18.8"), (256, "24.5")])
def test_vera_on_roberta_base_as_in_table_1_of_kopiczko_et_al(r, printed):
    config = VeraConfig(r=r, target_modules=r".*attn\.c_proj")
    assert agrees(2 * trained("BERT-base, RoBERTa-base", config), printed, THOUSAND)


def test_prefix_tuning_on_gpt2_medium_as_in_table_1_of_li_and_liang():
    """"Prefix (0.1 %)": five virtual tokens on E2E, counted as they are stored, without the reparametrisation."""
    model = inject(shapes_of("BERT-large, RoBERTa-large, GPT-2 medium"), PrefixTuningConfig(num_virtual_tokens=5))
    count = trainable_parameters(model)
    assert count.trainable == 5 * 24 * 2 * 1024
    assert round(100 * count.trainable / count.total, 1) == 0.1
