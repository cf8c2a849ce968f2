"""The names that photographs and masks have in the calls that the page shows. page.js has the same rules: it sends each
photograph under its name here, which stays as it is, and saves a mask under the name that the calls give it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import count
from unicodedata import category

__all__ = ["PICTURE", "file_names"]

PICTURE = "out.png"
"""The file that the calls write."""

_MOST_BYTES = 200
"""Of a photograph's name that is kept: with a number and the ending of a mask, a file system still takes it."""
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_NOT_SAVED = re.compile(r'["*:<>?|~]+')
"""Characters that a file may have in its name, but that browsers replace in the name of a file that they save."""
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Categories of characters that end a line, show nothing, or turn the order of what is shown around them."""


def file_names(photographs: Iterable[tuple[int, str]]) -> list[tuple[str, str]]:
    """Return the names of each concept's photograph and mask, from the concept's number and the photograph's own name.

    A photograph keeps its name if that is one, else it gets one of plain letters. All names differ, even where case
    makes no difference, and none is that of the picture.
    """
    taken = {PICTURE}
    found = []
    for slot, name in photographs:
        stem, ending = _stem_and_ending(name, slot)
        pairs = ((f"{one}{ending}", f"{_saved(one, slot)}-mask.png") for one in _numbered(stem, slot))
        pair = next(pair for pair in pairs if taken.isdisjoint(name.lower() for name in pair))
        taken.update(name.lower() for name in pair)
        found.append(pair)
    return found


def _stem_and_ending(name: str, slot: int) -> tuple[str, str]:
    """Split a name before its last dot; one that cannot be kept is made plain."""
    stem, dot, suffix = name.rpartition(".") if "." in name else (name, "", "")
    if _can_be_kept(name):
        return stem, f"{dot}{suffix}"
    stem = _UNSAFE.sub("-", stem)[:100].strip("-.") or f"photograph-{slot}"
    return stem, f".{_UNSAFE.sub('', suffix)[:10].lower() or 'png'}"


def _can_be_kept(name: str) -> bool:
    """Whether it names a file in the folder where the calls are run, shows what it is, and is no option."""
    if not name or name[0] in "-." or name != name.strip():
        return False
    if any(character in "/\\" or category(character) in _UNSEEN for character in name):
        return False
    return len(name.encode("utf-8")) <= _MOST_BYTES


def _saved(stem: str, slot: int) -> str:
    """Return a mask's stem as browsers save it."""
    if _NOT_SAVED.search(stem) is None:
        return stem
    return _NOT_SAVED.sub("-", stem).strip("-. ") or f"photograph-{slot}"


def _numbered(stem: str, slot: int) -> Iterator[str]:
    """Yield the stem, then the stem with the concept's number, then with further numbers."""
    yield stem
    yield f"{stem}-{slot}"
    for number in count(2):
        yield f"{stem}-{slot}-{number}"
