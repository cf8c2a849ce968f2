"""Attacks guided by coverage (atheris, libFuzzer): an input that reaches a new branch of a parser is changed further.

    PYTHONPATH=tests:. python tests/faults/guided.py TARGET --inputs 10000 --out DIR [--bundle BUNDLE] [--seed 14]

TARGET: a name of `byte_targets.TARGETS`. Makes so many inputs, no two of them the same, and says what became of them;
of one that failed the traceback, and the input stays in DIR. Only what is written in Python is instrumented: of Pillow,
of safetensors' header and of the tokenizers library an input can show that they fail, and not where they branch.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from pathlib import Path
from types import FunctionType

import atheris
import tallies
from byte_targets import TARGETS
from corruptions import EXTREMES, ODD_BYTES
from outcomes import digest_of

INSTRUMENTED = ("magicface_rt", "benchmarks", "yaml", "tomllib", "json", "python_multipart", "zipfile")
LONGEST_WORD = 60
DRAWN = 20
"""Times as many may be drawn until enough of them are different."""


def instrument() -> None:
    """Every function of the parsers that is loaded. (Atheris' own hook sees no imports of an editable install.)"""
    for one in gc.get_objects():
        if isinstance(one, FunctionType) and (one.__module__ or "").partition(".")[0] in INSTRUMENTED:
            atheris.instrument_func(one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--inputs", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a folder that is there")
    parser.add_argument("--bundle", type=Path, default=Path(), help="a small one, of which some targets need parts")
    parser.add_argument("--seed", type=int, default=14)
    given = parser.parse_args()
    out = given.out.absolute()
    corpus, words, place = out / "corpus", out / "words", out / "place"
    corpus.mkdir()
    place.mkdir()
    target = TARGETS[given.target](place, given.bundle.absolute())
    (corpus / "sample").write_bytes(target.sample)
    entries = ("".join(f"\\x{byte:02x}" for byte in word[:LONGEST_WORD]) for word in (*ODD_BYTES, *EXTREMES))
    words.write_text("".join(f'"{entry}"\n' for entry in entries))
    target.use(target.sample)  # what is imported late is there now
    tallies.TALLY.clear()
    instrument()
    seen: set[bytes] = set()
    drawn = 0

    def attack(data: bytes) -> None:
        nonlocal drawn
        drawn += 1
        digest = digest_of(data)
        if digest not in seen:
            target.use(data)
            seen.add(digest)
        if len(seen) == given.inputs:  # libFuzzer would go on, and end the process with nothing of ours after
            print(f"{len(seen)} different inputs, of {drawn} that were drawn")
            print("\n".join(tallies.lines()), flush=True)
            os._exit(0)

    # Time and memory of an input are bounded by whoever judges it.
    options = [f"-runs={DRAWN * given.inputs}", f"-seed={given.seed}", f"-dict={words}"]
    options += [f"-artifact_prefix={out}/failed-", "-timeout=0", "-rss_limit_mb=0"]
    atheris.Setup([sys.argv[0], *options, f"-max_len={4 * len(target.sample) + 256}", str(corpus)], attack)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
