"""equation.py: the notation of the docstrings, computed."""

from __future__ import annotations

import pytest
import torch

from minipeft.errors import ConfigError
from minipeft.explain.equation import compute, equation_of, symbols_in

VALUES = {"x": torch.tensor([[1.0, 2.0]]), "W": torch.tensor([[1.0, 0.0], [3.0, 1.0], [0.0, 2.0]]),
          "A": torch.ones(1, 2), "B": torch.tensor([[1.0], [0.0], [2.0]]), "s": 2.0, "t": 3, "twice": lambda v: v + v,
          "c": torch.tensor([1.0, 10.0, 100.0]), "table": torch.arange(8.0).view(4, 2), "ids": torch.tensor([[3, 0]]),
          "V": 1}


def value_of(expression):
    return compute(expression, VALUES)[-1].value


@pytest.mark.parametrize(("expression", "expected"), [
    ("x W^T", [[1, 5, 4]]),
    ("x W^T + s * x A^T B^T", [[1 + 6, 5, 4 + 12]]),        # side by side binds tighter than *, * than +
    ("c * x W^T", [[1, 50, 400]]),
    ("c * (x + x) W^T / s - c", [[0, 40, 300]]),
    ("s B A", [[2, 2], [0, 0], [4, 4]]),                    # a number beside a matrix scales it
    ("diag(c) B", [[1], [0], [200]]),
    ("||W||", [1, 10**0.5, 2]),
    ("twice(x) W^T", [[2, 10, 8]]),
    ("twice(x^2)", [[2, 8]]),
    ("[x; W]", [[1, 2], [1, 0], [3, 1], [0, 2]]),
    ("x [x; W]^T", [[5, 1, 5, 4]]),
    ("table[ids]", [[[6, 7], [0, 1]]]),
    ("twice(table[ids])[V:]", [[[0, 2]]]),
    ("softmax(0 * x)", [[0.5, 0.5]])])
def test_an_expression_comes_to(expression, expected):
    torch.testing.assert_close(value_of(expression), torch.tensor(expected, dtype=torch.float32))


def test_numbers_need_no_tensors():
    assert value_of("1 - 0.5^t") == 0.875 and value_of("sqrt(16) / s - 1 - 1") == 0


def test_every_part_is_noted_once_where_it_stands_and_in_the_order_of_computing():
    text = "x W^T + s * twice(x) A^T B^T"
    terms = compute(text, VALUES)
    assert [term.text for term in terms] == [
        "x", "W", "x W^T", "s", "twice(x)", "A", "twice(x) A^T", "B", "twice(x) A^T B^T", "s * twice(x) A^T B^T", text]
    assert all(text[term.start:term.end] == term.text for term in terms)
    assert [term.text for term in terms if term.symbol] == ["x", "W", "s", "A", "B"]


@pytest.mark.parametrize(("expression", "message"), [
    ("x Q^T", "nothing is known of 'Q'"), ("x W^T +", "it ends too early"), ("(x", r"'\)' is missing"),
    ("x)", r"'\)' is not expected"), ("x % W", "none of this notation"), ("[x, W]", "none of this notation")])
def test_what_cannot_be_computed_is_refused(expression, message):
    with pytest.raises(ConfigError, match=message):
        compute(expression, VALUES)


def test_the_lines_of_a_docstring_s_equation_and_the_symbols_of_one():
    lines = equation_of("A title.\n\nWords.\n\n    y = x W^T    a remark, and more\n    c = m\n\n    not this\n")
    assert [(line.left, line.right, line.remark) for line in lines] == [("y", "x W^T", "a remark, and more"),
                                                                        ("c", "m", "")]
    assert symbols_in("softmax(q [P_k; k]^T / sqrt(D)) v^t") == {"q", "P_k", "k", "D", "v", "t"}
