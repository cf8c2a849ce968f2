"""From masks and weights to the arrays by which the graphs know who sees whom."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magicface_rt.errors import ConceptError
from magicface_rt.regions import (
    PADDING,
    KeptTokens,
    MaskedReference,
    bucket,
    cell_groups,
    kept_tokens,
    key_access,
    token_arrays,
)


def full(concept: int, weight: float, share: float = 1.0) -> MaskedReference:
    mask = np.zeros((128, 128), np.uint8)
    mask[: int(128 * share)] = 1
    return MaskedReference(mask, concept, weight)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.sampled_from([4, 8, 12]), st.sampled_from([4, 16]))
def test_kept_tokens_lie_inside_their_masks_in_row_major_order(shares: list[float], rows: int, columns: int) -> None:
    references = [full(k, 2.0, share) for k, share in enumerate(shares)]
    kept = kept_tokens(references, rows, columns)
    assert (np.diff(kept.index) > 0).all()
    assert kept.count >= 1
    for index, concept in zip(kept.index, kept.concept, strict=True):
        if concept == PADDING:
            continue
        number, cell = divmod(int(index), rows * columns)
        row, column = divmod(cell, columns)
        assert number == concept
        assert references[number].mask_grid[128 * row // rows, 128 * column // columns]


def test_a_reference_of_weight_zero_keeps_nothing_and_does_not_shift_the_others() -> None:
    kept = kept_tokens([full(0, 0.0), full(1, 2.0)], 4, 4)
    assert list(kept.index) == list(range(16, 32))
    assert set(kept.concept) == {1}


def test_with_nothing_to_see_one_padding_key_stands_in() -> None:
    kept = kept_tokens([full(0, 2.0, 0.0)], 4, 4)
    assert (kept.index.tolist(), kept.concept.tolist(), kept.weight.tolist()) == ([0], [PADDING], [0.0])
    for stage in ("rsa", "rba"):
        assert key_access({1: kept}, stage, "bias")["key_group_1"].tolist() == [[PADDING]]


def test_the_stage_decides_whom_keys_and_cells_belong_to() -> None:
    kept = {1: kept_tokens([full(0, 3.0), full(1, 2.0)], 2, 2)}
    label = np.array([[[0, 1], [2, 0]]])
    assert set(key_access(kept, "rsa", "bias")["key_group_1"].ravel()) == {1}
    assert key_access(kept, "rba", "bias")["key_group_1"].tolist() == [[1] * 4 + [2] * 4]
    assert (cell_groups("rsa", label) == 1).all()
    assert (cell_groups("rba", label) == label).all()
    assert not cell_groups("off", label).any()


def test_a_weight_is_a_bias_or_a_factor() -> None:
    kept = {1: kept_tokens([full(0, 3.0)], 2, 2)}
    bias, scale = key_access(kept, "rsa", "bias"), key_access(kept, "rsa", "scale")
    assert set(bias["key_bias_1"].ravel()) == {3.0}
    assert set(bias["key_scale_1"].ravel()) == {1.0}
    assert set(scale["key_bias_1"].ravel()) == {0.0}
    assert set(scale["key_scale_1"].ravel()) == {3.0}


def test_tokens_of_no_concept_are_scaled_and_the_later_concept_has_a_shared_token() -> None:
    arrays = token_arrays([(2, 3), (3,)], 0.6, 2)
    assert arrays["token_scale"][1, :5].tolist() == pytest.approx([0.6, 0.6, 1.0, 1.0, 0.6])
    assert arrays["token_group"][0, :5].tolist() == [0, 0, 1, 2, 0]
    assert arrays["foreground_only"].tolist() == [1.0, 1.0]
    assert token_arrays([(1,)], 0.9, 1)["foreground_only"].tolist() == [0.0]


def test_more_concepts_than_groups_are_refused() -> None:
    with pytest.raises(ConceptError, match="at most 6"):
        token_arrays([(k,) for k in range(1, 8)], 0.6, 1)
    assert token_arrays([(k,) for k in range(1, 7)], 0.6, 1)["token_group"].max() == 6


def test_nobody_is_minus_one_and_a_prompt_has_77_tokens() -> None:
    """As the exported graphs have it: docs/bundle-format.md."""
    assert PADDING == -1
    arrays = token_arrays([(1,)], 0.6, 2)
    assert {name: array.shape for name, array in arrays.items()} == {
        "token_scale": (2, 77),
        "token_group": (2, 77),
        "foreground_only": (2,),
    }


def test_padding_stands_behind_and_weighs_nothing() -> None:
    tokens = kept_tokens([full(0, 2.0)], 2, 2)
    padded = tokens.padded(6)
    assert padded.index.tolist() == [0, 1, 2, 3, 0, 0]
    assert padded.concept.tolist() == [0] * 4 + [PADDING] * 2
    assert padded.weight.tolist() == [2.0] * 4 + [0.0] * 2
    assert tokens.padded(5).count == 5
    for count in (4, 3):
        assert tokens.padded(count) is tokens


@pytest.mark.parametrize("weight", [1.0, -1.0, 1e-6])
def test_only_a_weight_of_zero_hides_a_reference(weight: float) -> None:
    kept = kept_tokens([full(0, weight)], 2, 2)
    assert kept.weight.tolist() == [np.float32(weight)] * 4
    assert kept.concept.tolist() == [0] * 4


def test_buckets_are_four_an_octave_from_16() -> None:
    found = sorted({bucket(count) for count in range(1, 600)})
    assert found == [16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640]
    assert [bucket(count, 100) for count in (90, 97, 100, 101)] == [96, 100, 100, 101]


def test_what_the_graphs_are_told_cannot_be_changed_afterwards() -> None:
    for frozen in (full(0, 1.0), KeptTokens(*[np.zeros(1, np.int64)] * 2, np.zeros(1, np.float32))):
        with pytest.raises(FrozenInstanceError):
            frozen.weight = 2.0  # type: ignore[misc]
