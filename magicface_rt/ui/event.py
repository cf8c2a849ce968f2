"""What a field or button of the page sends: looked through, and handed on without its photographs.

The framework keeps what it is given for as long as an event lasts, and writes to the log what it does not understand.
So it is given what it must have, and the photographs go around it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..serve.bodies import Share
from ..serve.problems import refused
from ..serve.schemas import MOST_TEXT, SEED_LIMIT
from ..serve.structure import read_body

__all__ = ["Events", "Kind", "Parcel", "read_event"]

Kind = Literal["photographs", "text", "number"]

Events = Mapping[int, Sequence[Kind]]
"""By the number that an event has: what each of its fields holds. One at most holds photographs."""

_TAB = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Parcel:
    """The photographs of an event, as the page's script sends them, and what they have of the bytes that all bodies may
    have. That is given back when nobody has them any more.
    """

    def __init__(self, content: bytes, share: Share) -> None:
        self._content = content
        self.share = share
        share.lasts_as_long_as(self)

    def take(self) -> bytes:
        """The photographs; nothing the second time."""
        content, self._content = self._content, b""
        return content


def read_event(body: bytes, events: Events) -> tuple[bytes, bytes]:
    """An event as the framework gets it, and its photographs. May take as long as there is much of it: run it in a
    thread.

    A text that is longer than anything takes is cut to one character more than that: it is refused as well, and nobody
    holds the rest.

    Raises:
        AnswerError: 400, no JSON; 422, a key twice (which of two is seen here and which by the framework need not be
            the same), no event of this page, or another number or kind of fields than it has. To the framework an
            object in a field may be a file, wherever that says that it is.
    """
    event = read_body(body) if body else None
    if not isinstance(event, dict):
        raise refused(422, "body", "the body holds no event; expected an object with data, fn_index and session_hash.")
    number, tab, data = event.get("fn_index"), event.get("session_hash"), event.get("data")
    if type(number) is not int or number not in events:
        raise refused(422, "body", "fn_index: expected the number of an event of this page. Load it again.", "fn_index")
    if not isinstance(tab, str) or _TAB.fullmatch(tab) is None:
        raise refused(422, "body", "session_hash: expected 1 to 64 letters, digits, _ and -.", "session_hash")
    kinds = events[number]
    if not isinstance(data, list) or len(data) != len(kinds):
        found = f"{len(data)} fields" if isinstance(data, list) else "no list of fields"
        raise refused(422, "body", f"data has {found}, expected {len(kinds)}. Load the page again.", "data")
    photographs = b""
    for place, (kind, value) in enumerate(zip(kinds, data, strict=True)):
        if not _holds(kind, value):
            raise refused(
                422, "body", f"data: field {place + 1} of {len(kinds)} holds no {kind}. Load the page again.", "data"
            )
        if isinstance(value, str):
            data[place] = value[: MOST_TEXT + 1]
        if kind == "photographs":
            photographs, data[place] = (value or "").encode("utf-8", "surrogatepass"), ""
    known = {"data": data, "fn_index": number, "session_hash": tab}
    return json.dumps(known, ensure_ascii=True).encode("ascii"), photographs


def _holds(kind: Kind, value: Any) -> bool:
    if value is None:
        return True
    if kind == "number":
        return type(value) in (int, float) and abs(value) <= SEED_LIMIT  # NaN and infinities are not
    return isinstance(value, str)
