from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magicface_rt import Concept, Options, Reference
from magicface_rt.regions import token_arrays
from magicface_rt.schedule import is_region_step
from magicface_rt.values.plain_numbers import as_float, is_number, is_whole

NARROW = pytest.mark.parametrize("kind", [np.float16, np.float32])
TENTHS = pytest.mark.parametrize("tenths", range(1, 10))


@NARROW
@TENTHS
def test_a_narrow_number_is_what_it_is_written_as(kind: Any, tenths: int) -> None:
    value = tenths / 10
    narrow = kind(value)
    options = Options(alpha=narrow, ca_scale=narrow, guidance=narrow)
    assert (options.alpha, options.ca_scale, options.guidance) == (value, value, value)
    assert Concept("man", Reference("man.png"), weight=narrow).weight == value
    assert [is_region_step(k, 10, narrow) for k in range(10)] == [is_region_step(k, 10, value) for k in range(10)]
    assert token_arrays([(1,)], narrow, 1)["foreground_only"] == token_arrays([(1,)], value, 1)["foreground_only"]


@given(value=st.floats(width=32))
def test_it_comes_back_as_it_was(value: float) -> None:
    found = as_float(np.float32(value))
    assert type(found) is float
    assert np.float32(found) == np.float32(value) or math.isnan(value)


@given(value=st.floats(allow_nan=False) | st.integers(-(2**53), 2**53))
def test_wider_numbers_stay(value: float) -> None:
    assert as_float(value) == as_float(np.float64(value)) == as_float(np.longdouble(value)) == value
    assert type(as_float(np.int64(3))) is float


@pytest.mark.parametrize("text", ["0", "7", "-7", "+7", "349585", "9" * 5000])
def test_whole_numbers_are_numbers_too(text: str) -> None:
    assert is_whole(text)
    assert is_number(text)


@pytest.mark.parametrize("text", ["0.5", ".5", "7.", "-1e1", "2.5E-3", "+1.0e+2"])
def test_fractions_are_no_whole_numbers(text: str) -> None:
    assert is_number(text)
    assert not is_whole(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " 1",
        "1 ",
        "1\n",
        "1_0",
        "0123",
        "00",
        "0x10",
        "0b1",
        "1:30",
        "٣",
        "１２８",
        "nan",
        "inf",
        ".inf",
        "-",
        ".",
        "e1",
    ],
)
def test_what_readers_may_take_for_different_numbers_is_none(text: str) -> None:
    assert not is_whole(text)
    assert not is_number(text)
