"""What is killed, or runs on a bad disk: everything that writes, as functions of what JSON can hold.

Each returns an exit code. Those that are no verb say an error of ours as the command line does.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from magicface_rt.errors import MagicFaceError
from magicface_rt.files import atomic_files

SIDE = 64
"""Pixels of a made-up result, of noise: its pictures have some kilobytes."""

EXPORTED = ("text_encoder", "vae_decoder")
"""The graphs of a bundle that is written without computing."""


def cli(arguments: list[str]) -> int:
    """A verb."""
    from magicface_rt.cli import main

    return main(arguments)


def loud_cli(arguments: list[str]) -> int:
    """A verb, with all that every library has to log."""
    import logging

    logging.basicConfig(stream=sys.stderr, level=logging.DEBUG, format="%(levelname)s %(name)s: %(message)s")
    return cli(arguments)


def result(out: str, mark: int, overwrite: bool, exchange: bool = True) -> int:
    """A result that says by `mark`, 0 to 255, which it is. `exchange`: whether two folders can change places."""
    with contextlib.ExitStack() as stack:
        if not exchange:
            stack.enter_context(mock.patch.object(atomic_files, "exchange", return_value=False))
        return _saying(lambda: made_result(mark).save(out, overwrite=overwrite))


def concept(source: str, out: str, mark: int, overwrite: bool) -> int:
    """The kept concept of a file, with `mark` as its weight."""
    from magicface_rt import KeptConcept

    kept = KeptConcept.load(source, check_hashes=False).renamed(weight=float(mark))
    return _saying(lambda: kept.save(out, overwrite=overwrite))


def export(arguments: list[str], ready: str) -> int:
    """The verb `export`, all of it but its computing: two graphs come from a ready bundle and not from tracing them,
    and none is compared with PyTorch. What is written goes through the code that always writes it.
    """
    import onnx_ir as ir

    from magicface_rt.bundle import Bundle
    from magicface_rt.export import bundle_writer, exporter
    from magicface_rt.export.fusion import Fused
    from magicface_rt.export.graph_parity import GraphParity

    bundle = Bundle.open(ready, check_hashes=False)
    traced = _traced(ready)

    def graphs(*_: object) -> Iterator[Callable[[], Any]]:
        for name in EXPORTED:
            yield lambda name=name: _Graph(bundle.graph(name))

    def compared(_: object, expected: Any, *__: object, **___: object) -> GraphParity:
        return GraphParity(expected.graph, {"out": 0.0}, {"out": 1.0})

    with (
        mock.patch.object(exporter, "graph_makers", graphs),
        mock.patch.object(exporter, "trace", lambda graph: ir.from_proto(traced[graph.name])),
        mock.patch.object(exporter, "expected_outputs", lambda graph, _: SimpleNamespace(graph=graph.name)),
        mock.patch.object(exporter, "compare_graph", compared),
        mock.patch.object(bundle_writer, "fuse", return_value=Fused({}, ())),
    ):
        return cli(arguments)


def made_result(mark: int) -> Any:
    """A picture whose first pixel is (mark, mark, mark), and the rest noise."""
    from magicface_rt.concept import Concept, Reference
    from magicface_rt.options import Options
    from magicface_rt.results import Result

    class Plain(Result):
        """Without the legend, whose drawing would take most of the time."""

        def overlay(self, index: int = 0) -> Image.Image:
            return self.images[index]

    pixels = np.random.default_rng(mark).integers(0, 255, (SIDE, SIDE, 3), np.uint8)
    pixels[0, 0] = mark
    return Plain(
        images=[Image.fromarray(pixels)],
        regions=np.full((1, SIDE // 16, SIDE // 16), mark % 2, np.int64),
        latents=np.zeros((1, 4, SIDE // 8, SIDE // 8), np.float32),
        prompt=f"a man, {mark}",
        concepts=[Concept("man", Reference(pixels, mask=np.full((SIDE, SIDE), 255, np.uint8)))],
        options=Options(),
    )


class _Graph:
    """What the exporter wants of a graph that it need not trace."""

    def __init__(self, contract: Any) -> None:
        self.name, self.inputs, self.outputs = contract.name, contract.inputs, contract.outputs

    def eval(self) -> _Graph:
        return self

    def requires_grad_(self, _: bool) -> _Graph:
        return self

    def parameters(self) -> Iterator[Any]:
        import torch

        yield torch.zeros(1)


_TRACED: dict[str, dict[str, Any]] = {}


def _traced(ready: str) -> dict[str, Any]:
    """The graphs of a bundle with their weights, as tracing gives them; read once in a process."""
    if ready not in _TRACED:
        import onnx

        from magicface_rt.bundle import Bundle

        with tempfile.TemporaryDirectory() as own:
            # onnx refuses weights that have several hard links, as those have that other tests make bundles of.
            bundle = Bundle.open(shutil.copytree(ready, Path(own) / "bundle"), check_hashes=False)
            _TRACED[ready] = {
                name: onnx.load_model(str(bundle.path / graph.files["onnxruntime"]))
                for name, graph in bundle.graphs.items()
                if name in EXPORTED
            }
    return _TRACED[ready]


def _saying(save: Callable[[], object]) -> int:
    try:
        save()
    except MagicFaceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


# What is loaded before anything is forked, so that a child begins at once.


def load_cli(_: str) -> None:
    import onnxruntime  # noqa: F401

    from magicface_rt import KeptConcept, Session  # noqa: F401
    from magicface_rt.cli import _verbs  # noqa: F401

    Image.init()


def load_export(ready: str) -> None:
    load_cli(ready)
    from magicface_rt.export import checkpoint, exporter  # noqa: F401

    _traced(ready)


def load_build(ready: str) -> None:
    load_cli(ready)
    import tensorrt_rtx  # noqa: F401

    from magicface_rt.engines import builder  # noqa: F401


def load_serve(ready: str) -> None:
    load_cli(ready)
    from magicface_rt.serve import server  # noqa: F401


def load_ui(ready: str) -> None:
    load_serve(ready)
    from magicface_rt.ui import facts, mounting  # noqa: F401
