"""Inputs for tracing and for comparing graphs: seeded, valid, and shaped by a graph's contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from magicface_rt.bundle import Tensor

Array = np.ndarray


def sample_inputs(
    inputs: Sequence[Tensor], sizes: Mapping[str, int], *, seed: int, vocabulary: int = 49408
) -> dict[str, Array]:
    """Make one array for each input. `sizes` gives each symbol's value; 16-bit dtypes are returned as float32.

    Values are such as the graphs get in use: timesteps 1..999, distinct kept tokens, three groups and some padding.
    """
    rng = np.random.default_rng(seed)
    arrays: dict[str, Array] = {}
    for tensor in inputs:
        shape = tuple(sizes[d] if isinstance(d, str) else d for d in tensor.shape)
        arrays[tensor.name] = _sample(tensor, shape, sizes, inputs, rng, vocabulary)
    return arrays


def _sample(
    tensor: Tensor,
    shape: tuple[int, ...],
    sizes: Mapping[str, int],
    inputs: Sequence[Tensor],
    rng: np.random.Generator,
    vocabulary: int,
) -> Array:
    name = tensor.name
    if name == "token_ids":
        return rng.integers(0, vocabulary, shape)
    if name == "timestep":
        return rng.integers(1, 1000, shape)
    if name.startswith("kept_"):
        latents = next(t for t in inputs if t.name == "latents").shape
        factor = int(name.removeprefix("kept_"))
        tokens = sizes["R"] * (int(latents[2]) // factor) * (int(latents[3]) // factor)
        return np.sort(rng.choice(tokens, shape[0], replace=shape[0] > tokens))
    if name == "region_label":
        return rng.integers(0, 3, shape)
    if name.startswith("key_group"):
        return rng.integers(-1, 3, shape)
    if name == "token_group":
        groups = np.zeros(shape, np.int64)
        groups[:, 2], groups[:, 5] = 1, 2
        return groups
    if name == "token_scale":
        scale = np.full(shape, 0.6, np.float32)
        scale[:, [2, 5]] = 1.0
        return scale
    ranges = {"key_bias": (-2.0, 3.0), "key_scale": (0.8, 1.6), "guidance": (3.0, 7.5), "pixels": (-1.0, 1.0)}
    for prefix, (low, high) in ranges.items():
        if name.startswith(prefix):
            return rng.uniform(low, high, shape).astype(np.float32)
    if name == "foreground_only":
        return (np.arange(shape[0]) % 2 == 0).astype(np.float32)
    if name == "semantic_guidance":
        return (np.arange(shape[0]) < 2).astype(np.float32)
    if name == "ddim":
        return np.tile(np.array([1.02, -0.05], np.float32), (shape[0], 1))
    return rng.standard_normal(shape, dtype=np.float32)
