"""Targets: the files that come with the package, files of one's own, and the one that a GPU gets."""

from __future__ import annotations

from pathlib import Path

import pytest
from target_files import OWN

from magicface_rt.engines import targets
from magicface_rt.engines.targets import RTX_CAPABILITIES, Target, load_target, target_for, target_names
from magicface_rt.errors import TargetError


def own(folder: Path, text: str = OWN) -> Target:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return load_target(path)


def test_the_targets_that_come_with_the_package() -> None:
    assert set(target_names()) == {"rtx-portable", "turing", "a100", "h100", "l4", "rtx-4090", "orin"}
    for name in target_names():
        target = load_target(name)
        assert target.name == name
        assert target.scratch_limit("denoise_step") <= target.scratch_limit("vae_decoder")
        assert not target.builder.tf32  # fp32 stays fp32 unless somebody wants otherwise
        assert not target.builder.parity_outputs


def test_portable_plans_are_for_every_capability_but_turing() -> None:
    assert {*load_target("rtx-portable").compute_capabilities, "7.5"} == set(RTX_CAPABILITIES)
    assert load_target("turing").compute_capabilities == ("7.5",)
    assert "bfloat16" not in load_target("turing").precisions


def test_a_step_of_the_portable_target_may_take_300_mb() -> None:
    assert load_target("rtx-portable").scratch_limit("denoise_step") <= 300 * 10**6


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    target = own(tmp_path)
    assert (target.name, target.images.maximum, target.references.maximum, target.full_masks) == ("mine", 2, 4, 2)
    assert target.scratch_limit("denoise_step") == 100 << 20
    assert target.scratch_limit("text_encoder") == 200 << 20
    assert target.builder.tf32
    assert target.with_parity_outputs().builder.parity_outputs
    assert target.with_parity_outputs().builder.tf32


@pytest.mark.parametrize(
    ("found", "instead", "said"),
    [
        ('"tensorrt-rtx"', '"tensorflow"', "flavour 'tensorflow' is not known"),
        ('["8.6"]', '["9.0"]', "does not offer compute capability .*9.0.*Use flavour tensorrt"),
        ('["8.6"]', '["10.0"]', "does not offer compute capability .*10.0"),
        ('["8.6"]', '["7.5", "8.6"]', "7.5 stands beside other"),
        ('["8.6"]', '"8.6"', "compute_capabilities is '8.6', expected a list"),
        ('["float16"]', "[]", "precisions is"),
        ("full_masks = 2", "full_masks = 0", "full_masks is 0"),
        ("full_masks = 2", "", "missing .'full_masks'"),
        ("full_masks = 2", "full_masks = 2\ncolour = 3", "unknown .'colour'"),
        ("optimum = 1\nmaximum = 2", "optimum = 3\nmaximum = 2", "1 <= optimum <= maximum"),
        ("optimum = 1\nmaximum = 2", "optimum = 1", "1 <= optimum <= maximum"),
        ("others = 200", "", "expected whole MiB"),
        ("others = 200", 'others = "much"', "expected whole MiB"),
        ("tf32 = true", 'tf32 = "yes"', "builder.*tf32 .bool."),
        ("tf32 = true", "fast = true", "builder.*expected"),
        ("tf32 = true", "workspace_mib = -5", "workspace_mib is -5, expected a whole number from 1"),
        ("tf32 = true", "optimization_level = 99", "optimization_level is 99, expected 0 to 5"),
        ("tf32 = true", 'hardware_compatibility = "ampere_plus"', "is 'ampere_plus', expected none for tensorrt-rtx"),
        ('"tensorrt-rtx"', '"tensorrt"', "no hardware_compatibility, expected none or ampere_plus or same_compute"),
        ('["float16"]', '["floof"]', "precisions holds 'floof'"),
        ('["8.6"]', '["ninety"]', "compute_capabilities holds 'ninety'"),
        ("denoise_step = 100", "denoize_step = 100", "expected whole MiB"),
        ("[builder]", "[builder", "cannot be read as TOML"),
    ],
)
def test_a_wrong_file_is_told_what_was_expected(tmp_path: Path, found: str, instead: str, said: str) -> None:
    assert found in OWN
    with pytest.raises(TargetError, match=said):
        own(tmp_path, OWN.replace(found, instead))


def test_an_unknown_target_is_told_the_known_ones() -> None:
    with pytest.raises(TargetError, match=r"'rtx-5090' is not known; there are .*rtx-4090"):
        load_target("rtx-5090")
    with pytest.raises(TargetError, match="cannot be read"):
        load_target("nowhere/mine.toml")
    with pytest.raises(TargetError, match="not known"):
        load_target("../targets/h100")


def test_a_target_of_the_other_flavour_is_refused() -> None:
    with pytest.raises(TargetError, match=r"h100 is for tensorrt, and tensorrt-rtx was asked for.*rtx-4090"):
        load_target("h100", "tensorrt-rtx")


@pytest.mark.parametrize(
    ("flavour", "capability", "name"),
    [
        ("tensorrt-rtx", None, "rtx-portable"),
        ("tensorrt-rtx", "7.5", "turing"),
        ("tensorrt-rtx", "8.9", "rtx-4090"),
        ("tensorrt-rtx", "8.6", "rtx-portable"),
        ("tensorrt", "9.0", "h100"),
        ("tensorrt", "8.7", "orin"),
    ],
)
def test_the_target_of_a_gpu_is_the_narrowest_that_names_it(flavour: str, capability: str | None, name: str) -> None:
    assert target_for(flavour, capability).name == name


def test_a_gpu_without_target_is_told_the_other_flavour() -> None:
    with pytest.raises(
        TargetError, match=r"tensorrt-rtx has no target for compute capability 9.0. Use --flavour tensorrt"
    ):
        target_for("tensorrt-rtx", "9.0")
    with pytest.raises(TargetError, match=r"no target for compute capability 6.1. Write a target file"):
        target_for("tensorrt-rtx", "6.1")
    with pytest.raises(TargetError, match="builds for the GPU that it runs on"):
        target_for("tensorrt", None)


def test_a_bundle_of_another_precision_is_refused() -> None:
    load_target("turing").check_precision("float16")
    with pytest.raises(TargetError, match="turing: the bundle is in bfloat16, expected float16 or float32"):
        load_target("turing").check_precision("bfloat16")


def test_adding_a_gpu_is_adding_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "FOLDER", tmp_path)
    (tmp_path / "rtx-3060.toml").write_text(OWN, encoding="utf-8")
    assert target_names() == ["rtx-3060"]
    assert target_for("tensorrt-rtx", "8.6").name == "rtx-3060"
