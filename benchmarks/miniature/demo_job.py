"""Write one of the fixed requests as a job with its pictures and masks, as `magicface-rt run --job` reads them.

python -m benchmarks.miniature.demo_job NUMBER --out demo/portrait
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from magicface_rt.errors import MagicFaceError, OptionError, OutputError
from magicface_rt.process.interrupts import reraise_if_interrupt

from .quality import GUIDANCE, STEPS
from .requests import COUNT, Case, draw_cases
from .variants import WEIGHT


def write_job(case: Case, folder: Path, *, name: str = "job.json") -> Path:
    """Write the job, with its pictures in image/ and mask/ beside it, named by part; return the job's file.

    Raises:
        OutputError: something cannot be written.
    """
    concepts = []
    try:
        for kind in ("image", "mask"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        for k, (part, word) in enumerate(zip(case.parts, case.words, strict=True)):
            image, mask, prompt = case.reference(k)
            Image.fromarray(image).save(folder / "image" / f"{part}.png", optimize=True)
            Image.fromarray(mask * np.uint8(255)).save(folder / "mask" / f"{part}.png", optimize=True)
            concepts.append(
                {
                    "name": part,
                    "word": word,
                    "image": f"image/{part}.png",
                    "mask": f"mask/{part}.png",
                    "prompt": prompt,
                    "weight": WEIGHT,
                }
            )
        job = {
            "prompt": case.caption,
            "seed": case.number,
            "steps": STEPS,
            "guidance_scale": GUIDANCE,
            "concepts": concepts,
        }
        (folder / name).write_text(json.dumps(job, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        reraise_if_interrupt(error)
        raise OutputError(f"job {folder / name} cannot be written: {error}.") from error
    return folder / name


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.miniature.demo_job", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("number", type=int, help=f"of the request, 0 to {COUNT - 1}")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    a = parser.parse_args(argv)
    try:
        if not 0 <= a.number < COUNT:
            raise OptionError(f"the number is {a.number}, expected 0 to {COUNT - 1}.")
        print(write_job(draw_cases([a.number])[0], a.out))
    except MagicFaceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
