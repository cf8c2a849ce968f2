"""Bearer tokens on the server: who may use the service. Without tokens, everybody who can reach it may."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable, Mapping

from ..errors import AnswerError, OptionError
from ..files.plain_file import read_plain

__all__ = ["ENVIRONMENT", "Tokens"]

ENVIRONMENT = "MAGICFACE_RT_TOKENS"
LEAST_LENGTH, MOST_LENGTH = 16, 512
MOST_BYTES = 1 << 20
"""The largest file of tokens that is read."""


class Tokens:
    """The tokens that the service accepts. Only their SHA-256 is held, and no message, log or `repr` shows a token.

    Raises OptionError for a token that is too short, too long or not printable ASCII.
    """

    def __init__(self, tokens: Iterable[str] = (), *, source: str = "tokens") -> None:
        digests = []
        for number, token in enumerate(tokens, 1):
            fits = LEAST_LENGTH <= len(token) <= MOST_LENGTH
            if not fits or not token.isascii() or not token.isprintable() or " " in token:
                raise OptionError(
                    f"{source}: token {number} has {len(token)} characters; expected {LEAST_LENGTH} to {MOST_LENGTH}, "
                    "printable ASCII without blanks. `openssl rand -hex 32` makes one."
                )
            digests.append(hashlib.sha256(token.encode("ascii")).digest())
        self._digests = tuple(digests)

    @classmethod
    def read(cls, path: str | os.PathLike[str] | None, environ: Mapping[str, str] | None = None) -> Tokens:
        """Read one token a line from a file or, without a path, from the variable MAGICFACE_RT_TOKENS. Lines that start
        with # are comments. With neither there are no tokens.

        Raises:
            OptionError: the file cannot be read, or it holds no token, or one that cannot be used.
        """
        if path is None:
            text = (os.environ if environ is None else environ).get(ENVIRONMENT)
            if text is None:
                return cls()
            source = f"the variable {ENVIRONMENT}"
        else:
            source = f"the file of tokens {os.fspath(path)!r}"
            try:
                text = read_plain(path, MOST_BYTES).decode("utf-8")
            except (OSError, ValueError) as error:
                raise OptionError(f"{source} cannot be read: {error}.") from error
        lines = [line.strip() for line in text.splitlines()]
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise OptionError(f"{source} holds no token; with none the service would be open. Give one a line.")
        return cls(found, source=source)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def __repr__(self) -> str:
        return f"Tokens({len(self._digests)})"

    def owner(self, authorization: str | None, client: str) -> str:
        """Return whose request it is, for the fair order: a digest of its token, or the client's address if there are
        no tokens.

        Raises:
            AnswerError: 401, the token is missing or wrong.
        """
        if not self._digests:
            return client
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise _refusal("there is no token; expected the header `Authorization: Bearer TOKEN`.")
        digest = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).digest()
        # Compare every token, each in constant time, so the time taken reveals nothing about any of them.
        if not sum(hmac.compare_digest(digest, known) for known in self._digests):
            raise _refusal("the token is not one of this service's.")
        return digest.hex()[:16]


def _refusal(detail: str) -> AnswerError:
    return AnswerError(detail, status=401, kind="unauthorized", field="Authorization")
