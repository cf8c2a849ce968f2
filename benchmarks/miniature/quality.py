"""Quality as numbers: how well the method carries looks over, on the miniature and 200 fixed requests.

    python -m benchmarks.miniature.quality CHECKPOINT --out DIR                  # all of it
    python -m benchmarks.miniature.quality BUNDLE --segmenter FILE --out DIR --requests 12 --only two-stage,plain,rsa

Every picture is made by `magicface_rt.Session` from an exported bundle; a checkpoint is exported first, into DIR.
One setting is changed at a time (`variants.py`), and every variant makes the same requests from the same noise.
Writes quality.json (every request), quality.md (tables), sheet.png. Pictures are kept in DIR, so a run that was stopped
can continue, and a further variant makes only its own.

Three rows are drawn, not generated, and give the figures their scale: the target in the references' looks, the same
through the model's autoencoder (about the best that can be reached), and the target in other looks (what chance gives).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from magicface_rt import Bundle, MagicFaceError, Session
from magicface_rt.errors import OptionError, OutputError
from magicface_rt.export.checkpoint import Checkpoint
from magicface_rt.export.exporter import ExportOptions, export_bundle, exporter_versions
from magicface_rt.export.made_from import why_not_made_from
from magicface_rt.process.interrupts import reraise_if_interrupt

from .fidelity import Score, region_iou, score
from .pictures import PictureFolder, make
from .quality_report import Report
from .quality_sheet import sheet
from .quality_table import AGAIN, AUTOENCODED, OTHERWISE, Interval, interval
from .requests import COUNT, Case, draw_cases
from .segmenter import Parse, Segmenter
from .shipping import SEGMENTER, SUMS, WEIGHTS, open_shipped
from .variants import DEFAULT, Variant, chosen
from .wordregions import word_regions

STEPS, GUIDANCE = 30, 3.0  # what the miniature's own sheets are drawn with
TOGETHER = 16  # variants of a request in one batch
SHEET_ROWS = 8
ORACLES = {
    AGAIN: "drawn: the target in the references' looks",
    AUTOENCODED: "the same, through the autoencoder",
    OTHERWISE: "drawn: the target in other looks",
}


@dataclass(frozen=True)
class Model:
    """What is measured: bundles by dtype, and the checkpoint that they were made from if it is at hand."""

    bundles: Mapping[str, Bundle]
    checkpoint: Checkpoint | None
    training: Mapping[str, Any]

    @property
    def bundle(self) -> Bundle:
        return next(iter(self.bundles.values()))

    def bundle_for(self, variant: Variant) -> Bundle | None:
        """The bundle that makes a variant's pictures; None if there is none of its dtype.

        A bundle that was named is used whatever its dtype; a checkpoint has one for each dtype.
        """
        named = self.checkpoint is None and variant.dtype == "fp32"
        return self.bundle if named else self.bundles.get(variant.dtype)


def open_model(source: Path, out: Path, dtypes: Sequence[str], say: Callable[[str], object]) -> Model:
    """Open a bundle as it is, or the bundles of a checkpoint, which are exported into `out` if they are not there yet.

    Raises:
        BundleError, CheckpointError: `source` cannot be read as either, or shipped weights were changed.
        OutputError: `out` holds bundles of another checkpoint or exporter.
    """
    if (source / "bundle.json").is_file():
        bundle = Bundle.open(source)
        return Model({bundle.dtype: bundle}, None, {})
    checkpoint = Checkpoint.open(open_shipped(source) if (source / SUMS).is_file() else source)
    digest, bundles = checkpoint.content_hash(), {}
    for dtype in dtypes:
        place = out / f"bundle-{dtype}"
        if not place.exists():
            say(f"{place}: exporting")
            export_bundle(checkpoint, place, ExportOptions(dtype=dtype, images=TOGETHER))
        bundles[dtype] = Bundle.open(place)
        if reason := why_not_made_from(bundles[dtype], checkpoint, digest):
            raise OutputError(f"output folder {out}: {reason}. Choose another folder.")
        if bundles[dtype].exporter != exporter_versions():
            raise OutputError(f"output folder {out}: {place.name} is of another exporter. Choose another folder.")
    about = source / "training.json"
    return Model(bundles, checkpoint, json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {})


def scored(
    cases: Sequence[Case], images: Sequence[Tensor], segmenter: Segmenter, regions: Sequence[Tensor] | None = None
) -> list[Score]:
    """Score one picture, float32 [3,h,w], for each request, with its regions if there are any."""
    parse = segmenter.parse(torch.stack(list(images)))
    return [
        score(
            case,
            images[i],
            Parse(parse.labels[i : i + 1], parse.patterns[i : i + 1]),
            None if regions is None else regions[i],
        )
        for i, case in enumerate(cases)
    ]


def oracle_images(model: Model, cases: Sequence[Case], threads: int) -> dict[str, list[Tensor]]:
    """The pictures of the three drawn rows, by row."""
    again = [case.drawn_again().images[0] for case in cases]
    with Session(model.bundle, backend="onnxruntime-cpu", threads=threads) as session:
        passed = autoencoded(session, again)
    return {
        AGAIN: again,
        AUTOENCODED: passed,
        OTHERWISE: [case.drawn_otherwise().images[0] for case in cases],
    }


def autoencoded(session: Session, images: Iterable[Tensor]) -> list[Tensor]:
    """Images float32 [3,h,w] in -1..1 after the bundle's encoder and decoder: what its latents hold of them."""
    encoder, decoder = session.runner("vae_encoder"), session.runner("vae_decoder")
    passed = []
    for image in images:
        latents = encoder.run({"pixels": image[None].numpy()})["latents"]
        (pixels,) = decoder.run({"latents": latents}).values()
        passed.append(torch.from_numpy(np.asarray(pixels, np.float32)).clamp(-1, 1)[0])
    return passed


def run(
    model: Model,
    segmenter: Segmenter,
    out: Path,
    variants: Sequence[Variant],
    *,
    requests: int = COUNT,
    backends: Sequence[str] = ("auto",),
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    threads: int = 0,
    store: Path | None = None,
    say: Callable[[str], object] = print,
) -> dict[str, list[Score]]:
    """Make missing pictures, measure, and write the report; return the scores by row.

    Raises:
        MagicFaceError: a picture could not be made.
        OutputError: the folder cannot be written, or holds pictures of other settings.
    """
    settings = {
        "checkpoint": model.bundle.checkpoint_hash,
        "bundle": {one.dtype: bundle.hash for one in variants if (bundle := model.bundle_for(one)) is not None},
        "injection_layers": [layer.index for layer in model.bundle.injection_layers],
        "size": model.bundle.height,
        "steps": steps,
        "guidance": guidance,
        "backend": backends[0],
    }
    folder = PictureFolder(out / "pictures", settings)
    cases = draw_cases(range(requests), size=model.bundle.height)
    not_run: dict[str, str] = {}
    groups: dict[tuple[str, str], tuple[Bundle, list[Variant]]] = {}
    for variant in variants:
        bundle = model.bundle_for(variant)
        if bundle is None:
            not_run[variant.name] = f"there is no {variant.dtype} bundle; name a checkpoint, which is exported."
            continue
        _, of_group = groups.setdefault((bundle.hash, variant.backend or backends[0]), (bundle, []))
        of_group.append(variant)
    for (_, backend), (bundle, of_group) in groups.items():
        why = make(
            bundle,
            backend,
            of_group,
            cases,
            folder,
            steps=steps,
            guidance=guidance,
            threads=threads,
            say=say,
            session_settings={"store": store} if store is not None else {},
        )
        not_run.update(dict.fromkeys([one.name for one in of_group] if why else [], why or ""))
    made = [variant for variant in variants if variant.name not in not_run]
    scores: dict[str, list[Score]] = {}
    for variant in made:
        images = [folder.image(variant.name, case.number) for case in cases]
        regions = [folder.regions(variant.name, case.number) for case in cases] if variant.concepts else None
        scores[variant.name] = scored(cases, images, segmenter, regions)
    for name, images in oracle_images(model, cases, threads).items():
        scores[name] = scored(cases, images, segmenter)
    labels = {**{variant.name: variant.label for variant in variants}, **ORACLES}
    words = _words(model, cases, folder, segmenter) if DEFAULT in scores else {}
    report = Report(settings, model.training, segmenter.report, scores, labels, not_run, words)
    report.write(out)
    try:
        sheet(cases[:SHEET_ROWS], folder).save(out / "sheet.png")
    except OSError as error:
        reraise_if_interrupt(error)
        raise OutputError(f"the sheet cannot be written into {out}: {error}.") from error
    return scores


def _words(
    model: Model, cases: Sequence[Case], folder: PictureFolder, segmenter: Segmenter
) -> dict[str, Interval | None]:
    """Intervals, over requests, of the mean IoU with the parts of the default's pictures.

    They are those of the default's regions, of the words' regions alone, and of the difference; empty without a
    checkpoint.
    """
    if model.checkpoint is None:
        return {}
    images = [folder.image(DEFAULT, case.number) for case in cases]
    labels = segmenter.parse(torch.stack(images)).labels
    alone = word_regions(model.checkpoint, cases, images)
    own = [folder.regions(DEFAULT, case.number) for case in cases]

    def overlaps(regions: Sequence[Tensor]) -> Any:
        return np.array(
            [
                np.mean([region_iou(regions[i] == k + 1, labels[i], part) for k, part in enumerate(case.parts)])
                for i, case in enumerate(cases)
            ]
        )

    mine, theirs = overlaps(own), overlaps(alone)
    return {"method": interval(mine), "words": interval(theirs), "method minus words": interval(mine - theirs)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.miniature.quality", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("source", type=Path, nargs="?", default=WEIGHTS, help="a bundle or a diffusers folder")
    parser.add_argument("--segmenter", type=Path, help=f"else {SEGMENTER} beside the weights")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=COUNT)
    parser.add_argument("--only", help="variants by name, with commas")
    parser.add_argument("--backend", action="append", help="the first makes every variant, others the default one")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--store", type=Path, help="engine store, for TensorRT")
    a = parser.parse_args(argv)
    try:
        if not 1 <= a.requests <= COUNT:
            raise OptionError(f"--requests is {a.requests}, expected 1 to {COUNT}.")
        if a.threads:
            torch.set_num_threads(a.threads)
        backends = tuple(a.backend or ("auto",))
        variants = chosen(a.only, backends)
        segmenter = Segmenter.load(a.segmenter or (a.source if a.source.is_dir() else WEIGHTS) / SEGMENTER)
        model = open_model(a.source, a.out, sorted({one.dtype for one in variants} | {"fp32"}, reverse=True), print)
        run(
            model,
            segmenter,
            a.out,
            variants,
            requests=a.requests,
            backends=backends,
            steps=a.steps,
            guidance=a.guidance,
            threads=a.threads,
            store=a.store,
        )
    except MagicFaceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print((a.out / "quality.md").read_text(encoding="utf-8"), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
