"""Checks what a field or button of the page sends, and passes it on without its photographs.

The framework keeps what it is given for as long as an event lasts, and logs what it does not understand. So it gets
only what it needs, and the photographs bypass it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..serve.bodies import Share
from ..serve.problems import refusal
from ..serve.schemas import MOST_TEXT, SEED_LIMIT
from ..serve.structure import read_body

__all__ = ["Kind", "PageEvents", "Parcel", "read_event", "tab_of"]

Kind = Literal["photographs", "text", "number"]

PageEvents = Mapping[int, Sequence[Kind]]
"""What each field of an event holds, by the event's number. At most one field holds photographs."""

_TAB = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Parcel:
    """The photographs of an event, as the page's script sends them, together with their share of the bytes that all
    bodies may have. The share is given back when the parcel is freed.
    """

    def __init__(self, content: bytes, share: Share) -> None:
        self._content = content
        self.share = share
        share.lasts_as_long_as(self)

    def take(self) -> bytes:
        """Return the photographs; nothing on a second call."""
        content, self._content = self._content, b""
        return content


def read_event(body: bytes, events: PageEvents) -> tuple[bytes, bytes]:
    """Split an event into what the framework gets and the photographs. This takes time in proportion to the event: run
    it in a thread.

    A text that is longer than anything here takes is cut to one character more than that: it will still be refused, and
    nobody holds the rest.

    Raises:
        AnswerError: 400, not JSON; 422, a key given twice (this function and the framework need not take the same one
            of the two), an event that this page does not have, or fields of another number or kind than the event has.
            An object in a field is refused because the framework could take it for a file, wherever the object says
            that the file is.
    """
    event = read_body(body) if body else None
    if not isinstance(event, dict):
        raise refusal(422, "body", "the body holds no event; expected an object with data, fn_index and session_hash.")
    number, tab, data = event.get("fn_index"), event.get("session_hash"), event.get("data")
    if type(number) is not int or number not in events:
        raise refusal(422, "body", "fn_index: expected the number of an event of this page. Load it again.", "fn_index")
    if not isinstance(tab, str) or _TAB.fullmatch(tab) is None:
        raise refusal(422, "body", "session_hash: expected 1 to 64 letters, digits, _ and -.", "session_hash")
    kinds = events[number]
    if not isinstance(data, list) or len(data) != len(kinds):
        found = f"{len(data)} fields" if isinstance(data, list) else "no list of fields"
        raise refusal(422, "body", f"data has {found}, expected {len(kinds)}. Load the page again.", "data")
    photographs = b""
    for place, (kind, value) in enumerate(zip(kinds, data, strict=True)):
        if not _holds(kind, value):
            raise refusal(
                422, "body", f"data: field {place + 1} of {len(kinds)} holds no {kind}. Load the page again.", "data"
            )
        if isinstance(value, str):
            data[place] = value[: MOST_TEXT + 1]
        if kind == "photographs":
            photographs, data[place] = (value or "").encode("utf-8", "surrogatepass"), ""
    known = {"data": data, "fn_index": number, "session_hash": tab}
    return json.dumps(known, ensure_ascii=True).encode("ascii"), photographs


def tab_of(event: bytes) -> str:
    """Return the tab that an event is from; the event comes from `read_event`."""
    return str(json.loads(event)["session_hash"])


def _holds(kind: Kind, value: Any) -> bool:
    if value is None:
        return True
    if kind == "number":
        return type(value) in (int, float) and abs(value) <= SEED_LIMIT  # NaN and infinities are not
    return isinstance(value, str)
