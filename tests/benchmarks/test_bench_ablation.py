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
from benchmarks.encoders import Encoder, Encoders, prepared_pixels
from benchmarks.sweeping import Ablation, Sweeps, Variant
from benchmarks.watching import WatchedReference
from benchmarks.workload import PROMPT, drawn_concepts
from magicface_rt import Options
from magicface_rt.errors import InputError
from magicface_rt.export.checkpoint import Checkpoint
from magicface_rt.export.reference import MagicFaceReference, StepInputs

BASE = Variant(0.4, None, "bias", True, (10, 11, 12, 13, 14, 15), 0)
SIZE = 128


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    ((same, other),) = reference.seen.distance
    assert same == pytest.approx(0, abs=1e-5)
    assert other is not None
    assert other > 1e-3


def test_one_setting_is_changed_at_a_time() -> None:
    variants = Sweeps().variants(BASE, (0, 1))
    assert len(variants) == len(set(variants))
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
    text = (out / "ablation.md").read_text()
    assert "Missing columns: clip_t, clip_i, dino, face." in text
    assert "--face DIR" in text
    assert len(list(out.glob("0*.png"))) == 6
    assert Image.open(out / "sheet.png").width > 1000


@pytest.fixture
def clip(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    """A CLIP model of random weights, as a user's folder would be."""
    import transformers

    folder = tmp_path / "clip"
    transformers.AutoTokenizer.from_pretrained(tiny_checkpoint / "tokenizer").save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 49408},
        vision_config={**small, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    preparing = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(preparing))
    return folder


def test_encoders_of_the_user_fill_their_columns(clip: Path) -> None:
    encoders = Encoders({"clip": clip, "dino": clip, "face": None})
    assert encoders.missing == ["face"]
    rng = np.random.default_rng(0)
    one, other = (Image.fromarray(rng.integers(0, 255, (50, 70, 3), dtype=np.uint8)) for _ in range(2))
    scores = encoders.scores(one, "a man", {"man": one, "hat": other}, {"man": one, "hat": one})
    assert scores.keys() == {"man", "hat"}
    assert scores["man"].keys() == scores["hat"].keys() == {"clip_t", "clip_i", "dino"}
    assert scores["man"]["clip_i"] == pytest.approx(1, abs=1e-5)
    assert scores["hat"]["clip_i"] < 1 - 1e-6
    without = encoders.scores(one, "a man", {"man": one}, {"man": one, "hat": one})
    assert without["hat"].keys() == {"clip_t"}
    expected = float(Encoder(clip).image(one) @ Encoder(clip).text("a man"))
    assert scores["man"]["clip_t"] == scores["hat"]["clip_t"] == pytest.approx(expected)


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
