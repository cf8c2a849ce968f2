"""The exported bundle folder: its manifest, its contract, and the checks made before any of it is used.

The form of `bundle.json` is specified in docs/bundle-format.md.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .bundle_form import check_form
from .errors import BundleError, CheckpointError
from .files.plain_file import read_plain
from .files.stamps import Stamp
from .files.strict_json import read_json
from .process.interrupts import reraise_if_interrupt
from .schedule import Schedule
from .values.shown import shown

FORMAT = 1
MANIFEST = "bundle.json"
WEIGHTS = "weights.bin"
RUNTIMES = ("onnxruntime", "tensorrt")
"""The runtimes for which every graph has a file."""

CUDA_RUNTIME = "onnxruntime-cuda"
"""A graph may have a separate file for ONNX Runtime's CUDA provider, which otherwise uses that of `onnxruntime`."""

MAX_MANIFEST_BYTES = 1 << 20

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, CheckpointError)
"""The exceptions that reading JSON of an unexpected form may raise."""


@dataclass(frozen=True)
class Tensor:
    """One input or output of a graph. `shape`: integers, and symbols for sizes that may vary from call to call."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}[{', '.join(str(d) for d in self.shape)}]"


def reference_tensor_names(layer: int) -> tuple[str, str]:
    """Return the names of the tensors that hold the references' keys and values at an injection layer, by its index.

    They are outputs of `reference_kv` and inputs of `denoise_step`.
    """
    return f"k_ref_{layer}", f"v_ref_{layer}"


@dataclass(frozen=True)
class GraphContract:
    """Inputs and outputs of a graph, and its file for each runtime."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    files: Mapping[str, str]


@dataclass(frozen=True)
class Limits:
    """The most that a request may ask for. `kept_tokens`: the largest number of reference tokens, by factor."""

    concepts: int
    references: int
    images: int
    kept_tokens: Mapping[int, int]


@dataclass(frozen=True)
class InjectionLayer:
    """A self-attention that sees references; it works on a grid of latents side / `factor`."""

    index: int
    factor: int
    num_heads: int
    width: int


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. `hash` identifies its content: the SHA-256 of bundle.json, which holds every file's hash.

    `path` is absolute and without links, so it stays valid when the working directory changes or a link is switched.
    """

    path: Path
    hash: str
    architecture: str
    checkpoint_hash: str
    dtype: str
    height: int
    width: int
    vae_factor: int
    vae_scaling_factor: float
    latent_channels: int
    text_width: int
    injection_layers: tuple[InjectionLayer, ...]
    limits: Limits
    expected_mask_share: float
    schedule: Schedule
    tokenizer: Mapping[str, Any]
    graphs: Mapping[str, GraphContract]
    files: Mapping[str, Mapping[str, Any]]
    exporter: Mapping[str, str]
    parity: Mapping[str, Any] = field(repr=False)
    stamps: Mapping[str, Stamp] = field(default_factory=dict, repr=False, compare=False)

    @property
    def rows(self) -> int:
        """Height of the latents."""
        return self.height // self.vae_factor

    @property
    def columns(self) -> int:
        """Width of the latents."""
        return self.width // self.vae_factor

    @property
    def factors(self) -> tuple[int, ...]:
        """The factors of the injection layers' grids, finest grid first."""
        return tuple(sorted({layer.factor for layer in self.injection_layers}))

    def grid(self, factor: int) -> tuple[int, int]:
        """The numbers of rows and columns of the grid of latents side / `factor`."""
        return self.rows // factor, self.columns // factor

    def graph(self, name: str) -> GraphContract:
        """The contract of a graph.

        Raises:
            BundleError: the bundle does not hold that graph (one made from a U-Net alone holds two of the five).
        """
        if name not in self.graphs:
            raise BundleError(
                f"bundle {self.path}: there is no graph {name!r}, only {', '.join(sorted(self.graphs))}. "
                "Export a whole checkpoint to get all five."
            )
        return self.graphs[name]

    def check_unchanged(self) -> None:
        """Check that the files are still those that were opened. Takes microseconds, as nothing is read.

        Hashes are checked once, when the bundle is opened, but graphs are loaded by path, when they are needed. Links
        to a file and its permissions may change.

        Raises:
            BundleError: a file was replaced, written to or removed since.
        """
        for name, opened in self.stamps.items():
            try:
                found = Stamp.of(os.lstat(os.path.join(self.path, name)))
            except FileNotFoundError as error:
                raise BundleError(
                    f"bundle {self.path}: {name} was removed since the bundle was opened. Put it back, or copy the "
                    "bundle again and open it again."
                ) from error
            except OSError as error:
                reraise_if_interrupt(error)
                raise BundleError(f"bundle {self.path}: {name} cannot be read: {error}.") from error
            if found != opened:
                raise BundleError(
                    f"bundle {self.path}: {name} was replaced since the bundle was opened: {found}, "
                    f"expected {opened}. Open it again."
                )

    def check_not_modified(self) -> None:
        """Check that no file was written to in place, as loaded graphs compute with what they have mapped.

        Removing a file, or renaming another one over it, does not affect them. Takes microseconds.

        Raises:
            BundleError: a file was written to since it was opened, or cannot be examined.
        """
        message = self.modified_error()
        if message is not None:
            raise BundleError(message)

    def modified_error(self) -> str | None:
        """Return what `check_not_modified` would report of the first file that was written to; None if none was.

        Raises:
            BundleError: a file cannot be examined for now.
        """
        for name, opened in self.stamps.items():
            try:
                found = opened.was_modified(os.path.join(self.path, name))
            except OSError as error:
                reraise_if_interrupt(error)
                raise BundleError(f"bundle {self.path}: {name} cannot be looked at: {error}.") from error
            if found is not None:
                return (
                    f"bundle {self.path}: {name} was written to since the bundle was opened: {found}, expected "
                    f"{opened}. Open it again, and replace a bundle that is in use by renaming only."
                )
        return None

    @classmethod
    def open(
        cls, path: str | Path, *, check_hashes: bool = True, progress: Callable[[str], object] | None = None
    ) -> Bundle:
        """Read and check a bundle folder.

        Sizes are always compared with the manifest; `check_hashes` also reads every file once (about a second per
        gigabyte). `progress` is called with each file's name before it is read.

        Raises:
            BundleError: there is no bundle, it has another format version, or a file is missing, changed or a link.
        """
        folder = _where(path)
        raw = _read_manifest(folder)
        manifest = _parse(folder, raw)
        try:
            check_form(manifest)
            bundle = _from_manifest(folder, hashlib.sha256(raw).hexdigest(), manifest)
        except _MALFORMED as error:
            reason = f"{type(error).__name__}: {error}"[:500]
            raise BundleError(
                f"bundle {folder}: {MANIFEST} does not have the expected form ({reason}). Export the bundle again."
            ) from error
        stamps = {}
        for name, entry in bundle.files.items():
            if progress is not None:
                progress(name)
            stamps[name] = _check_file(folder, name, entry, check_hashes)
        return replace(bundle, stamps=stamps)


def _where(path: str | Path) -> Path:
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError) as error:
        reraise_if_interrupt(error)
        raise BundleError(f"bundle {shown(str(path))}: it cannot be looked for: {error}.") from error


def _read_manifest(folder: Path) -> bytes:
    manifest = folder / MANIFEST
    try:
        if not folder.is_dir():
            raise BundleError(
                f"bundle {folder}: no such folder. Make one with `magicface-rt export CHECKPOINT --out DIR`."
            )
        if not manifest.is_file():
            hint = " It looks like a checkpoint: export it first." if (folder / "model_index.json").is_file() else ""
            raise BundleError(f"bundle {folder}: there is no {MANIFEST}, so this is not a bundle.{hint}")
        return read_plain(manifest, MAX_MANIFEST_BYTES)
    except (OSError, ValueError) as error:
        reraise_if_interrupt(error)
        raise BundleError(f"bundle {folder}: {MANIFEST} cannot be read: {error}.") from error


def _parse(folder: Path, raw: bytes) -> dict[str, Any]:
    try:
        manifest = read_json(raw)
    except ValueError as error:
        raise BundleError(
            f"bundle {folder}: {MANIFEST} is not valid JSON ({error}). Export the bundle again."
        ) from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if type(found) is int and found > FORMAT:
        raise BundleError(
            f"bundle {folder}: format version {shown(found)}, expected at most {FORMAT}, which this release reads. "
            "Upgrade magicface_rt, or export the bundle again with this release."
        )
    if type(found) is not int or found != FORMAT:
        raise BundleError(
            f"bundle {folder}: format version {shown(found)}, expected {FORMAT}. Export the bundle again."
        )
    assert isinstance(manifest, dict)
    return manifest


def _from_manifest(folder: Path, digest: str, m: dict[str, Any]) -> Bundle:
    graphs = {
        name: GraphContract(
            name,
            tuple(_tensor(t) for t in g["inputs"]),
            tuple(_tensor(t) for t in g["outputs"]),
            _graph_files(g["files"]),
        )
        for name, g in m["graphs"].items()
    }
    files: dict[str, Mapping[str, Any]] = dict(m["files"])
    named = {f for g in graphs.values() for f in g.files.values()} | {WEIGHTS}
    if "file" in m["tokenizer"]:
        named.add(str(m["tokenizer"]["file"]))
    for name in [*files, *named]:
        if not _FILE_NAME.fullmatch(name):
            raise BundleError(
                f"bundle {folder}: {MANIFEST} names the file {shown(name)}; only plain file names are allowed."
            )
    missing = named - files.keys()
    if missing:
        raise BundleError(f"bundle {folder}: {MANIFEST} has no hash for {', '.join(sorted(missing)[:20])}.")
    limits = m["limits"]
    return Bundle(
        path=folder,
        hash=digest,
        architecture=str(m["architecture"]),
        checkpoint_hash=str(m["checkpoint_hash"]),
        dtype=str(m["dtype"]),
        height=int(m["height"]),
        width=int(m["width"]),
        vae_factor=int(m["vae_factor"]),
        vae_scaling_factor=float(m["vae_scaling_factor"]),
        latent_channels=int(m["latent_channels"]),
        text_width=int(m["text_width"]),
        injection_layers=tuple(
            InjectionLayer(int(x["index"]), int(x["factor"]), int(x["num_heads"]), int(x["width"]))
            for x in m["injection_layers"]
        ),
        limits=Limits(
            int(limits["concepts"]),
            int(limits["references"]),
            int(limits["images"]),
            {int(f): int(n) for f, n in limits["kept_tokens"].items()},
        ),
        expected_mask_share=float(m["expected_mask_share"]),
        schedule=Schedule.from_config(m["scheduler"]),
        tokenizer=m["tokenizer"],
        graphs=graphs,
        files=files,
        exporter=m["exporter"],
        parity=m["parity"],
    )


def _graph_files(entry: Mapping[str, Any]) -> dict[str, str]:
    files = {runtime: str(entry[runtime]) for runtime in RUNTIMES}
    if CUDA_RUNTIME in entry:
        files[CUDA_RUNTIME] = str(entry[CUDA_RUNTIME])
    return files


def _tensor(entry: dict[str, Any]) -> Tensor:
    return Tensor(str(entry["name"]), str(entry["dtype"]), tuple(entry["shape"]))


def _check_file(folder: Path, name: str, entry: Mapping[str, Any], check_hash: bool) -> Stamp:
    path = folder / name
    again = "Copy the bundle again, or export it again."
    try:
        found_there = os.lstat(path)
    except FileNotFoundError as error:
        raise BundleError(f"bundle {folder}: the file {name} is missing. {again}") from error
    except OSError as error:
        reraise_if_interrupt(error)
        raise BundleError(f"bundle {folder}: {name} cannot be read: {error}.") from error
    if stat.S_ISLNK(found_there.st_mode):
        raise BundleError(f"bundle {folder}: {name} is a symbolic link, expected a file of the bundle's own. {again}")
    if not stat.S_ISREG(found_there.st_mode):
        raise BundleError(f"bundle {folder}: {name} is not a file. {again}")
    if found_there.st_size != entry["bytes"]:
        raise BundleError(
            f"bundle {folder}: {name} has {found_there.st_size} bytes, expected {entry['bytes']}. {again}"
        )
    stamp = Stamp.of(found_there)  # taken before the file is read, so that a change meanwhile is noticed later
    if not check_hash:
        return stamp
    found = sha256(path)
    if found != entry["sha256"]:
        raise BundleError(
            f"bundle {folder}: {name} was changed: its SHA-256 is {found[:16]}..., "
            f"expected {str(entry['sha256'])[:16]}.... {again}"
        )
    return stamp


def sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces.

    Raises:
        BundleError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    except OSError as error:
        reraise_if_interrupt(error)
        raise BundleError(f"{path} cannot be read: {error}.") from error
    return digest.hexdigest()
