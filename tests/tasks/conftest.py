"""What the tests of tasks share."""

from __future__ import annotations

import pytest
from helpers import write_vocabulary

from minipeft.model.tokenizer import get_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    write_vocabulary(folder)
    return get_tokenizer(folder)
