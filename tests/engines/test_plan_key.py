"""Keys: what makes two plans the same, and how a difference is named."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from store_worker import sample_key

from magicface_rt.engines.plan_key import SCHEMA, PlanKey, graph_hash
from magicface_rt.errors import PlanError

OTHER: dict[str, Any] = {
    "graph": "vae_decoder",
    "graph_hash": "f" * 64,
    "flavour": "tensorrt",
    "flavour_version": "1.8.0",
    "precision": "bf16",
    "compute_capabilities": ("8.6",),
    "profile": {"latents": ((1, 4, 64, 64), (1, 4, 64, 64), (8, 4, 64, 64))},
    "builder_options": {"tf32": True},
    "schema": SCHEMA + 1,
}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-2, 2) | st.text("ab.", max_size=2),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab.", max_size=2), inner, max_size=2),
    max_leaves=6,
)
options = st.dictionaries(st.text("ab.", max_size=2), json_values, max_size=3)
shapes = st.integers(0, 3).flatmap(
    lambda rank: st.tuples(*[st.tuples(*[st.integers(0, 3)] * rank)] * 3),
)
keys = st.builds(
    sample_key,
    precision=st.sampled_from(["fp16", "bf16"]),
    compute_capabilities=st.lists(st.sampled_from(["7.5", "8.6", "12.0"]), min_size=1, max_size=3),
    profile=st.dictionaries(st.sampled_from(["a", "b"]), shapes),
    builder_options=options,
)


@pytest.mark.parametrize("field", OTHER)
def test_each_field_changes_the_digest_and_is_named(field: str) -> None:
    key, other = sample_key(), sample_key(**{field: OTHER[field]})
    assert key.digest != other.digest
    assert {difference.field.partition(".")[0] for difference in other.differences(key)} == {field}


def test_nested_fields_are_named_with_what_was_found_and_expected() -> None:
    found = sample_key(builder_options={"tf32": True, "optimisation_level": 3, "workspace": {"bytes": 5}, "extra": 1})
    by_name = {d.field: (d.found, d.expected) for d in found.differences(sample_key())}
    assert by_name == {
        "builder_options.tf32": (True, False),
        "builder_options.workspace.bytes": (5, 1 << 30),
        "builder_options.extra": (1, None),
    }
    wide = dict(sample_key().profile)
    wide["k_ref_13"] = ((1, 1, 320), (1, 1229, 320), (4, 99, 320))
    (difference,) = sample_key(profile=wide).differences(sample_key())
    assert (difference.field, difference.found, difference.expected) == (
        "profile.k_ref_13.max",
        [4, 99, 320],
        [4, 12288, 320],
    )
    assert "another range of shapes" in str(difference)
    assert "[4,99,320]" in str(difference)


@given(keys, keys)
@example(sample_key(builder_options={}), sample_key(builder_options={"a": {}}))
@example(sample_key(builder_options={"a.b": 1}), sample_key(builder_options={"a": {"b": 1}}))
@example(sample_key(builder_options={}), sample_key(builder_options={"a": None}))
@example(sample_key(profile={}), sample_key(profile={"a": ((), (), ())}))
@example(sample_key(), sample_key())
def test_two_keys_are_equal_exactly_when_no_field_differs(one: PlanKey, other: PlanKey) -> None:
    assert (one == other) == (one.digest == other.digest) == (not one.differences(other))
    assert len(one.differences(other)) == len(other.differences(one))


@given(keys)
def test_a_key_survives_json(key: PlanKey) -> None:
    read = PlanKey.from_dict(key.to_dict())
    assert read == key
    assert hash(read) == hash(key)
    assert read.digest == key.digest


def test_order_of_capabilities_and_names_does_not_count() -> None:
    key = sample_key()
    assert sample_key(compute_capabilities=("8.9", "8.6", "8.9")) == key
    assert sample_key(compute_capabilities=["12.0", "8.6"]).compute_capabilities == ("8.6", "12.0")
    assert sample_key(profile=dict(reversed(key.profile.items()))) == key
    assert sample_key(builder_options=dict(reversed(key.builder_options.items()))) == key


def test_equal_numbers_of_different_types_are_different_options() -> None:
    """Python's 1 == True == 1.0 must not make two options one."""
    one, yes, real = (sample_key(builder_options={"x": value}) for value in (1, True, 1.0))
    assert len({one, yes, real}) == 3
    assert [d.field for d in one.differences(yes)] == ["builder_options.x"]


def test_the_graph_hash_depends_on_both_files() -> None:
    assert len({graph_hash("a", "b"), graph_hash("b", "a"), graph_hash("a", "c"), graph_hash("c", "b")}) == 4
    assert sample_key(graph_hash=graph_hash("a", "b")).graph_hash == graph_hash("a", "b")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("flavour", "../tensorrt"),
        ("flavour", ""),
        ("graph", "a/b"),
        ("graph_hash", "abc"),
        ("flavour_version", None),
        ("precision", "FP16"),
        ("compute_capabilities", ()),
        ("compute_capabilities", ("86",)),
        ("compute_capabilities", "8.6"),
        ("profile", {"latents": ((1,), (1,))}),
        ("profile", {"latents": ((1,), (1, 2), (1,))}),
        ("profile", {"latents": (("B",), ("B",), ("B",))}),
        ("profile", {"latents": 3}),
        ("builder_options", {"x": float("nan")}),
        ("builder_options", {"x": object()}),
        ("schema", "1"),
    ],
)
def test_a_field_of_another_form_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(PlanError, match=field):
        sample_key(**{field: value})


def test_a_stored_key_with_other_fields_is_refused() -> None:
    values = sample_key().to_dict()
    with pytest.raises(PlanError, match="extra"):
        PlanKey.from_dict({**values, "extra": 1})
    with pytest.raises(PlanError, match="expected"):
        PlanKey.from_dict({name: value for name, value in values.items() if name != "precision"})
    with pytest.raises(PlanError, match="profile"):
        PlanKey.from_dict({**values, "profile": {"latents": {"min": [1]}}})
    with pytest.raises(PlanError, match="list"):
        PlanKey.from_dict([])  # type: ignore[arg-type]
