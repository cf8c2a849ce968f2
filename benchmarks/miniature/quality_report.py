"""quality.json and quality.md: everything that a run of the quality figures found."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from magicface_rt.errors import OutputError
from magicface_rt.process.interrupts import reraise_if_interrupt

from .fidelity import Score
from .quality_table import MEASURES, Interval, markdown, summary

JSON, TABLE = "quality.json", "quality.md"


@dataclass(frozen=True)
class Report:
    """What was measured.

    settings   what every picture depends on besides its variant
    training   the checkpoint's training.json; empty if there is none
    segmenter  the segmenter's report about itself
    scores     a score for each request, by row
    labels     what rows are called
    not_run    reasons, by variant
    words      IoU of the method's regions and of the words' alone; empty without a checkpoint
    """

    settings: Mapping[str, Any]
    training: Mapping[str, Any]
    segmenter: Mapping[str, Any]
    scores: Mapping[str, Sequence[Score]]
    labels: Mapping[str, str]
    not_run: Mapping[str, str]
    words: Mapping[str, Interval | None]

    def to_json(self) -> dict[str, Any]:
        return {
            "format": 1,
            "settings": self.settings,
            "training": self.training,
            "segmenter": self.segmenter,
            "measures": {one.key: {"heading": one.heading, "better": one.better} for one in MEASURES},
            "labels": {name: self.labels[name] for name in self.scores},
            "not_run": self.not_run,
            "words": {name: one and one.to_json() for name, one in self.words.items()},
            "summary": summary(self.scores),
            "requests": {name: [asdict(one) for one in of_row] for name, of_row in self.scores.items()},
        }

    def markdown(self) -> str:
        settings, seen = self.settings, self.training.get("denoiser", {}).get("pictures")
        about = [
            f"{len(next(iter(self.scores.values())))} requests at {settings['size']} pixels, "
            f"{settings['steps']} steps, guidance {settings['guidance']:g}, "
            f"injection layers {', '.join(map(str, settings['injection_layers']))}.",
            f"Checkpoint {settings['checkpoint'][:12]}" + (f", trained on {seen:,} pictures." if seen else "."),
            f"The segmenter, on held-out looks: {self._instrument()}.",
        ]
        more = []
        if self.words:
            more = ["", "## Regions by the method and by words alone", ""]
            more += ["IoU with the parts of the two-stage pictures, mean over requests.", ""]
            for name, one in self.words.items():
                more.append(f"- {name}: " + (f"{one.mean:.3f} ({one.low:.3f} .. {one.high:.3f})" if one else "-"))
        return markdown(self.scores, self.labels, about=about, not_run=self.not_run, more=more)

    def _instrument(self) -> str:
        found = [
            f"{kind} pictures IoU {of['mean_iou']:.3f}, patterns {of['pattern_accuracy']:.3f}"
            for kind, of in self.segmenter.items()
            if isinstance(of, dict)
        ]
        return "; ".join(found) or "it has no report"

    def write(self, folder: Path) -> None:
        """Write both files. Raises OutputError if the folder cannot be written."""
        content = json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / JSON).write_text(content, encoding="utf-8")
            (folder / TABLE).write_text(self.markdown(), encoding="utf-8")
        except OSError as error:
            reraise_if_interrupt(error)
            raise OutputError(f"the report cannot be written into {folder}: {error}.") from error
