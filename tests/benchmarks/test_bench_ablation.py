"""The ablation: what it measures is what the reference did, and what it cannot measure is named."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import ablation
from benchmarks.ablation_table import summaries, text
from benchmarks.encoders import Encoder, Encoders, prepared_pixels
from benchmarks.sweeping import Ablation, Row, Sweeps, Variant
from benchmarks.watching import Seen, WatchedReference
from benchmarks.workload import PROMPT, drawn_concepts
from magicface_rt import Concept, Options
from magicface_rt.errors import InputError
from magicface_rt.export.checkpoint import Checkpoint
from magicface_rt.export.reference import MagicFaceReference, StepInputs

BASE = Variant(0.4, None, "bias", True, (10, 11, 12, 13, 14, 15), 0)
SIZE = 128
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PIXELS = {"image_size": 32, "patch_size": 16}


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Path) -> Ablation:
    return Ablation(Checkpoint.open(tiny_checkpoint), PROMPT, drawn_concepts(2, 0.4), Options(steps=3), SIZE)


def step_inputs(tiny: Ablation, **changes: Any) -> StepInputs:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, SIZE // 8, SIZE // 8, generator=generator)
    values: dict[str, Any] = {
        "latents": latents,
        "timestep": 481,
        "text": tiny.text[:2],
        "references": tiny.z0,
        "reference_text": tiny.text[2:],
        "reference_masks": torch.from_numpy(np.stack([x.mask_grid for x in tiny.loaded]).astype(bool)),
        "weights": torch.tensor([2.5, 2.5]),
        "concept_of_reference": (0, 1),
        "tokens": tiny.tokens,
        "stage": "rsa",
        "regions": None,
        "ca_scale": 0.6,
        "guidance": 7.5,
        "coefficients": (1.02, -0.05),
    }
    return StepInputs(**{**values, **changes})


def test_watching_changes_no_picture(tiny: Ablation) -> None:
    inputs = step_inputs(tiny)
    watched = WatchedReference(tiny.unet).step(inputs)
    plain = MagicFaceReference(tiny.unet).step(inputs)
    assert torch.equal(watched.latents, plain.latents)


def test_attention_mass_goes_where_the_method_says(tiny: Ablation) -> None:
    reference = WatchedReference(tiny.unet)

    def mass(**changes: Any) -> np.ndarray:
        reference.step(step_inputs(tiny, **changes))
        return np.array(reference.seen.mass_everywhere)  # (6 layers, 2 references)

    as_given = mass()
    assert as_given.shape == (6, 2)
    assert (as_given > 0).all()
    assert (as_given.sum(1) < 1).all()
    heavier = mass(weights=torch.tensor([6.0, 2.5]))
    assert (heavier[:, 0] > as_given[:, 0]).all()
    assert (heavier[:, 1] < as_given[:, 1]).all()
    assert (mass(weights=torch.tensor([0.0, 2.5]))[:, 0] == 0).all()
    assert (mass(weights=torch.tensor([1000.0, -1000.0])).round(4) == [1, 0]).all()

    # RBA: tokens outside of a concept's region see nothing of its reference.
    regions = torch.zeros(2, SIZE // 16, SIZE // 16, dtype=torch.bool)
    regions[0, :, :2] = True
    reference._regions = regions
    reference.step(step_inputs(tiny, stage="rba", regions=regions))
    inside, everywhere = np.array(reference.seen.mass, float), np.array(reference.seen.mass_everywhere)
    np.testing.assert_allclose(everywhere[:, 0], inside[:, 0] / 4, rtol=1e-5)
    assert np.isnan(inside[:, 1]).all()
    assert (everywhere[:, 1] == 0).all()


def test_features_of_the_reference_itself_have_no_distance(tiny: Ablation) -> None:
    """A reference that is the target, under the same prompt, seen in full: every feature finds itself."""
    reference = WatchedReference(tiny.unet, injection_layers=(10,))
    inputs = step_inputs(tiny)
    regions = torch.ones(2, SIZE // 16, SIZE // 16, dtype=torch.bool)
    reference._regions = regions
    masks = torch.ones_like(inputs.reference_masks)
    itself = torch.cat([inputs.latents, inputs.references[1:]])
    text = torch.cat([inputs.text[1:], inputs.reference_text[1:]])
    reference.step(replace(inputs, references=itself, reference_text=text, reference_masks=masks))
    (same, other), *later = reference.seen.distance
    assert len(later) == 5
    assert same == pytest.approx(0, abs=1e-5)
    assert other is not None
    assert other > 1e-3


@pytest.mark.parametrize("layers", [(), (13, 14, 15), tuple(range(16))])
def test_distance_is_that_of_the_same_layers_whichever_inject(tiny: Ablation, layers: tuple[int, ...]) -> None:
    reference = WatchedReference(tiny.unet, injection_layers=layers)
    regions = torch.ones(2, SIZE // 16, SIZE // 16, dtype=torch.bool)

    def distances(one: WatchedReference) -> np.ndarray:
        one._regions = regions
        one.step(step_inputs(tiny))
        return np.array(one.seen.distance, float)

    found = distances(reference)
    assert (len(reference.seen.mass), len(reference.seen.mass_everywhere)) == (len(layers), len(layers))
    # Layers 10 to 15, each before its self-attention; no reference was in them before layer 10 injects, or 13 does.
    assert found.shape == (6, 2)
    default = distances(WatchedReference(tiny.unet))
    same = 0 if 0 in layers else 1
    np.testing.assert_array_equal(found[:same], default[:same])
    assert (found[same:] != default[same:]).all()
    if layers == (13, 14, 15):
        nothing = distances(WatchedReference(tiny.unet, injection_layers=()))
        np.testing.assert_array_equal(found[:4], nothing[:4])


def row(
    seed: int, mass: float | None = 0.5, by_reference: tuple[float | None, ...] = (0.25, 0.125), **changes: Any
) -> Row:
    variant = replace(BASE, seed=seed, **changes)
    return Row(variant, "man", 0.5, 0.5, mass, by_reference, 0.1, None, 0, 3, {"clip_i": 0.7 + seed / 10})


def test_spread_over_the_seeds_is_in_table_and_cells() -> None:
    rows = [
        row(0, 0.2),
        row(1, 0.4),
        row(2, None, (0.5, None)),
        row(0, 0.9, layers=(13, 14, 15), changed="layers 13-15"),
    ]
    given, other = summaries(rows)
    assert (given.seeds, other.seeds) == (3, 1)
    mass = given.figures["mass"]
    assert (mass.mean, mass.deviation, mass.count) == (pytest.approx(0.3), pytest.approx(0.02**0.5), 2)
    cells = given.cells()
    assert (cells["mass"], cells["mass_sd"], cells["mass_n"]) == (mass.mean, mass.deviation, 2)
    assert cells["clip_i_sd"] == pytest.approx(0.1)
    assert (cells["mass_by_reference"], cells["mass_by_reference_sd"]) == ("0.333333 0.125", "0.144338 0")
    assert (cells["mass_layers"], cells["distance_layers"], cells["distance"]) == ("10-15", "10-15", None)
    assert (other.cells()["mass_layers"], other.cells()["distance_layers"]) == ("13-15", "10-15")
    assert other.figures["mass"].deviation is None
    written = text(rows, ["clip_t", "dino", "face"])
    (line,) = (line for line in written.splitlines() if line.startswith("| as given"))
    assert "| 0.3 ± 0.14 (2 of 3) | 0.333 ± 0.14; 0.125 ± 0 (2 of 3) |" in line
    assert "0.8 ± 0.1 |" in line
    assert "| layers 13-15 | man | 0.5 | 0.5 | 13-15 | 0.9 | 0.25; 0.125 |" in written
    assert "seeds 0, 1, 2" in written
    assert "Distance is that in layers 10-15" in written


def test_attention_mass_on_each_of_two_references_is_in_the_table(tiny_checkpoint: Path) -> None:
    concepts = drawn_concepts(2, 0.4)
    two = Concept("man", *(c.references[0] for c in concepts), weight=2.5)
    ablation = Ablation(Checkpoint.open(tiny_checkpoint), PROMPT, [two], Options(steps=2), SIZE)
    regions = np.ones((2, 1, SIZE // 16, SIZE // 16), bool)
    seen = [Seen(mass=[[0.1, 0.3], [0.3, 0.5]], mass_everywhere=[[0.1, 0.1]] * 2, distance=[[0.2, 0.2]])] * 2
    rows = ablation._rows(BASE, seen, regions)
    assert rows[0].mass_by_reference == pytest.approx((0.2, 0.4))
    assert "| 0.6 | 0.2; 0.4 |" in text(rows, ["clip_t", "clip_i", "dino", "face"])


def test_one_setting_is_changed_at_a_time() -> None:
    variants = Sweeps().variants(BASE, (0, 1))
    assert len(variants) == len(set(variants)) == len(Sweeps().variants(BASE, (0, 1, 1)))
    assert {v.seed for v in variants} == {0, 1}
    for variant in variants:
        fields = ("alpha", "weight", "weight_mode", "semantic_guidance", "layers")
        changed = [name for name in fields if getattr(variant, name) != getattr(BASE, name)]
        assert len(changed) == (variant.changed != "as given")
    assert "layers 0-15" in {v.changed for v in variants}


def test_regions_are_counted(tiny: Ablation) -> None:
    regions = np.zeros((4, 2, 4, 4), bool)
    regions[0, 0, :2] = True  # used by step 1
    regions[1, 0, 0] = True
    regions[3, 0] = True
    man, hat = tiny._rows(replace(BASE, alpha=0.25), [], regions)
    # RBA: steps 2 and 3, which use the regions after steps 1 and 2.
    assert (man.coverage, man.last_coverage, man.steps_without_region) == (0.125, 1.0, 1)
    assert (hat.coverage, hat.last_coverage, hat.steps_without_region) == (0.0, 0.0, 4)
    assert tiny._rows(replace(BASE, alpha=1.0), [], regions)[0].coverage is None


def test_it_writes_table_sheet_and_pictures(tiny_checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    arguments = [str(tiny_checkpoint), "--out", str(out), "--steps", "2", "--size", str(SIZE), "--alphas", "1"]
    arguments += ["--weights", "0", "--weight-modes", "scale", "--semantic", "off", "--layers", "13-15"]
    assert ablation.main(arguments) == 0
    with (out / "ablation.csv").open() as file:
        rows = list(csv.DictReader(file))
    with (out / "pictures.csv").open() as file:
        pictures = list(csv.DictReader(file))
    # Four seeds, unless others are named.
    assert {r["seeds"] for r in rows} == {"4"}
    assert [r["seed"] for r in pictures[::2]] == ["0", "1", "2", "3"] * 6
    mine = [float(r["mass_everywhere"]) for r in pictures if (r["changed"], r["concept"]) == ("as given", "man")]
    assert len(set(mine)) == 4
    assert float(rows[0]["mass_everywhere"]) == pytest.approx(np.mean(mine))
    assert float(rows[0]["mass_everywhere_sd"]) == pytest.approx(np.std(mine, ddof=1))
    assert [r["changed"] for r in rows[::2]] == [
        "as given",
        "alpha 1",
        "weight 0",
        "weight mode scale",
        "semantic guidance off",
        "layers 13-15",
    ]
    assert {r["concept"] for r in rows} == {"man", "hat"}
    assert float(rows[4]["mass_everywhere"]) == 0 < float(rows[0]["mass_everywhere"])
    assert all(row["clip_t"] == "" for row in rows)
    written = (out / "ablation.md").read_text()
    assert "Missing columns: clip_t, clip_i, dino, face." in written
    assert "--face DIR" in written
    assert "on each reference" in written
    assert " ± " in written
    assert len(list(out.glob("0*.png"))) == 6 * 4
    # A column for each seed, a row for each setting.
    sheet = Image.open(out / "sheet.png")
    assert sheet.width == 4 * (256 + 8) + 8
    assert 6 * (256 + 2 * 20) < sheet.height < 7 * (256 + 2 * 20)  # with the names of the regions under each


MINIATURE = Path(__file__).parents[2] / "benchmarks" / "miniature" / "weights"
JOB = Path(__file__).parents[2] / "demo" / "portrait" / "job.json"
AS_GIVEN = ("--alphas", "", "--weights", "", "--weight-modes", "", "--semantic", "", "--layers", "")


def test_a_checkpoint_is_swept_at_its_own_size_whatever_its_autoencoder(tmp_path: Path) -> None:
    """The miniature's halves twice, Stable Diffusion's three times."""
    out = tmp_path / "out"
    assert ablation.main([str(MINIATURE), "--out", str(out), "--job", str(JOB), "--steps", "1", *AS_GIVEN]) == 0
    assert Image.open(out / "000.png").size == (64, 64)
    with (out / "pictures.csv").open() as file:
        seeds = [row["seed"] for row in csv.DictReader(file) if row["concept"] == "hat"]
    assert seeds == ["11", "12", "13", "14"], "the first is the job's"


def test_the_seeds_after_the_largest_begin_anew() -> None:
    assert ablation._seeds(2**64 - 2) == (2**64 - 2, 2**64 - 1, 0, 1)


@pytest.fixture
def clip(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    """A CLIP model of random weights, as a user's folder would be."""
    import transformers

    folder = tmp_path / "clip"
    transformers.AutoTokenizer.from_pretrained(tiny_checkpoint / "tokenizer").save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={**SMALL, "vocab_size": 49408},
        vision_config={**SMALL, **PIXELS},
        projection_dim=8,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    preparing = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(preparing))
    return folder


def saved(model: Any, folder: Path) -> Path:
    """A folder as a user would name it; for models of 32 x 32 pixels."""
    model.eval().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 32, "width": 32}}))
    return folder


def dino(folder: Path) -> Path:
    import transformers

    torch.manual_seed(1)
    return saved(transformers.Dinov2Model(transformers.Dinov2Config(**SMALL, **PIXELS)), folder)


def face(folder: Path, **how: Any) -> Path:
    import transformers

    torch.manual_seed(2)
    return saved(transformers.ViTModel(transformers.ViTConfig(**SMALL, **PIXELS), **how), folder)


def noise_image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (50, 70, 3), dtype=np.uint8))


def outputs_of(folder: Path, image: Image.Image) -> Any:
    """What the model itself says, loaded by its own class and not by `Encoder`."""
    import transformers

    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    how = {"add_pooling_layer": False} if name == "ViTModel" else {}
    model = getattr(transformers, name).from_pretrained(folder, **how)
    config = json.loads((folder / "preprocessor_config.json").read_text())
    with torch.no_grad():
        return model.eval()(pixel_values=torch.from_numpy(prepared_pixels(image, config)[None]))


def unit(vector: torch.Tensor) -> np.ndarray:
    return np.asarray(vector / vector.norm())


def test_encoders_of_the_user_fill_their_columns(clip: Path, tmp_path: Path) -> None:
    encoders = Encoders({"clip": clip, "dino": dino(tmp_path / "dino"), "face": None})
    assert encoders.missing == ["face"]
    one, other = noise_image(0), noise_image(1)
    scores = encoders.scores(one, "a man", {"man": one, "hat": other}, {"man": one, "hat": one})
    assert scores.keys() == {"man", "hat"}
    assert scores["man"].keys() == scores["hat"].keys() == {"clip_t", "clip_i", "dino"}
    for column, folder in (("clip_i", clip), ("dino", tmp_path / "dino")):
        assert scores["man"][column] == pytest.approx(1, abs=1e-5)
        assert scores["hat"][column] == pytest.approx(float(Encoder(folder).image(other) @ Encoder(folder).image(one)))
        assert scores["hat"][column] < 1 - 1e-6
    assert scores["hat"]["dino"] != pytest.approx(scores["hat"]["clip_i"], abs=1e-4)
    without = encoders.scores(one, "a man", {"man": one}, {"man": one, "hat": one})
    assert without["hat"].keys() == {"clip_t"}
    expected = float(Encoder(clip).image(one) @ Encoder(clip).text("a man"))
    assert scores["man"]["clip_t"] == scores["hat"]["clip_t"] == pytest.approx(expected)


def test_dino_is_its_pooled_output(tmp_path: Path) -> None:
    folder, image = dino(tmp_path / "dino"), noise_image(0)
    np.testing.assert_allclose(
        Encoder(folder).image(image), unit(outputs_of(folder, image).pooler_output[0]), atol=1e-6
    )


def test_a_face_embedder_without_pooler_is_its_first_tokens_state(tmp_path: Path) -> None:
    """transformers would make a pooler of random weights, another in each process."""
    folder, image = face(tmp_path / "face", add_pooling_layer=False), noise_image(0)
    state = outputs_of(folder, image).last_hidden_state
    np.testing.assert_allclose(Encoder(folder).image(image), unit(state[0, 0]), atol=1e-6)
    encoders = Encoders({"clip": None, "dino": None, "face": folder})
    assert encoders.missing == ["clip_t", "clip_i", "dino"]
    scores = encoders.scores(image, "a man", {"man": noise_image(1)}, {"man": image})
    expected = float(Encoder(folder).image(noise_image(1)) @ Encoder(folder).image(image))
    assert scores == {"man": {"face": pytest.approx(expected)}}


def test_a_face_embedder_that_returns_states_alone_and_one_on_a_grid(tmp_path: Path) -> None:
    import transformers

    image = noise_image(0)
    torch.manual_seed(3)
    tokens = saved(transformers.ViTMSNModel(transformers.ViTMSNConfig(**SMALL, **PIXELS)), tmp_path / "tokens")
    found = outputs_of(tokens, image)
    assert "pooler_output" not in found
    np.testing.assert_allclose(Encoder(tokens).image(image), unit(found.last_hidden_state[0, 0]), atol=1e-6)
    config = transformers.SegformerConfig(
        num_encoder_blocks=1, depths=[1], sr_ratios=[1], hidden_sizes=[8], num_attention_heads=[1], patch_sizes=[7],
        strides=[4], mlp_ratios=[1],
    )  # fmt: skip
    grid = saved(transformers.SegformerModel(config), tmp_path / "grid")
    found = outputs_of(grid, image)
    assert found.last_hidden_state.shape == (1, 8, 8, 8)
    np.testing.assert_allclose(Encoder(grid).image(image), unit(found.last_hidden_state[0].mean((1, 2))), atol=1e-6)


def test_a_face_embedder_in_16_bits_is_taken(tmp_path: Path) -> None:
    import transformers

    model = transformers.ViTModel(transformers.ViTConfig(**SMALL, **PIXELS)).half()
    vector = Encoder(saved(model, tmp_path / "half")).image(noise_image(0))
    assert vector.dtype == np.float32
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)


def test_an_encoder_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = dino(tmp_path / "dino")
    weights = load_file(folder / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks weights \(layernorm\.weight"):
        Encoder(folder)


def test_a_clip_folder_without_a_tokenizer_is_refused_by_name(clip: Path) -> None:
    for file in clip.glob("*token*"):
        file.unlink()
    with pytest.raises(InputError, match="tokenizer"):
        Encoder(clip).text("a man")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--weight-modes", "foo"], "weight_mode"),
        (["--semantic", "maybe"], "maybe"),
        (["--alphas", "7"], "alpha"),
        (["--weights", "nan"], "weight"),
        (["--seeds", ""], "seeds"),
    ],
)
def test_settings_that_are_none_are_refused_before_the_first_picture(
    tiny_checkpoint: Path, tmp_path: Path, capsys: Any, arguments: list[str], says: str
) -> None:
    assert ablation.main([str(tiny_checkpoint), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert says in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_pictures_are_prepared_as_the_folder_says() -> None:
    wide = Image.fromarray(np.full((20, 60, 3), 255, np.uint8))
    config = {"size": {"shortest_edge": 16}, "crop_size": {"height": 8, "width": 8}, "image_mean": [0.5] * 3}
    pixels = prepared_pixels(wide, {**config, "image_std": [0.25] * 3})
    assert pixels.shape == (3, 8, 8)
    np.testing.assert_allclose(pixels, 2.0)


def test_a_folder_that_is_no_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        Encoder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="cannot load"):
        Encoder(tmp_path)
