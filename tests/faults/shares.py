"""Of many inputs a share, for what takes too long to be done with each."""

from __future__ import annotations

import figures
from outcomes import digest_of


class Share:
    """Takes one of so many inputs, by their digests: the last of a run are taken as well as the first, and the same in
    every run. What was taken once is not taken again, and never much more than the share of those that came so far.

        if NETWORKS.takes(content):
            ...

    subject, what  of the figure that is told
    """

    def __init__(self, of: int, *, subject: str, what: str) -> None:
        self._of, self._subject, self._what = of, subject, what
        self._came: set[bytes] = set()
        self.taken = 0

    @property
    def came(self) -> int:
        """Different inputs that were asked about."""
        return len(self._came)

    def takes(self, one: object) -> bool:
        """Whether it is one of the share."""
        digest = digest_of(one)
        if digest in self._came:
            return False
        self._came.add(digest)
        chosen = int.from_bytes(digest[:8], "big") % self._of == 0 and self.taken < 5 + 2 * self.came // self._of
        self.taken += chosen
        figures.tell("shares", self._subject, f"{self._what} of {self.taken:,} of {self.came:,} that were accepted")
        return chosen
