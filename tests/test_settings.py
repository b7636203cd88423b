"""settings.py: which numbers a field takes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from minipeft.errors import ConfigError
from minipeft.settings import FINITE, NOT_NEGATIVE, POSITIVE, Settings, setting


@dataclass
class Numbers(Settings):
    """A field of each kind that takes a float."""

    finite: float = setting(0.0, within=FINITE)
    positive: float = setting(1.0, within=POSITIVE)
    not_negative: float = setting(0.0, within=NOT_NEGATIVE)


@pytest.mark.parametrize("field", ["finite", "positive", "not_negative"])
@pytest.mark.parametrize("value", [10**400, -10**400, float("inf"), float("nan")], ids=["large", "small", "inf", "nan"])
def test_an_integer_that_is_no_float_is_out_of_range_as_infinity_is(field, value):
    with pytest.raises(ConfigError, match=f"^{field} must be .*finite"):
        Numbers(**{field: value})
    assert getattr(Numbers(**{field: 10**300}), field) == 10**300
