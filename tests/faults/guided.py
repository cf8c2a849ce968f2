"""Attacks guided by coverage (atheris, libFuzzer): an input that reaches a new branch of a parser is changed further.

    PYTHONPATH=tests:. python tests/faults/guided.py FORMAT --inputs 10000 --out DIR [--seed 14]

FORMAT: a name of `single_files.FORMATS`. Says what became of the inputs; of one that failed the traceback, and the
input stays in DIR. Only what is written in Python is instrumented: of Pillow, of safetensors' header and of the
tokenizers library an input can show that they fail, and not where they branch.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path
from types import FunctionType

import atheris
import single_files
import tallies
from corruptions import EXTREMES, ODD_BYTES
from outcomes import judged

INSTRUMENTED = ("magicface_rt", "yaml", "tomllib", "json")
LONGEST_WORD = 60


def instrument() -> None:
    """Every function of the parsers that is loaded. (Atheris' own hook sees no imports of an editable install.)"""
    for one in gc.get_objects():
        if isinstance(one, FunctionType) and (one.__module__ or "").partition(".")[0] in INSTRUMENTED:
            atheris.instrument_func(one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("format", choices=sorted(single_files.BY_NAME))
    parser.add_argument("--inputs", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a folder that is there")
    parser.add_argument("--seed", type=int, default=14)
    given = parser.parse_args()
    one, out = single_files.BY_NAME[given.format], given.out.absolute()
    corpus, words, path = out / "corpus", out / "words", out / f"file.{one.suffix}"
    corpus.mkdir()
    (corpus / "sample").write_bytes(one.sample())
    entries = ("".join(f"\\x{byte:02x}" for byte in word[:LONGEST_WORD]) for word in (*ODD_BYTES, *EXTREMES))
    words.write_text("".join(f'"{entry}"\n' for entry in entries))
    path.write_bytes(one.sample())
    one.read(path)  # what is imported late is there now
    instrument()

    def attack(data: bytes) -> None:
        path.write_bytes(data)
        judged(one.name, lambda: one.read(path), names=path, memory=one.memory)
        if tallies.TALLY[one.name]["tried"] == given.inputs:  # libFuzzer ends the process, with nothing of ours after
            print("\n".join(tallies.lines()), flush=True)

    # Time and memory of an input are bounded by `judged`.
    options = [f"-runs={given.inputs}", f"-seed={given.seed}", f"-dict={words}", f"-artifact_prefix={out}/failed-"]
    options += ["-timeout=0", "-rss_limit_mb=0", f"-max_len={4 * len(one.sample()) + 256}"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], attack)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
