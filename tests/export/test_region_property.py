"""From masks to attention: the exported way (kept tokens, groups, channels) against the oracle's explicit masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_operators import HEADS, SCALE, WIDTH, session

from magicface_rt.export.reference import injected_attention, reference_access, reference_bias
from magicface_rt.regions import MaskedReference, cell_groups, kept_tokens, key_access

SESSIONS: dict[str, onnxruntime.InferenceSession] = {body: session(body) for body in ("onnxruntime", "tensorrt")}


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """One to six concepts, each with one to three references; overlapping, empty, tiny and full masks; regions of any
    shape, empty ones among them; weights of either sign, 0 among them."""
    concepts = draw(st.integers(1, 6))
    owners = [k for k in range(concepts) for _ in range(draw(st.integers(1, 2)))]
    kinds = st.sampled_from(["full", "empty", "one", "random", "band"])
    weights = st.one_of(st.just(0.0), st.floats(-2, 4).map(lambda w: round(w, 3)))
    per_concept = [draw(weights) for _ in range(concepts)]
    return {
        "rows": draw(st.integers(1, 6)),
        "columns": draw(st.integers(1, 6)),
        "owners": owners,
        "masks": [draw(kinds) for _ in owners],
        "weights": [per_concept[k] for k in owners],
        "stage": draw(st.sampled_from(["rsa", "rba"])),
        "mode": draw(st.sampled_from(["bias", "scale"])),
        "share": draw(st.floats(0, 1)),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


def mask_of(kind: str, rng: np.random.Generator) -> np.ndarray:
    mask = np.zeros((128, 128), np.uint8)
    if kind == "full":
        mask[:] = 1
    elif kind == "one":
        mask[rng.integers(128), rng.integers(128)] = 1
    elif kind == "random":
        mask[:] = rng.random((128, 128)) < rng.random()
    elif kind == "band":
        mask[rng.integers(64) : 64 + rng.integers(64)] = 1
    return mask


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_masks_and_regions_by_channels_equal_explicit_masks(case: dict[str, Any]) -> None:
    rng = np.random.default_rng(case["seed"])
    rows, columns, owners = case["rows"], case["columns"], case["owners"]
    cells, count, concepts = rows * columns, len(owners), max(owners) + 1
    masks = [mask_of(kind, rng) for kind in case["masks"]]
    label = rng.integers(1, concepts + 1, (rows, columns)) * (rng.random((rows, columns)) < case["share"])
    regions = torch.from_numpy(np.stack([label == k + 1 for k in range(concepts)]))
    own = {name: rng.standard_normal((1, cells, WIDTH)).astype(np.float32) for name in "qkv"}
    k_all, v_all = (rng.standard_normal((count, cells, WIDTH)).astype(np.float32) for _ in range(2))

    references = [MaskedReference(*one) for one in zip(masks, owners, case["weights"], strict=True)]
    kept = kept_tokens(references, rows, columns)
    access = key_access({1: kept}, case["stage"], case["mode"])
    scale = access["key_scale_1"][..., None]
    feed = {
        **own,
        "k_ref": k_all.reshape(1, -1, WIDTH)[:, kept.index] * scale,
        "v_ref": v_all.reshape(1, -1, WIDTH)[:, kept.index],
        "query_group": cell_groups(case["stage"], label[None].astype(np.int64)).reshape(1, -1),
        "key_group": access["key_group_1"],
        "key_bias": access["key_bias_1"],
    }

    def heads(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).double().unflatten(-1, (HEADS, -1)).transpose(-2, -3)

    seen = reference_access(case["stage"], regions, owners, rows, columns)
    weights = torch.tensor(case["weights"], dtype=torch.float64)
    bias, factor = reference_bias(torch.from_numpy(np.stack(masks)).bool(), weights, seen, rows, columns, case["mode"])
    expected = injected_attention(
        heads(own["q"][0]), heads(own["k"][0]), heads(own["v"][0]), heads(k_all), heads(v_all),
        bias=bias, factor=factor, scale=SCALE,
    )  # fmt: skip
    expected = expected.transpose(0, 1).flatten(1).numpy()
    for body, runner in SESSIONS.items():
        (out,) = runner.run(None, feed)
        np.testing.assert_allclose(out[0], expected, rtol=2e-5, atol=2e-5, err_msg=body)
