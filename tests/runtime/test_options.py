from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from magicface_rt.errors import OptionError, PromptError
from magicface_rt.options import Options

GOOD = [
    ("steps", 1),
    ("steps", 1000),
    ("guidance", 0.001),
    ("guidance", 1000),
    ("alpha", 0),
    ("alpha", 1.0),
    ("ca_scale", None),
    ("ca_scale", 2.0),
    ("ca_scale", 0.001),
    ("weight_mode", "scale"),
    ("semantic_guidance", False),
    ("seed", 2**64 - 1),
    ("images", 1),
    ("images", 1024),
    ("reference_seed", 0),
]
BAD = [
    ("steps", 0),
    ("steps", 1001),
    ("steps", 2.0),
    ("steps", True),
    ("steps", "50"),
    ("guidance", 0),
    ("guidance", -1.0),
    ("guidance", 1000.5),
    ("guidance", float("nan")),
    ("guidance", float("inf")),
    ("guidance", True),
    ("alpha", -0.01),
    ("alpha", 1.01),
    ("alpha", float("nan")),
    ("alpha", None),
    ("ca_scale", 0.0),
    ("ca_scale", 2.01),
    ("ca_scale", float("inf")),
    ("weight_mode", "add"),
    ("weight_mode", None),
    ("weight_mode", np.array(["bias"])),
    ("weight_mode", np.array(["bias", "scale"])),
    ("semantic_guidance", 1),
    ("seed", -1),
    ("seed", 2**64),
    pytest.param("seed", 10**5000, id="seed-huge"),
    ("images", 0),
    ("images", 1025),
    ("reference_seed", -1),
]


def test_the_defaults_are_the_authors() -> None:
    options = Options()
    assert (options.steps, options.guidance, options.alpha, options.weight_mode) == (50, 7.5, 0.4, "bias")
    assert (options.semantic_guidance, options.seed, options.images, options.reference_seed) == (True, 0, 1, 0)
    assert (options.negative_prompt, options.ca_scale) == ("", None)


@pytest.mark.parametrize(("name", "value"), GOOD)
def test_values_in_range_are_taken(name: str, value: Any) -> None:
    assert getattr(Options(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), BAD)
def test_values_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=rf"^{name} is .+, expected "):
        Options(**{name: value})


def test_the_message_has_the_value_and_the_range() -> None:
    with pytest.raises(OptionError, match=r"^alpha is 1.5, expected a finite number from 0 to 1\.$"):
        Options(alpha=1.5)
    with pytest.raises(OptionError, match=r"^guidance is 0, expected a finite number above 0, up to 1000\.$"):
        Options(guidance=0)
    with pytest.raises(OptionError, match=r"^seed is -1, expected a whole number from 0 to 2\*\*64-1\.$"):
        Options(seed=-1)
    with pytest.raises(OptionError, match=r"^steps is 0, expected a whole number from 1 to 1000\.$"):
        Options(steps=0)


def test_a_negative_prompt_is_text() -> None:
    with pytest.raises(PromptError, match="negative_prompt is None"):
        Options(negative_prompt=None)  # type: ignore[arg-type]


def test_numbers_of_numpy_become_pythons() -> None:
    options = Options(steps=np.int64(7), guidance=np.float32(2.5), semantic_guidance=np.bool_(True))  # type: ignore[arg-type]
    assert json.loads(json.dumps(options.to_dict()))["steps"] == 7


def test_options_come_back_equal_from_their_dict() -> None:
    options = Options(negative_prompt="bad", steps=7, ca_scale=0.5, seed=2**64 - 1)
    assert Options(**json.loads(json.dumps(options.to_dict()))) == options


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(("concepts", "expected"), [(0, 0.9), (1, 0.9), (2, 0.6), (6, 0.6)])
def test_ca_scale_follows_the_number_of_concepts_unless_given(concepts: int, expected: float) -> None:
    assert Options().effective_ca_scale(concepts) == expected
    assert Options(ca_scale=0.75).effective_ca_scale(concepts) == 0.75


def test_settings_are_given_by_name_only() -> None:
    with pytest.raises(TypeError):
        Options("rain")  # type: ignore[misc]


def test_settings_by_name_win_over_an_object() -> None:
    given = Options(steps=7, seed=3)
    assert Options.of(None, {}) == Options()
    assert Options.of(given, {}) == given
    assert Options.of(None, {"alpha": 0.5}) == Options(alpha=0.5)
    assert Options.of(given, {"seed": 4}) == Options(steps=7, seed=4)


def test_settings_that_are_not_known_are_refused_with_what_may_be_meant() -> None:
    with pytest.raises(OptionError, match=r"^setting 'stepz' is not known\. Is steps meant\?$"):
        Options.of(None, {"stepz": 3})
    with pytest.raises(OptionError, match=r"^setting 'colour' is not known\. There are negative_prompt, .*, images, "):
        Options.of(None, {"colour": 3})
    with pytest.raises(OptionError, match=r"options is {'steps': 3}, expected an Options object"):
        Options.of({"steps": 3}, {})  # type: ignore[arg-type]
