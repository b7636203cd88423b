"""errors.py: a message is one line, however much is wrong."""

from __future__ import annotations

from minipeft.errors import first_few


def test_the_first_few_of_many_are_named_and_the_others_counted():
    assert first_few([]) == "" and first_few(["a", "b"]) == "a; b"
    assert first_few(list("abcdef")) == "a; b; c; d; e; f"
    assert first_few(list("abcdefg")) == "a; b; c; d; e; f; and 1 more"
    assert first_few(["a"] * 2001, most=1) == "a; and 2,000 more"
