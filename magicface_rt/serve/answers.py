"""Client side: reads answers within limits, since what answers need not be the service."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import httpx

from ..errors import AnswerError

__all__ = ["ANSWER_BYTES", "PACKED", "Answer", "Body", "Lines"]

ANSWER_BYTES = 512 * 2**20
"""The most bytes of an answer that a client reads, unless told otherwise. The largest answer of a service with default
limits is four pictures of 4096 x 4096 pixels, the largest that a bundle may have, with the regions after each of 150
steps: less than 400,000,000 bytes.
"""

BYTES_A_VALUE = 12
"""An answer may hold one JSON value for every so many bytes of its limit. A value takes up to six times that in memory;
in the largest answer a tenth of the bytes are values.
"""

PACKED = "gzip"
"""The one compression that a client accepts. The service compresses no answer; a proxy in front of it may."""

_PIECE = 2**20


@dataclass(frozen=True)
class Answer:
    """An answer that has been read completely. `content`: its body, unpacked."""

    response: httpx.Response
    content: bytearray

    @property
    def status(self) -> int:
        return self.response.status_code


class Body:
    """Unpacks the body of an answer as it arrives.

    most  the most bytes that the unpacked body may have
    """

    def __init__(self, response: httpx.Response, most: int) -> None:
        self._response = response
        self._most = most
        self._bytes = self._values = 0
        packed = response.headers.get("content-encoding", "identity").strip().lower()
        if packed not in (PACKED, "identity", ""):
            raise self._error(f"is packed as {packed[:100]!r}, expected {PACKED} or nothing")
        self._unpacking = zlib.decompressobj(zlib.MAX_WBITS | 16) if packed == PACKED else None

    def unpacked(self, raw: bytes) -> Iterator[bytes]:
        """Yield what these bytes from the connection unpack to, in pieces of at most 1 MiB where they are packed.

        Raises:
            AnswerError: the bytes are not packed as the answer says, or the answer has more bytes or values than it may
                have.
        """
        unpacking = self._unpacking
        if unpacking is None:
            yield self._counted(raw)
            return
        while raw and not unpacking.eof:
            try:
                piece = unpacking.decompress(raw, _PIECE)
            except zlib.error as error:
                raise self._error(f"is not packed as it says ({error})") from error
            raw = unpacking.unconsumed_tail
            yield self._counted(piece)

    def end(self) -> None:
        """Raise AnswerError if the packed data ends too early."""
        if self._unpacking is not None and self._bytes and not self._unpacking.eof:
            raise self._error("is not packed as it says (its end is missing)")

    def _counted(self, piece: bytes) -> bytes:
        self._bytes += len(piece)
        self._values += len(piece) - len(piece.translate(None, b",[{"))
        most_values = self._most // BYTES_A_VALUE
        if self._bytes > self._most or self._values > most_values:
            raise AnswerError(
                f"the answer of {self._response.url} has more than {self._most:,} bytes, or {most_values:,} values. If "
                "the service gives such large ones, allow the client more answer_bytes; else look at what is between.",
                status=self._response.status_code,
                kind="answer-too-large",
            )
        return piece

    def _error(self, what: str) -> AnswerError:
        return AnswerError(
            f"the answer of {self._response.url} {what}. Look at what is between, such as a proxy.",
            status=self._response.status_code,
            kind="no-answer",
        )


class Lines:
    """Splits text that arrives in pieces into lines. A last line without a line end is never given."""

    def __init__(self) -> None:
        self._begun = bytearray()

    def of(self, piece: bytes) -> Iterator[str]:
        """Yield the lines that end in this piece, without their line ends."""
        *whole, rest = piece.split(b"\n")
        for line in whole:
            self._begun += line
            text = self._begun.removesuffix(b"\r").decode("utf-8", "replace")
            self._begun.clear()
            yield text
        self._begun += rest
