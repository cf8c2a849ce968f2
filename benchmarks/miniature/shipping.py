"""The miniature's weights as they are shipped: a diffusers folder in files under 16 MB, with a list of their hashes.

    python -m benchmarks.miniature.shipping ship CHECKPOINT --out benchmarks/miniature/weights [--segmenter FILE]
    python -m benchmarks.miniature.shipping verify [FOLDER]

    open_shipped()             # the folder, after every file has been compared with the list

Large weight files become shards as diffusers knows them, so the folder is a checkpoint as it is: `Checkpoint`,
diffusers and `magicface-rt export` open it. `SHA256SUMS` can be checked with `sha256sum -c` as well.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from magicface_rt.errors import CheckpointError, MagicFaceError, OutputError
from magicface_rt.process.host_memory import as_host_memory_error
from magicface_rt.process.interrupts import reraise_if_interrupt

WEIGHTS = Path(__file__).parent / "weights"
SUMS = "SHA256SUMS"
SEGMENTER = "segmenter.safetensors"
MAX_BYTES = 16_000_000
_SHARD_BYTES = 15_000_000  # of tensors; the rest is for the header
_LINE = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9][A-Za-z0-9._/-]*)")


def ship(checkpoint: Path, out: Path, segmenter: Path | None = None) -> Path:
    """Write the folder, which appears whole or not at all, and return it.

    Raises:
        CheckpointError: a weight file cannot be read, or holds a tensor that is too large for one file.
        OutputError: `out` exists or cannot be written.
    """
    if not (checkpoint / "model_index.json").is_file():
        raise CheckpointError(f"checkpoint {checkpoint}: there is no model_index.json; expected a diffusers folder.")
    if out.exists():
        raise OutputError(f"output folder {out} exists. Remove it, or choose another.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as made:
            part = Path(made) / out.name
            for file in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
                place = part / file.relative_to(checkpoint)
                place.parent.mkdir(parents=True, exist_ok=True)
                if file.suffix == ".safetensors" and file.stat().st_size >= MAX_BYTES:
                    _split(file, place)
                else:
                    shutil.copyfile(file, place)
            if segmenter is not None:
                shutil.copyfile(segmenter, part / SEGMENTER)
            names = _names(part)
            for name in names:
                (part / name).chmod(0o644)
                if (size := (part / name).stat().st_size) >= MAX_BYTES:
                    raise CheckpointError(f"{checkpoint / name}: {size} bytes, expected less than {MAX_BYTES}.")
            sums = "".join(f"{_sha256(part / name)}  {name}\n" for name in names)
            (part / SUMS).write_text(sums, encoding="utf-8")
            os.replace(part, out)
    except OSError as error:
        reraise_if_interrupt(error)
        raise OutputError(f"output folder {out} cannot be written: {error}.") from error
    verify(out)
    return out


def verify(folder: Path) -> list[str]:
    """Compare every file with the list; return the files' names.

    Raises CheckpointError, naming the file, for one that is missing, changed, or not in the list.
    """
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reraise_if_interrupt(error)
        raise CheckpointError(
            f"shipped weights {folder}: {SUMS} cannot be read ({error}); expected a folder that "
            "`python -m benchmarks.miniature.shipping ship` wrote."
        ) from error
    expected: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        found = _LINE.fullmatch(line)
        if not found or ".." in found[2].split("/"):
            raise CheckpointError(f"shipped weights {folder}: line {number} of {SUMS} is no hash and name: {line!r}.")
        expected[found[2]] = found[1]
    there = _names(folder)
    if extra := sorted(set(there) - set(expected)):
        raise CheckpointError(f"shipped weights {folder}: {extra[0]} is not in {SUMS}. Remove it, or ship anew.")
    for name, digest in expected.items():
        if name not in there:
            raise CheckpointError(f"shipped weights {folder}: {name} is missing. Check the files out again.")
        if (actual := _sha256(folder / name)) != digest:
            raise CheckpointError(
                f"shipped weights {folder}: {name} has the SHA-256 {actual}, expected {digest}. "
                "It was changed or cut short; check the files out again."
            )
    return sorted(expected)


def open_shipped(folder: Path = WEIGHTS) -> Path:
    """Verify that every file is what was shipped, and return the folder, which is a diffusers checkpoint.

    Raises CheckpointError as `verify`.
    """
    verify(folder)
    return folder


def _split(file: Path, place: Path) -> None:
    """Write a weight file as shards of whole tensors beside `place`, with diffusers' index of them."""
    pieces: list[dict[str, Tensor]] = [{}]
    used = total = 0
    try:
        with as_host_memory_error(), safe_open(file, framework="pt") as stored:
            for name in sorted(stored.keys()):
                tensor = stored.get_tensor(name)
                if pieces[-1] and used + tensor.nbytes > _SHARD_BYTES:
                    pieces.append({})
                    used = 0
                pieces[-1][name] = tensor
                used += tensor.nbytes
                total += tensor.nbytes
    except (SafetensorError, OSError) as error:
        reraise_if_interrupt(error)
        raise CheckpointError(f"weights {file}: they cannot be read: {error}.") from error
    where: dict[str, str] = {}
    for number, piece in enumerate(pieces, 1):
        shard = f"{place.stem}-{number:05d}-of-{len(pieces):05d}.safetensors"
        save_file(piece, place.with_name(shard), metadata={"format": "pt"})
        where.update(dict.fromkeys(piece, shard))
    index = {"metadata": {"total_size": total}, "weight_map": where}
    place.with_name(f"{place.name}.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _names(folder: Path) -> list[str]:
    """The relative names of all files except the list and the README, sorted."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name not in (SUMS, "README.md"))


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.miniature.shipping", description=str(__doc__).splitlines()[0]
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    writing = verbs.add_parser("ship", help="write the folder")
    writing.add_argument("checkpoint", type=Path)
    writing.add_argument("--out", type=Path, default=WEIGHTS)
    writing.add_argument("--segmenter", type=Path, metavar="FILE")
    checking = verbs.add_parser("verify", help="compare every file with the list")
    checking.add_argument("folder", type=Path, nargs="?", default=WEIGHTS)
    a = parser.parse_args(argv)
    try:
        folder = ship(a.checkpoint, a.out, a.segmenter) if a.verb == "ship" else open_shipped(a.folder)
        names = verify(folder)
    except MagicFaceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{folder}: {len(names)} files, {sum((folder / name).stat().st_size for name in names) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
