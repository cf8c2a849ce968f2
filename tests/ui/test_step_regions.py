"""`record_regions`: the regions after every step, at no cost to who does not ask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from magicface_rt import Concept, OptionError, Options, Reference, Request, Session

PROMPT = "a man with a hat"


def concept(word: str, seed: int) -> Concept:
    small = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    mask = Image.new("L", (96, 96))
    ImageDraw.Draw(mask).ellipse((10, 20, 80, 90), fill=255)
    image = Image.fromarray(small).resize((96, 96), Image.Resampling.BICUBIC)
    return Concept(word, Reference(image, mask=mask, prompt=f"a {word}"))


@pytest.fixture(scope="module")
def session(tiny_bundle: Path) -> Iterator[Session]:
    with Session(tiny_bundle, backend="onnxruntime-cpu", check_hashes=False, threads=1) as opened:
        yield opened


def test_the_regions_of_step_k_are_those_that_the_loop_had_after_it(session: Session) -> None:
    concepts = [concept("man", 1), concept("hat", 2)]
    result = session.generate(PROMPT, concepts, steps=4, images=2, seed=3, record_regions=True)
    steps = result.regions_per_step
    assert steps is not None
    assert steps.dtype == np.uint8
    assert steps.shape == (4, *result.regions.shape)
    np.testing.assert_array_equal(steps[-1], result.regions)
    assert len({step.tobytes() for step in steps}) > 1, "every step has the same regions; nothing is shown by this"


def test_pictures_latents_and_regions_are_the_same_bits(session: Session) -> None:
    concepts = [concept("man", 1)]
    plain = session.generate(PROMPT, concepts, steps=3, seed=5)
    recorded = session.generate(PROMPT, concepts, steps=3, seed=5, record_regions=True)
    assert plain.regions_per_step is None
    np.testing.assert_array_equal(plain.latents, recorded.latents)
    np.testing.assert_array_equal(plain.regions, recorded.regions)
    assert [image.tobytes() for image in plain.images] == [image.tobytes() for image in recorded.images]
    assert plain.to_dict()["options"] == recorded.to_dict()["options"]


def test_only_the_requests_of_a_batch_that_ask_get_them_also_where_it_is_split(session: Session) -> None:
    man, hat = concept("man", 1), concept("hat", 2)
    requests = [
        Request(PROMPT, [man], Options(steps=2, seed=1, images=3)),
        Request(PROMPT, [hat], Options(steps=2, seed=2, images=3, alpha=0.0), record_regions=True),
    ]
    first, second = session.generate_batch(requests)
    alone = session.generate_batch([requests[1]])[0]
    assert first.regions_per_step is None
    assert second.regions_per_step is not None
    assert alone.regions_per_step is not None
    assert second.regions_per_step.shape[:2] == (2, 3)
    np.testing.assert_array_equal(second.regions_per_step, alone.regions_per_step)


def test_nothing_is_read_from_the_device_where_nobody_asks(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    from magicface_rt.backends.binding import Binding

    read: list[str] = []
    real = Binding.read

    def counting(self: Binding, name: str) -> np.ndarray:
        read.append(name)
        return real(self, name)

    monkeypatch.setattr(Binding, "read", counting)
    session.generate(PROMPT, steps=3)
    plain = read.count("region_label_out")
    read.clear()
    session.generate(PROMPT, steps=3, record_regions=True)
    assert read.count("region_label_out") == plain + 3


def test_they_are_saved(session: Session, tmp_path: Path) -> None:
    made = session.generate(PROMPT, [concept("man", 1)], steps=2, record_regions=True)
    made.save(tmp_path / "with")
    session.generate(PROMPT, [concept("man", 1)], steps=2).save(tmp_path / "without")
    with np.load(tmp_path / "with" / "regions.npz") as found:
        np.testing.assert_array_equal(found["regions_per_step"], made.regions_per_step)
    with np.load(tmp_path / "without" / "regions.npz") as found:
        assert set(found) == {"regions", "concept_names"}


def test_what_is_no_switch_is_refused(session: Session) -> None:
    with pytest.raises(OptionError, match="record_regions is 1, expected True or False"):
        session.generate(PROMPT, record_regions=1)  # type: ignore[arg-type]
