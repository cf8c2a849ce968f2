"""A backend that computes nothing and allocates nothing but its outputs: what is measured over it is the SDK's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from magicface_rt.backends import Backend, GraphRunner
from magicface_rt.backends.checks import match_sizes, output_shape
from magicface_rt.backends.host import host_dtype
from magicface_rt.bundle import Bundle

LABEL = "region_label_out"


class Hollow(Backend):
    """Every graph gives ones, in the shapes of its contract; the regions are those of no concept."""

    name = "hollow"

    def load(self, bundle: Bundle, graph: str) -> GraphRunner:
        return _Runner(bundle.graph(graph))


class _Runner(GraphRunner):
    def _run(self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> dict[str, Any]:
        sizes = match_sizes(self.contract, {name: array.shape for name, array in inputs.items()})
        made = {}
        for tensor in self.contract.outputs:
            if tensor.name in outputs:
                shape, dtype = output_shape(tensor, sizes), host_dtype(tensor.dtype)
                made[tensor.name] = np.zeros(shape, dtype) if tensor.name == LABEL else np.ones(shape, dtype)
        return made
