"""What all tests share: an offline session, a tiny model with nothing zero in it, seeded ids and padding masks."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

# Reproducible, and patient: a busy machine must not turn a slow example into a failure.
hypothesis.settings.register_profile("minipeft", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("minipeft")


def pytest_configure(config):
    """No test may reach the network or the user's own model cache, unless it builds its own environment."""
    config.temporary_hf_home = tempfile.mkdtemp(prefix="minipeft-tests-hf-")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HOME"] = config.temporary_hf_home


def pytest_unconfigure(config):
    shutil.rmtree(getattr(config, "temporary_hf_home", ""), ignore_errors=True)


@pytest.fixture
def tiny_config():
    """A GPT-2 of 17,000 parameters, without dropout."""
    from minipeft.model.config import GPT2Config

    return GPT2Config(vocab_size=97, n_positions=40, n_embd=24, n_layer=2, n_head=3, resid_pdrop=0.0, embd_pdrop=0.0,
                      attn_pdrop=0.0, classifier_dropout=0.0, bos_token_id=96, eos_token_id=96)


@pytest.fixture
def make_model(tiny_config):
    """make_model(cls, config=tiny_config, seed=0): a model in eval mode, its every parameter random and of a size that
    matters, so that no bias is zero, no LayerNorm is the identity, and a wrong tensor changes the output."""

    def make(cls, config=None, seed=0):
        model = cls(config or tiny_config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = 0.2 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + noise if "ln_" in name and name.endswith("weight") else noise)
        return model.eval()

    return make


@pytest.fixture
def make_ids():
    """make_ids(B, T, vocab_size=97, seed=0): (B, T) random token ids."""

    def make(B, T, vocab_size=97, seed=0):
        return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture
def make_mask():
    """make_mask(lengths, side="right"): a (B, max(lengths)) mask, 1 at real tokens and 0 at the padding on `side`."""

    def make(lengths, side="right"):
        T = max(lengths)
        rows = [[1] * n + [0] * (T - n) if side == "right" else [0] * (T - n) + [1] * n for n in lengths]
        return torch.tensor(rows)

    return make


@pytest.fixture(scope="session")
def peft_fixtures():
    """The folder of reference cases that peft and transformers wrote; it is not part of this repository."""
    folder = SHARED / "fixtures" / "peft"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not on this machine")
    return folder


@pytest.fixture(scope="session")
def tiktoken_cache():
    """A folder with tiktoken's files of GPT-2's vocabulary; it is not part of this repository."""
    folder = SHARED / "tiktoken_cache"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not on this machine")
    return folder
