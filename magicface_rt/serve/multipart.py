"""Reads multipart/form-data in memory, on the server. (Starlette's form parser writes larger files to disk, which must
not happen.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from .problems import refusal

__all__ = ["Form", "read_form"]

MOST_PARTS = 64
MOST_HEADER_BYTES = 4096
"""The most bytes that all headers of one part may have together."""

_AS_IT_IS = ("binary", "8bit", "7bit", "")
_UTF_8 = ("utf-8", "utf8", "us-ascii", "")


@dataclass(frozen=True)
class Form:
    """The parts of a form by name, each name's in their order."""

    parts: dict[str, list[bytes]]

    def files(self, name: str) -> list[bytes]:
        """Return the bytes of every part with this name."""
        return self.parts.get(name, [])

    def texts(self, name: str) -> list[str]:
        """Return the text of every part with this name.

        Raises:
            AnswerError: 422, a part is not UTF-8.
        """
        try:
            return [part.decode("utf-8") for part in self.parts.get(name, [])]
        except UnicodeDecodeError as error:
            raise refusal(422, "form", f"the part {name!r} is no UTF-8 text.", name) from error

    def text(self, name: str) -> str | None:
        """Return the text of the one part with this name, or None if there is none.

        Raises:
            AnswerError: 422, there are several such parts, or it is not UTF-8.
        """
        found = self.texts(name)
        if len(found) > 1:
            raise refusal(422, "form", f"the part {name!r} stands {len(found)} times, expected once.", name)
        return found[0] if found else None


def read_form(content_type: str | None, body: bytes, known: Sequence[str]) -> Form:
    """Parse a body into its parts.

    Raises:
        AnswerError: 415, another Content-Type; 400, a body that is cut short or malformed; 422, a part that is unknown,
            a part in an encoding that is not decoded here, or too many parts.
    """
    kind, options = parse_options_header(content_type or "")
    boundary = options.get(b"boundary")
    if kind.lower() != b"multipart/form-data" or not boundary:
        raise refusal(
            415, "content-type", "expected Content-Type: multipart/form-data with a boundary.", "Content-Type"
        )
    reader = _Reader()
    if not body.startswith(b"--" + boundary):  # text before the first part is ignored (RFC 2046)
        body = body[max(0, body.find(b"\r\n--" + boundary)) :]
    try:
        parser = MultipartParser(boundary, reader.callbacks())  # type: ignore[arg-type]  # a TypedDict of callables
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise refusal(400, "form", f"the multipart body is malformed: {ascii(str(error))[:200]}.") from error
    if not reader.ended:
        raise refusal(400, "form", "the multipart body is cut short: its closing boundary is missing.")
    parts: dict[str, list[bytes]] = {}
    for name, data in reader.parts:
        if name not in known:
            raise refusal(422, "form", f"the part {name[:80]!a} is not known; there are {', '.join(known)}.", name)
        parts.setdefault(name, []).append(data)
    return Form(parts)


class _Reader:
    """Collects what the parser finds."""

    def __init__(self) -> None:
        self.parts: list[tuple[str, bytes]] = []
        self.ended = False
        self._field = self._value = b""
        self._name = self._encoding = self._charset = ""
        self._header_bytes = 0
        self._data = bytearray()

    def callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._part_data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._name, self._header_bytes, self._data = "", 0, bytearray()
        self._encoding = self._charset = ""
        if len(self.parts) >= MOST_PARTS:
            raise refusal(422, "form", f"the multipart body has more than {MOST_PARTS} parts.")

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._field += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._field.lower() == b"content-disposition":
            _, options = parse_options_header(self._value)
            self._name = options.get(b"name", b"").decode("utf-8", "replace")
        elif self._field.lower() == b"content-transfer-encoding":
            self._encoding = self._value.strip().lower().decode("latin-1")
        elif self._field.lower() == b"content-type":
            _, options = parse_options_header(self._value)
            self._charset = options.get(b"charset", b"").strip().lower().decode("latin-1")
        self._field = self._value = b""

    def _headers_finished(self) -> None:
        if not self._name:
            raise refusal(
                400, "form", "a part of the multipart body has no name; expected one in its Content-Disposition."
            )
        for what, found, fine in (
            ("Content-Transfer-Encoding", self._encoding, _AS_IT_IS),
            ("charset", self._charset, _UTF_8),
        ):
            if found not in fine:
                name = self._name[:80]
                raise refusal(
                    422, "form", f"the part {name!a} has the {what} {found[:80]!a}; expected {fine[0]}, or none.", name
                )

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        self._data += data[start:end]

    def _part_end(self) -> None:
        self.parts.append((self._name, bytes(self._data)))

    def _end(self) -> None:
        self.ended = True

    def _count(self, more: int) -> None:
        self._header_bytes += more
        if self._header_bytes > MOST_HEADER_BYTES:
            raise refusal(
                400, "form", f"a part of the multipart body has headers of more than {MOST_HEADER_BYTES} bytes."
            )
