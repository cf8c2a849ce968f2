"""Session on a tiny bundle: what a request promises."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from magicface_rt import (
    BundleError,
    Cancelled,
    Concept,
    ConceptError,
    InputError,
    MaskError,
    OptionError,
    Options,
    PromptError,
    Reference,
    Request,
    Session,
    SessionClosedError,
)
from magicface_rt.backends import Backend, GraphRunner, OnnxRuntime
from magicface_rt.bundle import Bundle
from magicface_rt.request import check_request
from magicface_rt.soft_warnings import MagicFaceWarning

PROMPT = "a man with a hat"


def picture(seed: int) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((96, 96), Image.Resampling.BICUBIC)


def disc(box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", (96, 96))
    ImageDraw.Draw(mask).ellipse(box, fill=255)
    return mask


MAN = Concept("man", Reference(picture(1), mask=disc((10, 20, 80, 90)), prompt="a man"), weight=2.5)
HAT = Concept("hat", Reference(picture(2), mask=disc((20, 5, 90, 60)), prompt="a hat"), weight=2.0)


@pytest.fixture(scope="module")
def session(tiny_bundle: Path) -> Iterator[Session]:
    with Session(tiny_bundle, backend="onnxruntime-cpu") as opened:
        yield opened


def latents(session: Session, concepts: tuple[Concept, ...] = (MAN, HAT), **settings: Any) -> np.ndarray:
    return session.generate(PROMPT, concepts, **{"steps": 4, "seed": 7, **settings}).latents


def test_a_request_gives_pictures_regions_and_timings(session: Session) -> None:
    result = session.generate(PROMPT, [MAN, HAT], steps=4, images=2, seed=7)
    assert [image.size for image in result.images] == [(256, 256)] * 2
    assert result.regions.shape == (2, 16, 16)
    assert set(np.unique(result.regions)) <= {0, 1, 2}
    assert len(result.timings.steps) == 4
    assert result.timings.denoising > 0
    assert result.backend == "onnxruntime-cpu"


def test_the_same_seed_gives_the_same_picture(session: Session) -> None:
    assert np.array_equal(latents(session), latents(session))
    assert not np.array_equal(latents(session), latents(session, seed=8))


def test_an_image_does_not_depend_on_its_batch(session: Session) -> None:
    alone = latents(session)
    together = latents(session, images=3)
    np.testing.assert_allclose(together[:1], alone, rtol=0, atol=2e-4 * np.abs(alone).max())


def test_more_images_than_the_bundle_takes_at_once_are_made_in_turn(session: Session) -> None:
    size = session.bundle.limits.images
    assert len(latents(session, images=size + 1, steps=1)) == size + 1


@pytest.mark.parametrize(
    "change",
    [
        {"alpha": 1.0},
        {"guidance": 5.0},
        {"ca_scale": 0.95},
        {"weight_mode": "scale"},
        {"semantic_guidance": False},
        {"reference_seed": 1},
        {"negative_prompt": "rain"},
        {"steps": 5},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_setting_reaches_the_picture(session: Session, change: dict[str, Any]) -> None:
    assert not np.array_equal(latents(session), latents(session, **change))


def test_a_concepts_weight_image_mask_and_prompt_reach_the_picture(session: Session) -> None:
    (reference,) = MAN.references
    others = [
        Concept("man", reference, weight=3.0),
        Concept("man", Reference(picture(9), mask=reference.mask, prompt="a man"), weight=2.5),
        Concept("man", Reference(reference.image, mask=disc((0, 0, 40, 40)), prompt="a man"), weight=2.5),
        Concept("man", Reference(reference.image, mask=reference.mask, prompt="a dog"), weight=2.5),
        Concept("man", reference, Reference(picture(4), mask=reference.mask, prompt="a man"), weight=2.5),
    ]
    base = latents(session)
    for other in others:
        assert not np.array_equal(base, latents(session, (other, HAT)))


def test_a_concept_of_weight_zero_is_not_looked_at(session: Session) -> None:
    (reference,) = MAN.references
    hidden = [Concept("man", Reference(picture(s), mask=reference.mask, prompt="x"), weight=0) for s in (1, 2)]
    first, second = (latents(session, (concept,)) for concept in hidden)
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-5)


def test_without_concepts_there_are_no_regions(session: Session) -> None:
    result = session.generate(PROMPT, steps=2, seed=7)
    assert not result.regions.any()
    assert np.isfinite(result.latents).all()


def test_a_mask_may_be_the_alpha_channel(session: Session) -> None:
    (reference,) = MAN.references
    assert isinstance(reference.image, Image.Image)
    cut_out = reference.image.copy()
    cut_out.putalpha(reference.mask)
    concept = Concept("man", Reference(cut_out, prompt="a man"), weight=2.5)
    assert np.array_equal(latents(session), latents(session, (concept, HAT)))


def test_the_authors_loader_is_reproduced_where_asked(session: Session) -> None:
    (reference,) = MAN.references
    as_authors = Reference(reference.image, mask=reference.mask, prompt="a man", mask_threshold=255, resample="nearest")
    concept = Concept("man", as_authors, weight=2.5)
    assert not np.array_equal(latents(session), latents(session, (concept, HAT)))


def test_progress_tells_step_and_stage_and_can_cancel(session: Session) -> None:
    seen = []
    session.generate(PROMPT, [MAN], steps=5, alpha=0.4, progress=seen.append)
    assert [p.step for p in seen] == [1, 2, 3, 4, 5]
    assert [p.stage for p in seen] == ["rsa", "rsa", "rsa", "rba", "rba"]
    before = latents(session)
    with pytest.raises(Cancelled, match="after step 2 of 5"):
        session.generate(PROMPT, [MAN], steps=5, progress=lambda p: p.step < 2)
    assert np.array_equal(latents(session), before)


def test_ctrl_c_leaves_the_session_usable(session: Session) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    before = latents(session)
    with pytest.raises(KeyboardInterrupt):
        session.generate(PROMPT, [MAN], steps=5, progress=interrupt)
    assert np.array_equal(latents(session), before)


def test_threads_get_what_they_would_get_alone(session: Session) -> None:
    expected = [latents(session, seed=seed, steps=2) for seed in range(4)]
    found: dict[int, np.ndarray] = {}
    threads = [
        threading.Thread(target=lambda s=seed: found.update({s: latents(session, seed=s, steps=2)}))
        for seed in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[seed], expected[seed]) for seed in range(4))


def test_a_closed_session_says_so(tiny_bundle: Path) -> None:
    session = Session(tiny_bundle, check_hashes=False)
    session.close()
    session.close()
    with pytest.raises(SessionClosedError, match="open a new one"):
        session.generate(PROMPT)


REFERENCE = MAN.references[0]
TOO_MANY = [Concept(word, REFERENCE) for word in "abcdefg"]
EMPTY = Concept("man", Reference(picture(1), mask=Image.new("L", (96, 96))))
BAD_OPTIONS: dict[str, Any] = {
    "negative_prompt": 7,
    "steps": 0,
    "guidance": float("nan"),
    "alpha": 1.5,
    "ca_scale": 0,
    "weight_mode": "add",
    "semantic_guidance": "yes",
    "seed": -1,
    "images": 0,
    "reference_seed": 2**64,
}


@pytest.mark.parametrize(
    ("prompt", "concepts", "options", "error", "named"),
    [
        (PROMPT, [Concept("dog", REFERENCE)], {}, PromptError, "dog"),
        (PROMPT, [MAN, Concept("man", REFERENCE, name="other")], {}, ConceptError, "both stand on token"),
        ("a b c d e f g", TOO_MANY, {}, ConceptError, "at most 6"),
        ("word " * 80 + "zebra", [], {}, PromptError, "zebra"),
        (PROMPT, [EMPTY], {}, MaskError, "mask"),
        (PROMPT, [replace(MAN, token_index=90)], {}, ConceptError, "90"),
        (PROMPT, MAN, {}, ConceptError, "list of concepts"),
        *[(PROMPT, [MAN], {name: value}, InputError, name) for name, value in BAD_OPTIONS.items()],
    ],
)
def test_bad_requests_name_what_is_wrong(
    session: Session, prompt: str, concepts: Any, options: dict[str, Any], error: type[Exception], named: str
) -> None:
    """And each says what was expected, or what to do."""
    assert BAD_OPTIONS.keys() == {field.name for field in fields(Options)}
    with pytest.raises(error, match=named) as caught:
        session.generate(prompt, concepts, **options)
    message = str(caught.value)
    assert re.search(r"\bexpected |\bat most |[.;:] (?:Give|Leave|Paint|Shorten|Use) ", message), message


def test_a_mask_of_another_shape_is_refused_and_of_another_size_warned_about(session: Session) -> None:
    with pytest.raises(MaskError, match="mask"):
        session.generate(PROMPT, [Concept("man", Reference(picture(1), mask=Image.new("L", (200, 60), 255)))], steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        session.generate(PROMPT, [Concept("man", Reference(picture(1), mask=Image.new("L", (48, 48), 255)))], steps=1)
    assert any("48" in str(w.message) for w in caught)


class _Counting(Backend):
    """A backend of the caller's own: the interface is public."""

    name = "counting"

    def __init__(self) -> None:
        self.inner = OnnxRuntime("cpu")
        self.loaded: list[str] = []

    def load(self, bundle: Bundle, graph: str) -> GraphRunner:
        self.loaded.append(graph)
        return self.inner.load(bundle, graph)


def test_a_backend_object_may_be_given_and_each_graph_is_loaded_once(tiny_bundle: Path) -> None:
    backend = _Counting()
    with Session(tiny_bundle, backend=backend, check_hashes=False) as session:
        session.generate(PROMPT, [MAN], steps=1)
        session.generate(PROMPT, [MAN], steps=1)
    assert sorted(backend.loaded) == ["denoise_step", "reference_kv", "text_encoder", "vae_decoder", "vae_encoder"]


def with_other_weights(folder: Path) -> None:
    weights = np.fromfile(folder / "weights.bin", np.float32)
    (weights * np.float32(1.02)).tofile(folder / "new")
    os.replace(folder / "new", folder / "weights.bin")


def test_a_bundle_that_is_replaced_after_opening_is_not_drawn_with(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    with Session(folder, backend="onnxruntime-cpu") as session:
        with_other_weights(folder)
        with pytest.raises(BundleError, match=r"weights\.bin was replaced since the bundle was opened.*Open it again"):
            session.generate(PROMPT, steps=1)
        assert not session._graphs.runners


def test_a_bundle_that_is_replaced_while_a_graph_is_loaded_is_not_drawn_with(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))

    class Late(_Counting):
        def load(self, bundle: Bundle, graph: str) -> GraphRunner:
            if graph == "vae_decoder":
                with_other_weights(folder)
            return super().load(bundle, graph)

    with Session(folder, backend=Late(), check_hashes=False) as session:
        with pytest.raises(BundleError, match="was replaced since the bundle was opened"):
            session.generate(PROMPT, steps=1)
        assert "vae_decoder" not in session._graphs.runners


def write_other_weights(folder: Path) -> None:
    """In their place, as `cp` and `rsync --inplace` do."""
    weights = np.fromfile(folder / "weights.bin", np.float32) * np.float32(1.02)
    with (folder / "weights.bin").open("r+b") as file:
        weights.tofile(file)


def test_a_bundle_that_is_written_to_is_not_drawn_with(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    with Session(folder, backend="onnxruntime-cpu", check_hashes=False, keep="1GiB") as session:
        session.generate(PROMPT, [MAN], steps=1)
        write_other_weights(folder)
        for ask in (lambda: session.generate(PROMPT, [MAN], steps=1), lambda: session.prepare(HAT, steps=1)):
            with pytest.raises(BundleError, match=r"weights\.bin was written to since the bundle was opened.*Open it"):
                ask()


@pytest.mark.parametrize("ask", ["generate", "prepare"])
def test_a_bundle_that_is_written_to_during_a_request_is_not_drawn_with(
    tiny_bundle: Path, tmp_path: Path, ask: str
) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    with Session(folder, backend="onnxruntime-cpu", check_hashes=False, keep="1GiB") as session:
        session.generate(PROMPT, [MAN], steps=2)
        held, made = session.kept_bytes, []

        def progress(progress: object) -> None:
            if not made:
                write_other_weights(folder)
            made.append(progress)

        asked = {
            "generate": lambda: session.generate(PROMPT, [MAN], steps=2, progress=progress),
            "prepare": lambda: session.prepare(HAT, steps=2, workspace=1, progress=progress),
        }
        with pytest.raises(BundleError, match=r"weights\.bin was written to since the bundle was opened"):
            asked[ask]()
        assert len(made) == 2, "it is looked for as the request ends"
        assert session.kept_bytes == held, "what other weights have made is not kept"


def test_what_is_loaded_of_a_bundle_goes_on_where_another_takes_its_place(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    with Session(folder, backend="onnxruntime-cpu", check_hashes=False) as session:
        before = latents(session)
        with_other_weights(folder)
        assert np.array_equal(latents(session), before)


@pytest.mark.parametrize(
    ("word", "index", "prompt", "other"),
    [
        ("man", 5, PROMPT, "hat"),
        ("man", (2, 4), "a red hat too", "red too"),
        ("word " * 90, 2, PROMPT, "man"),
        ("Man", 2, PROMPT, None),
        ("hat", (2, 3), "a red hat", None),
        ("red hat", 3, "a red hat", None),
    ],
)
def test_a_token_index_at_which_the_word_does_not_stand_is_told(
    session: Session, word: str, index: Any, prompt: str, other: str | None
) -> None:
    """It goes with a concept into other prompts."""
    request = Request(prompt, [Concept(word, *MAN.references, token_index=index, name="him")])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_request(request, session.bundle, session.tokenizer)
    said = [str(one.message) for one in caught if issubclass(one.category, MagicFaceWarning)]
    assert len(said) == (other is not None)
    assert other is None or f"concept 'him': by its token_index it stands on {other!r}" in said[0]


@pytest.mark.parametrize("keep", [None, "1GiB"])
def test_run_json_tells_of_the_pixels_that_were_drawn_from(tiny_bundle: Path, tmp_path: Path, keep: str | None) -> None:
    """A buffer is used for the next frame meanwhile, and an image is closed."""
    (reference,) = MAN.references
    frame, mask = np.array(reference.image), disc((10, 20, 80, 90))
    drawn = hashlib.sha256(frame.tobytes()).hexdigest()

    def next_frame(_: object) -> None:
        frame[:] = 0

    with Session(tiny_bundle, backend="onnxruntime-cpu", check_hashes=False, keep=keep) as session:
        concept = Concept("man", Reference(frame, mask=mask, prompt="a man"))
        result = session.generate(PROMPT, [concept], steps=1, progress=next_frame)
    mask.close()
    run = json.loads((result.save(tmp_path / "out") / "run.json").read_text())
    (said,) = run["concepts"][0]["references"]
    assert said["image"] == {"shape": [96, 96, 3], "sha256": drawn}
    assert said["mask"]["shape"] == [96, 96]


def test_importing_the_runtime_loads_no_torch() -> None:
    code = (
        "import sys, magicface_rt.cli._verbs\nfrom magicface_rt import *\n"
        "print([m for m in ('torch', 'diffusers', 'transformers', 'onnx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_closing_during_a_request_ends_it_at_its_next_step(tiny_bundle: Path) -> None:
    backend = _Counting()
    session = Session(tiny_bundle, backend=backend, check_hashes=False)
    with pytest.raises(SessionClosedError):
        session.generate(PROMPT, [MAN], steps=5, progress=lambda p: session.close())
    assert not session._graphs.runners


async def later(progress: object) -> bool:
    return False


class Later:
    async def __call__(self, progress: object) -> bool:
        return False


def test_what_needs_no_computing_is_refused_before_any_graph_is_loaded(tiny_bundle: Path) -> None:
    backend = _Counting()
    (reference,) = MAN.references
    wordy = Reference(reference.image, mask=reference.mask, prompt="word " * 90)
    with Session(tiny_bundle, backend=backend, check_hashes=False) as session:
        with pytest.raises(PromptError):
            session.generate(PROMPT, [Concept("man", wordy)])
        with pytest.raises(OptionError, match="steps"):
            session.generate(PROMPT, [MAN], steps=1000)
        with pytest.raises(ConceptError, match="weight_mode"):
            session.generate(PROMPT, [Concept("man", reference, weight=50)], weight_mode="scale")
        two = np.array(["keep", "keep"])
        for progress in (5, "print", later, Later(), functools.partial(later)):
            for ask in (session.generate, session.warm_up):
                with pytest.raises(OptionError, match=r"^progress is .*(expected a function|that it could not cancel)"):
                    ask(PROMPT, [MAN], steps=1, progress=progress)
            with pytest.raises(OptionError, match=r"^progress is "):
                session.prepare(MAN, steps=1, progress=progress)  # type: ignore[arg-type]
        with pytest.raises(OptionError, match="weight_mode is array"):
            session.generate(PROMPT, [MAN], steps=1, weight_mode=two)
        with pytest.raises(OptionError, match="memory is array"):
            session.plan([MAN], memory=two)  # type: ignore[arg-type]
        with pytest.raises(OptionError, match="storage is array"):
            session.prepare(MAN, storage=two)  # type: ignore[arg-type]
        with pytest.raises(OptionError, match=r"graphs\[0\] is \['vae_encoder'\], expected a graph's name"):
            session.unload(["vae_encoder"])  # type: ignore[arg-type]
    assert not backend.loaded
    for name in ("memory", "storage"):
        with pytest.raises(OptionError, match=f"{name} is array"):
            Session(tiny_bundle, **{name: two})
    with pytest.raises(OptionError, match="workers"):
        Session(tiny_bundle, workers=0)
    for threads in (-1, 1025, 2**31, True, -(10**5000)):
        with pytest.raises(OptionError, match=r"threads is .* expected a whole number from 0"):
            Session(tiny_bundle, threads=threads)


def test_generating_from_a_callback_is_refused_instead_of_waiting_for_ever(session: Session) -> None:
    with pytest.raises(OptionError, match="callback"):
        session.generate(PROMPT, [MAN], steps=2, progress=lambda p: session.generate(PROMPT, steps=1))


def test_likely_slips_are_told_what_was_meant(session: Session) -> None:
    with pytest.raises(ConceptError, match=r"concepts is the concept 'man', expected a list"):
        session.generate(PROMPT, MAN)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"setting 'stepz' is not known. Is steps meant"):
        session.generate(PROMPT, stepz=3)
    with pytest.raises(OptionError, match=r"options is .* expected an Options object"):
        session.generate(PROMPT, options={"steps": 2})  # type: ignore[arg-type]
