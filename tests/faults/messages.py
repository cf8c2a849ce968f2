"""Whether a message says what is wrong: what was found or expected, and not only that something is not as it should be.

A message passes by its form, which this package keeps to: "expected ...", "at most 5 ...", "x is missing", "is no PNG",
"cannot be read: ..." with a reason of some words. That "it has failed" or "is too large" is not enough.
"""

from __future__ import annotations

import re

_EXPECTED = (
    r"\bexpect(s|ed)\b\W+\w",
    r"\bat (most|least) (as many|\d)",
    r"\b(more|larger|longer|fewer|less) than (the |there is )?(memory|\d)",
    r"\bbeyond the range of \w",
    r"\bshould (be|have|match) \W?\w",
    r"\bonly [\w ]+ (is|are) (allowed|supported)\b",
    r"\bno other \w",
    r"\bits config says \W?\w",
    r"\b(would|will) be lost\b",
)
_FOUND = (
    r"\b(is|are) (missing|empty|damaged|cut short)\b",
    r": missing\b",
    r"\blacks? \W?\w",
    r"\b(is|are|has|have|there is|there are) (no|nothing) \w",
    r"\bholds? (no|a|an|NaN|infinity|numbers|\W?\d|') ?",
    r"\bno such \w",
    r"\bnot (a|an|the|in|one|valid|permitted|offered|known|base64|packed) ?\b",
    r"\bnot [A-Z]{2}",
    r"\bdoes not exist\b",
    r"\b(stands|given) (twice|\d+ times)\b",
    r"\bboth stand on \w",
    r"\bnested too deeply\b",
    r"\bchanged (after|since|while) \w",
    r"\banswered (with )?\d",
    r"\b(unknown|gives) \W?\w",
)
_REASON = (
    r"\b(cannot|could|do|does|is|are|not|no|makes|refused|failed)\b[^.:(]{0,200}"
    r"[:(] ?(?:[^.]|\.\w)*?\w{2,}[^\w.]+\w{2,}"
)
"""That it cannot be used, and after a colon or in brackets why, in two words at least."""

_SAYS = re.compile("|".join(f"(?:{form})" for form in (*_EXPECTED, *_FOUND, _REASON)), re.DOTALL)


def named_in(message: str, name: str) -> bool:
    """Whether a message holds a name, as it is or as Python shows it, which escapes what cannot be printed."""
    return any(shown in message for shown in _shown(name))


def says_what_is_wrong(message: str, name: str = "") -> bool:
    """Whether a message says what is wrong with what it names, and not the name alone."""
    for shown in _shown(name) if name else ():
        message = message.replace(shown, " ")
    return len(set(re.findall(r"[A-Za-z]{2,}", message))) >= 3 and _SAYS.search(message) is not None


def _shown(name: str) -> tuple[str, str]:
    return name, repr(name)[1:-1]
