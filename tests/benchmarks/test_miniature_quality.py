"""The quality figures' instruments, on drawn pictures whose truth is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from benchmarks.miniature import (  # noqa: E402
    architecture,
    fidelity,
    pictures,
    quality,
    quality_table,
    requests,
    segmenter,
    shipping,
    variants,
    vocabulary,
    world,
)
from magicface_rt.errors import (  # noqa: E402
    BackendError,
    CheckpointError,
    HostMemoryError,
    InputError,
    OptionError,
    OutputError,
)


@pytest.fixture(scope="module")
def cases() -> list[requests.Case]:
    return requests.draw_cases(range(requests.COUNT))


def truth(drawn: world.Pictures) -> segmenter.Parse:
    """What a perfect segmenter would find in one picture."""
    patterns = torch.zeros(1, len(world.PATTERNS), *drawn.labels.shape[1:])
    for part in requests.PATTERNED:
        patterns[0, int(drawn.people.looks[part].pattern[0]), drawn.mask(part)[0]] = 9.0
    return segmenter.Parse(drawn.labels, patterns)


def scored(case: requests.Case, drawn: world.Pictures) -> fidelity.Score:
    return fidelity.score(case, drawn.images[0], truth(drawn))


# ------------------------------------------------------------------------------------------------------ requests


def test_half_of_the_requests_have_one_concept_and_every_part_is_one(cases: list[requests.Case]) -> None:
    assert sum(len(case.parts) == 1 for case in cases) == len(cases) // 2
    assert {len(case.parts) for case in cases} == {1, 2, 3}
    assert {part for case in cases for part in case.parts} == set(requests.CONCEPTS)
    assert {case.parts for case in cases[:12]} >= {("hat",), ("face", "glasses")}


def test_a_request_does_not_depend_on_which_others_are_drawn(cases: list[requests.Case]) -> None:
    other, again = requests.draw_cases([41, 7])
    assert again.caption == cases[7].caption
    assert torch.equal(again.references.images, cases[7].references.images)
    assert torch.equal(other.drawn_again().images, cases[41].drawn_again().images)


def test_the_caption_names_every_concept_once_and_the_reference_shows_its_kind(cases: list[requests.Case]) -> None:
    for case in cases:
        for k, (part, word) in enumerate(zip(case.parts, case.words, strict=True)):
            assert case.caption.split().count(word) == 1, case
            assert word in case.references.captions[k].split(), case
            assert case.mask(k).sum() >= 48, (part, case.number)
            assert part in case.named


def test_what_is_drawn_of_a_target_shows_just_the_parts_that_are_named(cases: list[requests.Case]) -> None:
    for case in cases:
        drawn = case.drawn_again()
        assert drawn.captions == [case.caption]
        assert {part for part in world.PARTS[1:] if drawn.mask(part).any()} == set(case.named)


def test_references_have_looks_that_training_never_draws(cases: list[requests.Case]) -> None:
    """The references' looks are those of the world of held-out looks, and not what training would draw there."""
    for case in cases[:20]:
        numbers = [10 * case.number + k for k in range(len(case.parts))]
        held = world.World(seed=requests.REFERENCES, held_out=True).people(numbers)
        trained = world.World(seed=requests.REFERENCES).people(numbers)
        for k, part in enumerate(case.parts):
            look = case.references.people.looks[part].first[k]
            assert torch.equal(look, held.looks[part].first[k])
            if part != "face":  # skin has no held-out looks
                assert not torch.equal(look, trained.looks[part].first[k])


# ------------------------------------------------------------------------------------------------------- metrics


def test_lab_is_that_of_the_standard() -> None:
    colours = torch.tensor([[1.0, -1, -1], [1, 1, 1], [-1, -1, -1], [-1, -1, 1]]).T[:, None]  # red, white, black, blue
    expected = torch.tensor([[53.24, 80.09, 67.20], [100, 0, 0], [0, 0, 0], [32.30, 79.19, -107.86]]).T[:, None]
    assert torch.allclose(fidelity.lab(colours), expected, atol=0.05)


def test_a_palette_that_is_shifted_is_as_far_as_the_shift() -> None:
    points = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) * 10
    assert fidelity.palette_distance(points, points) == 0
    shift = torch.tensor([12.0, -9.0, 20.0])
    found = fidelity.palette_distance(points, points + shift)
    assert found == pytest.approx(shift.norm().item(), rel=0.05)
    assert fidelity.palette_distance(points + shift, points) == pytest.approx(found)


def test_a_palette_tells_two_colours_from_their_mean() -> None:
    two = torch.tensor([[20.0, 0, 0], [80.0, 0, 0]]).repeat(50, 1)
    one = torch.tensor([[50.0, 0, 0]]).repeat(100, 1)
    assert fidelity.palette_distance(two, one) > 25


def test_the_same_look_in_another_picture_is_near_and_another_look_is_far(cases: list[requests.Case]) -> None:
    again = [scored(case, case.drawn_again()) for case in cases]
    other = [scored(case, case.drawn_otherwise()) for case in cases]
    near, far = (np.mean([one.fidelity for s in found for one in s.concepts]) for found in (again, other))
    assert near > 0.8
    assert far < 0.4
    better = [
        a.palette < b.palette
        for s, t in zip(again, other, strict=True)
        for a, b in zip(s.concepts, t.concepts, strict=True)
        if a.palette is not None and b.palette is not None
    ]
    assert np.mean(better) > 0.95
    assert all(s.caption == 1.0 for s in again)


def test_looks_that_were_swapped_between_parts_are_noticed(cases: list[requests.Case]) -> None:
    swapped, own = [], []
    for case in cases:
        if case.parts == ("hat", "shirt"):
            drawn = case.drawn_again()
            looks = {**drawn.people.looks, "hat": drawn.people.looks["shirt"], "shirt": drawn.people.looks["hat"]}
            wrong = world.World(held_out=True).draw_people(replace(drawn.people, looks=looks), drawn.numbers)
            swapped += [one.own for one in scored(case, wrong).concepts]
            own += [one.own for one in scored(case, drawn).concepts]
    assert len(own) >= 10
    assert np.mean(own) > 0.9
    assert np.mean(swapped) < 0.1


def test_a_look_that_spills_over_other_parts_is_noticed(cases: list[requests.Case]) -> None:
    kept, spilt = [], []
    for case in cases:
        if case.parts == ("hat",):
            drawn = case.drawn_again()
            looks = {**drawn.people.looks, "shirt": drawn.people.looks["hat"], "hair": drawn.people.looks["hat"]}
            everywhere = world.World(held_out=True).draw_people(replace(drawn.people, looks=looks), drawn.numbers)
            kept.append(scored(case, drawn).concepts[0].spill)
            spilt.append(scored(case, everywhere).concepts[0].spill)
    assert len(kept) >= 15
    assert np.mean(spilt) > np.mean(kept) + 0.3


def test_a_part_that_is_not_there_has_no_fidelity_and_costs_the_caption(cases: list[requests.Case]) -> None:
    case = next(case for case in cases if case.parts == ("hat",))
    drawn = case.drawn_again()
    without = world.World(held_out=True).draw_people(
        replace(drawn.people, hat=torch.zeros_like(drawn.people.hat)), drawn.numbers
    )
    (hat,), found = scored(case, without).concepts, scored(case, without).caption
    assert (hat.found, hat.fidelity, hat.palette, hat.pattern) == (False, 0.0, None, 0.0)
    assert found == pytest.approx(2 * (len(case.named) - 1) / (2 * len(case.named) - 1))


def test_regions_are_compared_with_the_part_on_their_own_grid(cases: list[requests.Case]) -> None:
    case = next(case for case in cases if case.parts == ("hat", "shirt"))
    drawn = case.drawn_again()
    shares = torch.nn.functional.avg_pool2d(
        torch.stack([drawn.labels[0] == n for n in range(len(world.PARTS))]).float()[None], 8
    )[0]
    cells = shares.argmax(0)
    right = sum((cells == world.PARTS.index(part)).long() * (k + 1) for k, part in enumerate(case.parts))
    swapped = torch.tensor([0, 2, 1])[right]
    for regions, expected in ((right, 1.0), (swapped, 0.0), (torch.zeros_like(right), 0.0)):
        found = fidelity.score(case, drawn.images[0], truth(drawn), regions)
        assert [one.iou for one in found.concepts] == [expected, expected]


def test_a_part_that_fills_no_cell_has_the_cell_that_holds_most_of_it() -> None:
    labels = torch.zeros(64, 64, dtype=torch.uint8)
    labels[10:13, 18:22] = world.PARTS.index("glasses")
    region = torch.zeros(8, 8, dtype=torch.bool)
    region[1, 2] = True
    assert fidelity.region_iou(region, labels, "glasses") == 1.0
    assert fidelity.region_iou(region, labels, "hat") == 0.0


# ----------------------------------------------------------------------------------------------------- segmenter


def trained(pictures: int) -> segmenter.Segmenter:
    torch.set_num_threads(1)
    return segmenter.train(pictures, None, say=lambda _: None)


@pytest.fixture(scope="module")
def brief() -> segmenter.Segmenter:
    """One that has seen little: enough to tell large parts apart."""
    return trained(1_600)


@pytest.mark.slow
def test_a_segmenter_learns_and_says_how_well(brief: segmenter.Segmenter) -> None:
    fresh = segmenter.check(segmenter.Segmenter(segmenter.PartNet(), {}), None, count=64)["drawn"]
    learned = segmenter.check(brief, None, count=64)["drawn"]
    assert fresh["mean_iou"] < 0.2 < learned["mean_iou"]
    assert learned["iou"]["shirt"] > 0.6
    assert brief.report["drawn"]["mean_iou"] == pytest.approx(learned["mean_iou"], abs=0.1)


def test_a_segmenter_comes_back_from_its_file(tmp_path: Path) -> None:
    small = trained(64)
    size = small.save(tmp_path / "segmenter.safetensors")
    assert size < segmenter.MAX_BYTES
    again = segmenter.Segmenter.load(tmp_path / "segmenter.safetensors")
    images = world.World().draw(range(4)).images
    assert torch.equal(again.parse(images).labels, small.parse(images).labels)
    assert again.report == small.report
    large = again.parse(world.World(size=128).draw(range(2)).images)
    assert large.labels.shape == (2, 128, 128)
    assert large.patterns.shape == (2, 5, 128, 128)


def test_a_file_that_is_no_segmenter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        segmenter.Segmenter.load(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"{}")
    with pytest.raises(InputError, match="cannot be read"):
        segmenter.Segmenter.load(tmp_path / "bad.safetensors")


def test_a_region_has_the_pattern_that_its_pixels_say_together() -> None:
    logits = torch.zeros(5, 8, 8)
    logits[3, :, :5] = 4.0
    logits[1, :, 5:] = 4.0
    assert segmenter.pattern_of(logits, torch.ones(8, 8, dtype=torch.bool)) == 3


@pytest.mark.skipif(not (shipping.WEIGHTS / shipping.SEGMENTER).is_file(), reason="no segmenter in the tree")
def test_the_shipped_segmenter_knows_parts_and_all_patterns() -> None:
    found = segmenter.check(segmenter.Segmenter.load(shipping.WEIGHTS / shipping.SEGMENTER), None, count=256)["drawn"]
    assert min(found["iou"].values()) > 0.7
    assert set(found["patterns"]) == set(world.PATTERNS)
    assert min(found["patterns"].values()) > 0.85


# -------------------------------------------------------------------------------------------- tables and variants


def _scores(values: list[float]) -> list[fidelity.Score]:
    part = fidelity.ConceptScore("hat", True, 1.0, 1.0, None, 0.0, None, 0.0, 1.0, None, 0.5)
    return [fidelity.Score(n, (replace(part, fidelity=value),), 1.0) for n, value in enumerate(values)]


def test_a_paired_difference_sees_what_separate_intervals_hide() -> None:
    spread = np.linspace(0.1, 0.8, 60)
    mine, others = _scores((spread + 0.05).tolist()), _scores(spread.tolist())
    (measure,) = (one for one in quality_table.MEASURES if one.key == "fidelity")
    gap = quality_table.difference(mine, others, measure)
    assert gap is not None
    assert gap.mean == pytest.approx(0.05)
    assert gap.low == pytest.approx(0.05)
    separate = quality_table.interval(quality_table.values(mine, measure))
    assert separate is not None
    assert separate.low < spread.mean() < separate.high


def test_verdicts_follow_the_intervals() -> None:
    spread = np.linspace(0.1, 0.8, 60)
    scores = {
        variants.DEFAULT: _scores((spread + 0.1).tolist()),
        variants.PLAIN: _scores(spread.tolist()),
        variants.RSA: _scores((spread + 0.15).tolist()),
        "weight-2": _scores((spread + 0.1 + 0.01 * np.resize([1, -1], 60)).tolist()),
    }
    text = "\n".join(quality_table.verdicts(scores))
    assert "RSA only above the plain model: holds" in text
    assert "two-stage above RSA only: does not hold" in text
    assert "over weight-2: open" in text
    with pytest.raises(ValueError, match="different requests"):
        quality_table.difference(scores["rsa"][1:], scores["plain"][:-1], quality_table.MEASURES[0])


def test_variants_are_chosen_by_name() -> None:
    assert [one.name for one in variants.chosen("plain,two-stage", ("auto", "onnxruntime"))] == [
        "plain",
        "two-stage",
        "backend-onnxruntime",
    ]
    assert len({one.name for one in (*variants.VARIANTS, *variants.EXTRA)}) == len(variants.VARIANTS + variants.EXTRA)
    with pytest.raises(OptionError, match="alpha-9"):
        variants.chosen("alpha-9", ("auto",))
    with pytest.raises(OptionError, match="onnx-runtime"):
        variants.chosen(None, ("onnx-runtime",))


# ------------------------------------------------------------------------------------------------ shipped weights


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained, of the size for tests."""
    torch.manual_seed(0)
    size, words = architecture.SIZES["test"], vocabulary.Vocabulary()
    model = architecture.Miniature(
        size,
        words,
        architecture.build_autoencoder(size),
        architecture.build_text_encoder(size, words),
        architecture.build_unet(size),
    )
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    architecture.write_checkpoint(model, folder, provenance={"denoiser": {"pictures": 0}})
    return folder


@pytest.fixture
def shipped(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, in pieces far smaller than the real ones."""
    monkeypatch.setattr(shipping, "MAX_BYTES", 200_000)
    monkeypatch.setattr(shipping, "_SHARD_BYTES", 100_000)
    return shipping.ship(checkpoint, tmp_path / "weights")


def test_shipped_weights_open_as_the_checkpoint_that_they_were(checkpoint: Path, shipped: Path) -> None:
    from diffusers import UNet2DConditionModel

    from magicface_rt.export.checkpoint import Checkpoint

    assert len(list((shipped / "unet").glob("*.safetensors"))) > 1
    assert max(file.stat().st_size for file in shipped.rglob("*")) < 200_000
    before, after = (Checkpoint.open(folder).load_unet().state_dict() for folder in (checkpoint, shipped))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    theirs = UNet2DConditionModel.from_pretrained(shipping.open_shipped(shipped) / "unet").state_dict()
    assert all(torch.equal(before[name].half(), theirs[name].half()) for name in before)


def test_shipping_twice_gives_the_same_bytes(checkpoint: Path, shipped: Path) -> None:
    again = shipping.ship(checkpoint, shipped.with_name("again"))
    assert (again / shipping.SUMS).read_bytes() == (shipped / shipping.SUMS).read_bytes()
    with pytest.raises(OutputError, match="exists"):
        shipping.ship(checkpoint, shipped)


@pytest.mark.parametrize("damage", ["changed", "missing", "extra", "no list", "bad list"])
def test_damaged_weights_are_refused_by_name(shipped: Path, damage: str) -> None:
    name = "unet/diffusion_pytorch_model-00001-of-00002.safetensors"
    file = next((shipped / "unet").glob("*-00001-of-*.safetensors"))
    name = file.relative_to(shipped).as_posix()
    if damage == "changed":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "missing":
        file.unlink()
    elif damage == "extra":
        name = "unet/more.safetensors"
        (shipped / name).write_bytes(b"")
    elif damage == "no list":
        name = shipping.SUMS
        (shipped / name).unlink()
    else:
        name = "line 1"
        (shipped / shipping.SUMS).write_text("../../etc/passwd\n")
    with pytest.raises(CheckpointError, match=name):
        shipping.open_shipped(shipped)


# --------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def model(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> quality.Model:
    """With its bundle, which stands where the command looks for it."""
    return quality.open_model(checkpoint, tmp_path_factory.mktemp("quality"), ["fp32"], lambda _: None)


@pytest.mark.slow  # exports a bundle
def test_the_command_makes_measures_and_goes_on_where_it_was(
    checkpoint: Path,
    model: quality.Model,
    brief: segmenter.Segmenter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, instrument = model.bundle.path.parent, tmp_path / "segmenter.safetensors"
    brief.save(instrument)
    arguments = [str(checkpoint), "--segmenter", str(instrument), "--out", str(out), "--requests", "3", "--steps", "2"]
    arguments += ["--backend", "onnxruntime-cpu", "--threads", "1"]
    assert quality.main([*arguments, "--only", "two-stage,plain"]) == 0
    found = json.loads((out / "quality.json").read_text())
    assert list(found["requests"]) == ["two-stage", "plain", *quality.ORACLES]
    assert [score["number"] for score in found["requests"]["two-stage"]] == [0, 1, 2]
    assert found["requests"]["plain"][1]["concepts"][0]["iou"] is None
    assert found["requests"]["two-stage"][1]["concepts"][0]["iou"] is not None
    assert set(found["words"]) == {"method", "words", "method minus words"}
    assert "two-stage" in (out / "quality.md").read_text()
    assert (out / "sheet.png").is_file()

    made: list[str] = []
    put = pictures.PictureFolder.put
    monkeypatch.setattr(
        pictures.PictureFolder,
        "put",
        lambda self, name, n, result: (made.append(f"{name}/{n}"), put(self, name, n, result)),
    )
    (out / "pictures" / "plain" / "001.npz").unlink()
    store = ["--store", str(tmp_path / "no plans")]  # with or without the library, TensorRT cannot serve from it
    assert quality.main([*arguments, "--only", "two-stage,plain,rsa", "--backend", "tensorrt", *store]) == 0
    assert made == ["rsa/0", "plain/1", "rsa/1", "rsa/2"]
    found = json.loads((out / "quality.json").read_text())
    assert list(found["not_run"]) == ["backend-tensorrt"]

    capsys.readouterr()
    assert quality.main([*arguments, "--only", "plain", "--steps", "3"]) == 2
    assert "another steps (2, not 3)" in capsys.readouterr().err


NAMES = {"fp32": "float32", "fp16": "float16"}


def test_a_folder_keeps_the_pictures_of_one_bundle_for_each_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class BegunError(Exception):
        pass

    def begun(*_: object, **__: object) -> None:
        raise BegunError

    monkeypatch.setattr(quality, "make", begun)

    def model(checkpoint: bool, **hashes: str) -> quality.Model:
        of_all: dict[str, Any] = {"checkpoint_hash": "c", "injection_layers": [], "height": 64}
        bundles: Any = {  # under the names that the exporter gives dtypes, or, of a bundle that is named, under its own
            dtype if checkpoint else NAMES[dtype]: SimpleNamespace(dtype=NAMES[dtype], hash=digest, **of_all)
            for dtype, digest in hashes.items()
        }
        opened: Any = SimpleNamespace() if checkpoint else None
        return quality.Model(bundles, opened, {})

    def run(folder: str, model: quality.Model, only: str = "two-stage") -> None:
        chosen = variants.chosen(only, ("auto",))
        quality.run(model, Any, tmp_path / folder, chosen, requests=1)  # type: ignore[arg-type]

    for named in (model(False, fp32="a"), model(False, fp32="a")):
        with pytest.raises(BegunError):
            run("named", named)
    for other in (model(False, fp16="b"), model(False, fp32="d")):
        with pytest.raises(OutputError, match="another bundle"):
            run("named", other)
    both = model(True, fp32="a", fp16="b")
    for only in ("two-stage", "two-stage,fp16", "two-stage"):  # a further dtype makes only its own pictures
        with pytest.raises(BegunError):
            run("of a checkpoint", both, only)
    with pytest.raises(OutputError, match="another bundle"):
        run("of a checkpoint", model(True, fp32="a", fp16="d"), "two-stage,fp16")


def test_too_little_memory_is_no_reason_to_leave_a_variant_out(
    cases: list[requests.Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = variants.chosen("plain", ("onnxruntime-cpu",))
    settings = {"steps": 1, "guidance": 3.0, "threads": 1, "say": lambda _: None}

    def make(raised: Exception) -> object:
        def opened(*_: object, **__: object) -> None:
            raise raised

        monkeypatch.setattr(pictures, "Session", opened)
        folder = pictures.PictureFolder(tmp_path / "pictures", {})
        bundle: Any = None  # nothing reads it
        return pictures.make(bundle, "onnxruntime-cpu", chosen, cases[:1], folder, **settings)

    assert make(BackendError("it serves no such bundle")) == "it serves no such bundle"
    for raised in (HostMemoryError("nothing is left"), BackendError("onnxruntime failed: std::bad_alloc")):
        with pytest.raises(HostMemoryError):
            make(raised)


@pytest.mark.slow  # exports a bundle
def test_a_picture_does_not_depend_on_the_variants_beside_it(model: quality.Model, tmp_path: Path) -> None:
    """Variants share a batch and prepared references."""
    cases = requests.draw_cases([3])
    kept = []
    for names in ("two-stage", "plain,rsa,weight-1,two-stage"):
        folder = pictures.PictureFolder(tmp_path / names, {})
        settings = {"steps": 3, "guidance": 3.0, "threads": 1, "say": lambda _: None}
        chosen = variants.chosen(names, ("onnxruntime-cpu",))
        assert pictures.make(model.bundle, "onnxruntime-cpu", chosen, cases, folder, **settings) is None
        kept.append(folder.image("two-stage", 3))
        plain = folder
    assert (kept[0] - kept[1]).abs().max() <= 3 / 127.5
    assert plain.has("plain", 3)
