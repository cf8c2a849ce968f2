"""A report on disk: bench.json, bench.md, and the plots."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from magicface_rt.errors import BackendMissingError, OutputError
from magicface_rt.files import atomic_files
from magicface_rt.process.interrupts import reraise_if_interrupt

from .plots import draw
from .results import Report
from .schema import problems
from .table import markdown

JSON, TABLE = "bench.json", "bench.md"


def write(report: Report | Mapping[str, Any], folder: Path, *, plots: bool = True) -> list[Path]:
    """Write what a report holds; return the files. Without matplotlib there are no plots, and the table says so.

    Raises:
        OutputError: the folder cannot be written.
    """
    content = report.to_json() if isinstance(report, Report) else dict(report)
    content = json.loads(json.dumps(content))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Written before it is checked: a mistake in the report must not cost hours of measuring. The earlier file
        # stays until this one is complete: with `--resume` it holds what is not measured again.
        _write(folder / JSON, json.dumps(content, indent=1) + "\n")
        wrong = problems(content)
        if wrong:
            raise OutputError(f"{folder / JSON} was written, and is not as schema.json says: {'; '.join(wrong[:5])}.")
        text = markdown(content)
        made = [folder / JSON, folder / TABLE]
        try:
            if plots:
                made += draw(content, folder)
                text += "".join(f"\n![{file.stem}]({file.name})\n" for file in made if file.suffix == ".png")
        except BackendMissingError as error:
            text += f"\n{error}\n"
        _write(folder / TABLE, text)
    except OSError as error:
        reraise_if_interrupt(error)
        raise OutputError(f"the report cannot be written into {folder}: {error}.") from error
    return made


def _write(file: Path, text: str) -> None:
    atomic_files.write(atomic_files.resolve_target(file), text.encode())
