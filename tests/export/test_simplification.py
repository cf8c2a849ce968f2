"""The few rules that are tried leave the same graph as all of onnxscript's."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from onnxscript import optimizer

from magicface_rt.export import tracing
from magicface_rt.export.attention import DEFAULT_INJECTION_LAYERS
from magicface_rt.export.checkpoint import Checkpoint
from magicface_rt.export.exporter import graph_makers
from magicface_rt.export.graphs import Form

GRAPHS = ("text_encoder", "vae_encoder", "vae_decoder", "reference_kv", "denoise_step")
QUICK = ("vae_encoder",)


def traced(checkpoint: Checkpoint, index: int) -> onnx.GraphProto:
    """A graph without what it says of where it comes from."""
    import torch

    form = Form(height=256, width=256, vae_factor=8, dtype=torch.float16, text_width=checkpoint.text_width)
    make = list(graph_makers(checkpoint, form, DEFAULT_INJECTION_LAYERS))[index]
    graph = ir.serde.serialize_model(tracing.trace(make().eval().requires_grad_(False))).graph
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    del graph.value_info[:], graph.metadata_props[:]
    return graph


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in GRAPHS]
)
def test_the_graph_is_the_one_that_all_rules_leave(
    name: str, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    ours = traced(checkpoint, GRAPHS.index(name))
    monkeypatch.setattr(tracing, "simplify", optimizer.optimize_ir)
    theirs = traced(checkpoint, GRAPHS.index(name))
    assert [node.op_type for node in ours.node] == [node.op_type for node in theirs.node]
    assert ours == theirs
