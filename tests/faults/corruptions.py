"""What is done to a file or its content. Every format meets all of it, so it stands in one place."""

from __future__ import annotations

import copy
import json
import os
import random
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

TEBIBYTE = 1 << 40

# ------------------------------------------------------------------------------------------------------------- bytes

ODD_BYTES = (
    b"\x00",
    b"\xff\xfe",
    b"\xed\xa0\x80",  # a lone surrogate
    b"[" * 3000,
    b'{"a":' * 3000,
    b"9" * 5000,
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"-1",
    b"null",
    b"../../../etc/passwd",
    b"\r\n\r\n",
    b"\\ud800",
    b"%s%n",
)
EXTREMES = tuple(
    value.to_bytes(8, order)
    for value in (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
    for order in ("little", "big")
)

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "nothing at all": lambda d: b"",
    "one byte": lambda d: d[:1],
    "half": lambda d: d[: len(d) // 2],
    "all but one byte": lambda d: d[:-1],
    "one byte more": lambda d: d + b"\x00",
    "a megabyte more": lambda d: d + bytes(1 << 20),
    "twice": lambda d: d + d,
    "without its first byte": lambda d: d[1:],
    "zeros": lambda d: bytes(len(d)),
    "ones": lambda d: b"\xff" * len(d),
    "its halves changed places": lambda d: d[len(d) // 2 :] + d[: len(d) // 2],
    "backwards": lambda d: d[::-1],
    "a length of 2^64 - 1 in front": lambda d: b"\xff" * 8 + d[8:],
    "a length of 2^40 in front": lambda d: TEBIBYTE.to_bytes(8, "little") + d[8:],
    "a pickle in front": lambda d: b"\x80\x04\x95" + d,
    "a zip's mark in front": lambda d: b"PK\x03\x04" + d,
    "a byte order mark in front": lambda d: b"\xef\xbb\xbf" + d,
    "UTF-16": lambda d: d.decode("latin-1").encode("utf-16"),
    "deep lists": lambda d: b"[" * 200_000,
    "deep objects": lambda d: b'{"a":' * 200_000,
    "deep and closed": lambda d: b"[" * 100_000 + b"]" * 100_000,
    "a number of many digits": lambda d: b"9" * 200_000,
    "a text without end": lambda d: b'"' + b"a" * 200_000,
}


def cuts(data: bytes, *, most: int = 200) -> list[int]:
    """Where to cut it: everywhere near its ends, and at places between."""
    near = {*range(min(len(data), 70)), *range(max(0, len(data) - 20), len(data))}
    return sorted(near | set(range(0, len(data), max(1, len(data) // most))))


def flips(data: bytes, *, most: int = 200) -> Iterator[bytes]:
    """The data with a bit flipped, at places all over it."""
    for position in range(0, len(data), max(1, len(data) // most)):
        yield data[:position] + bytes([data[position] ^ (1 << position % 8)]) + data[position + 1 :]


_EDITS = ("flip", "set", "cut", "drop", "repeat", "insert", "extreme", "odd", "turn")
edits = st.lists(
    st.tuples(st.sampled_from(_EDITS), st.floats(0, 1), st.integers(0, 2**32 - 1)),
    min_size=1,
    max_size=4,
)
"""What `edited` does, as hypothesis can make it smaller."""


def edits_of(data: bytes) -> st.SearchStrategy[bytes]:
    """The data after some edits."""
    return edits.map(lambda changes: edited(data, changes))


def edited(data: bytes, changes: list[tuple[str, float, int]]) -> bytes:
    """The data after some edits: (which, where as a part of the whole, a number that says how)."""
    for kind, where, how in changes:
        at = int(where * len(data))
        if kind == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ (1 << how % 8)]) + data[at + 1 :]
        elif kind == "set" and at < len(data):
            data = data[:at] + bytes([how % 256]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "drop":
            data = data[:at] + data[at + how % 64 + 1 :]
        elif kind == "repeat":
            data = data[:at] + data[at : at + how % 64] * (2 + how % 5) + data[at + how % 64 :]
        elif kind == "insert":
            data = data[:at] + random.Random(how).randbytes(1 + how % 16) + data[at:]
        elif kind == "extreme":
            data = data[:at] + EXTREMES[how % len(EXTREMES)] + data[at + 8 :]
        elif kind == "odd":
            data = data[:at] + ODD_BYTES[how % len(ODD_BYTES)] + data[at + how % 3 :]
        elif kind == "turn":
            data = data[at:] + data[:at]
    return data


# -------------------------------------------------------------------------------------------------------------- JSON

_DEEP = {50: "@50@", 900: "@900@", 5000: "@5000@"}
odd_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([0, 1, -1, 2**31, 2**63, 2**64, 10**18, 10**400, -(10**400), 0.5, 1e308])
    | st.sampled_from(["", "0", "..", "../x", "/etc/passwd", "a\0b", "\ud800", "x" * 5000, *_DEEP.values()])
    | st.sampled_from([[], {}, [[]], {"a": {}}]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
"""What JSON can hold and no file of ours would."""


def places(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where there is a value, at any depth."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, entry in entries:
        yield (*at, key)
        yield from places(entry, (*at, key))


def inner(tree: Any, at: tuple[Any, ...]) -> Any:
    """The list or object that holds a place."""
    for key in at[:-1]:
        tree = tree[key]
    return tree


def changed_tree(draw: st.DrawFn, tree: Any, where: list[tuple[Any, ...]] | None = None) -> Any:
    """The tree with one or two of its values replaced, taken out or put elsewhere. `where`: places to choose from."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 2))):
        known = set(places(tree))
        open_places = [place for place in where or sorted(known, key=str) if place in known]
        if not open_places:
            break
        at = draw(st.sampled_from(open_places))
        holder, what = inner(tree, at), draw(st.sampled_from(["set", "set", "set", "remove", "move", "repeat"]))
        if what == "set":
            holder[at[-1]] = copy.deepcopy(draw(odd_values))  # some are shared between draws
        elif what == "remove":
            del holder[at[-1]]
        elif what == "move":
            other = draw(st.sampled_from(sorted(known, key=str)))
            if other[: len(at)] != at:  # not into itself
                inner(tree, other)[other[-1]] = copy.deepcopy(holder[at[-1]])
        elif isinstance(holder, list):
            holder.extend([copy.deepcopy(holder[at[-1]])] * 3)
        else:
            holder["more"] = copy.deepcopy(holder[at[-1]])
    return tree


@st.composite
def trees_of(draw: st.DrawFn, tree: Any, where: list[tuple[Any, ...]] | None = None) -> Any:
    """Trees that `changed_tree` makes of one."""
    return changed_tree(draw, tree, where)


def texts_of(tree: Any, where: list[tuple[Any, ...]] | None = None) -> st.SearchStrategy[bytes]:
    """JSON of the trees that `changed_tree` makes of one."""
    return trees_of(tree, where).map(as_bytes)


def as_json(tree: Any) -> str:
    """JSON text, in which the marks of `odd_values` became lists of that depth."""
    text = json.dumps(tree)
    for depth, mark in _DEEP.items():
        text = text.replace(json.dumps(mark), "[" * depth + "]" * depth)
    return text


def as_bytes(tree: Any) -> bytes:
    """`as_json`, with surrogates as no UTF-8 has them."""
    return as_json(tree).encode("utf-8", "surrogatepass")


def with_key_twice(text: str, key: str, value: str = "null") -> str:
    """JSON text in which a key stands twice, first with another value."""
    found = f'"{key}":'
    assert found in text, key
    return text.replace(found, f"{found} {value}, {found}", 1)


# ------------------------------------------------------------------------------------------------------- safetensors


def unpacked(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and tensors of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def packed(header: Any, body: bytes = b"") -> bytes:
    """A safetensors file. `header`: JSON text, or what becomes such."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + body


# -------------------------------------------------------------------------------------------------------------- bombs


def png_of(width: int, height: int, data: bytes = b"", *, more: bytes = b"") -> bytes:
    """A PNG that claims to have so many pixels, whatever its data are."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b""))
    first, *rest = (
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + first + more + b"".join(rest)


# ------------------------------------------------------------------------------------------------------ file systems


def _link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _link_to_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def _link_to_zeros(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _socket(path: Path) -> None:
    path.unlink()
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's address has room for few characters
    try:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(path.name)
    finally:
        os.chdir(here)


def _a_tebibyte(path: Path) -> None:
    os.truncate(path, 0)
    os.truncate(path, TEBIBYTE)


def _a_tebibyte_after(path: Path) -> None:
    os.truncate(path, TEBIBYTE)


PLACES: dict[str, Callable[[Path], None]] = {
    "nothing": lambda path: path.unlink(),
    "a link to itself": _link_to_itself,
    "a link to nowhere": _link_to_nowhere,
    "a link to endless zeros": _link_to_zeros,
    "a pipe": _pipe,
    "a folder": _folder,
    "a socket": _socket,
    "a tebibyte of nothing": _a_tebibyte,
    "itself and a tebibyte of nothing": _a_tebibyte_after,
}
"""What may stand where a file should, none of which is the file."""

NAMES = (
    os.fsdecode(b"caf\xe9"),  # no UTF-8
    os.fsdecode(b"\xff\xfe\xed\xa0\x80"),
    "a\nb",
    "--help",
    " ",
    "'quoted\" \\",
    "\u202eright to left",
    "%s {0} $HOME",
    "\u00e9" * 120,
)
"""What a file may be called."""

NO_NAMES = ("x" * 300, "x/" * 3000 + "x", "a\0b", "\ud800")
"""What no file can be called."""
