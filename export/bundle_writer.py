"""Writing a bundle: graphs over one shared weights file, and a folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import onnx
import onnx_ir as ir
import torch

from magicface_rt.bundle import CUDA_RUNTIME, FORMAT, MANIFEST, RUNTIMES, WEIGHTS, Bundle, Tensor, sha256
from magicface_rt.errors import ExportError, OutputError
from magicface_rt.files import atomic_files
from magicface_rt.process.interrupts import reraise_if_interrupt

from .fusion import Fused, fuse
from .graphs import Graph
from .long_sums import split_long_sums
from .operators import write_bodies

_ALIGNMENT = 4096
_INLINE_BYTES = 1024
"""Smaller tensors stay in the graph file: shapes and scalars that runtimes fold."""


class WeightsFile:
    """One file for the weights of all graphs; equal tensors are written once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream = path.open("wb")
        self._offsets: dict[tuple[bytes, int], int] = {}

    def externalize(self, model: ir.Model) -> None:
        """Move the model's large initializers into the file, in place; those that are external already are skipped."""
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < _INLINE_BYTES or isinstance(tensor, ir.ExternalTensor):
                continue
            content = tensor.tobytes()
            value.const_value = ir.ExternalTensor(
                self.path.name,
                self._offset_of(content),
                len(content),
                tensor.dtype,
                shape=tensor.shape,
                name=value.name,
                base_dir=self.path.parent,
            )

    def _offset_of(self, content: bytes) -> int:
        key = (hashlib.sha256(content).digest(), len(content))
        if key not in self._offsets:
            self._stream.write(b"\0" * (-self._stream.tell() % _ALIGNMENT))
            self._offsets[key] = self._stream.tell()
            self._stream.write(content)
        return self._offsets[key]

    def flush(self) -> None:
        self._stream.flush()

    def close(self, *, keep: bool = True) -> None:
        """Close the file. A failure, such as a full disk, raises only if the file is to be kept."""
        with contextlib.suppress(OSError) if not keep else contextlib.nullcontext():
            self._stream.close()


class BundleWriter:
    """A context in which a bundle is written into a hidden folder beside its place; `finish` renames the folder.

    Entering the context removes what killed processes left there; leaving it without `finish` removes everything.
    """

    def __init__(self, out: Path) -> None:
        self.out = out.absolute()
        self.graphs: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> BundleWriter:
        if os.path.lexists(self.out):
            raise OutputError(f"output folder {self.out} exists. Choose another name, or remove it first.")
        self._part = atomic_files.temporary_sibling(self.out, folder=True)
        try:
            atomic_files.make_folder(self.out.parent)
            self.folder = self._part.__enter__()
            self.weights = WeightsFile(self.folder / WEIGHTS)
        except BaseException as error:  # an interrupt as well: `__exit__` is not called then
            self._part.close()
            if isinstance(error, OSError):
                reraise_if_interrupt(error)
                raise OutputError(
                    f"output folder {self.out} cannot be made: {atomic_files.explain_os_error(error)}"
                ) from error
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.weights.close(keep=False)
        finally:
            self._part.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reraise_if_interrupt(error)
            raise OutputError(
                f"output folder {self.out} cannot be written: {atomic_files.explain_os_error(error)}"
            ) from error

    def add_graph(self, graph: Graph, model: ir.Model) -> Fused:
        """Write a traced graph: its weights into the shared file, and a graph file with each runtime's bodies.

        If the CUDA provider has better kernels for the graph, a file for them is written too, and `model` is rewritten
        to that form.
        """
        with self._writing():
            _strip_traces(model)
            self.weights.externalize(model)
            self.weights.flush()
            proto = ir.to_proto(model)
            files = {}
            for runtime in RUNTIMES:
                write_bodies(proto, runtime)
                name = f"{graph.name}.{runtime}.onnx"
                onnx.save_model(_for_cpu(proto) if runtime == "onnxruntime" else proto, str(self.folder / name))
                files[runtime] = name
            fused = fuse(model)
            if fused.nodes:
                files[CUDA_RUNTIME] = f"{graph.name}.{CUDA_RUNTIME}.onnx"
                self._add_cuda_file(files[CUDA_RUNTIME], model, half=next(graph.parameters()).dtype == torch.float16)
            self.graphs[graph.name] = {
                "inputs": [_entry(tensor) for tensor in graph.inputs],
                "outputs": [_entry(tensor) for tensor in graph.outputs],
                "files": files,
            }
        return fused

    def _add_cuda_file(self, name: str, model: ir.Model, *, half: bool) -> None:
        self.weights.externalize(model)
        self.weights.flush()
        proto = ir.to_proto(model)
        write_bodies(proto, "onnxruntime-cuda" if half else "onnxruntime")
        onnx.save_model(proto, str(self.folder / name))

    def drop_cuda_file(self, graph: str) -> None:
        """Remove a graph's file for the CUDA provider, which then gets that of `onnxruntime`."""
        with self._writing():
            (self.folder / self.graphs[graph]["files"].pop(CUDA_RUNTIME)).unlink()

    def add_file(self, name: str, text: str) -> None:
        """Write another file of the bundle."""
        with self._writing():
            (self.folder / name).write_text(text, encoding="utf-8")

    def write_manifest(self, manifest: dict[str, Any]) -> Bundle:
        """Write bundle.json, which lists the files that are there now, and open the still hidden folder."""
        with self._writing():
            self.weights.flush()
            files = {
                path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
                for path in sorted(self.folder.iterdir())
                if path.name != MANIFEST
            }
            content = {"format": FORMAT, **manifest, "graphs": self.graphs, "files": files}
            with (self.folder / MANIFEST).open("w", encoding="utf-8") as stream:
                json.dump(content, stream, indent=1, allow_nan=False)
                stream.write("\n")
        return Bundle.open(self.folder, check_hashes=False)

    def finish(self) -> Bundle:
        """Flush the folder to the disk and rename it into place.

        Raises ExportError if there is no manifest, OutputError if writing fails.
        """
        if not (self.folder / MANIFEST).is_file():
            raise ExportError("the bundle has no manifest yet")
        with self._writing():
            self.weights.close()
            atomic_files.replace_into_place(self.folder, self.out, overwrite=False)
        return Bundle.open(self.out, check_hashes=False)


def _for_cpu(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy whose long sums are exact enough in ONNX Runtime's CPU kernels; other runtimes need no help."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    split_long_sums(copy)
    return copy


def _strip_traces(model: ir.Model) -> None:
    """Remove the exporter's notes on every node's Python source, which double the file and name local paths."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _entry(tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape)}
