"""The PyTorch reference, part by part against recorded values, and as a whole on sizes that no recording has."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from magicface_rt.errors import CheckpointError, InputError
from magicface_rt.export.recordings import load_unet
from magicface_rt.export.reference import (
    LayerMaps,
    MagicFaceReference,
    StepInputs,
    attention_map,
    ddim_step,
    generate_latents,
    guidance_rate,
    guide,
    injected_attention,
    join_heads,
    nearest_grid,
    noise_references,
    reference_access,
    reference_bias,
    segment,
    smooth,
    smoothing_kernel,
    stages_of,
    transformer_blocks,
)
from magicface_rt.schedule import Schedule
from tests.locations import DATA, GOLDENS

RECORDINGS = DATA / "recordings"

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def unit_files(pattern: str) -> list:
    """Recorded units of this repository, and of the larger set where it lies beside the repository."""
    found = [pytest.param(path, id=path.stem) for path in sorted((RECORDINGS / "unit").glob(pattern))]
    more = [pytest.param(path, id=f"shared-{path.stem}") for path in sorted((GOLDENS / "unit").glob(pattern))]
    absent = pytest.param(None, marks=pytest.mark.skip(reason=f"{GOLDENS} is not there"), id="shared")
    return found + (more or [absent])


def arrays(path: Path) -> dict[str, np.ndarray]:
    """An .npz with its float16 arrays, which hold float32 values exactly, as float32."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name].astype(np.float32) if file[name].dtype == np.float16 else file[name] for name in file}


def close(found: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found.numpy(), expected, **TOLERANCE)


@pytest.mark.parametrize("path", unit_files("gaussian.npz"))
def test_smoothing(path):
    recorded = arrays(path)
    close(smoothing_kernel(), recorded["kernel"])
    for name in recorded:
        if name.startswith("in_"):
            close(smooth(torch.from_numpy(recorded[name])), recorded["out_" + name[3:]])


@pytest.mark.parametrize("path", unit_files("ref_mask.npz"))
def test_masks_on_layer_grids(path):
    recorded = arrays(path)
    for name in recorded:
        if name.startswith("out_"):
            mask = torch.from_numpy(recorded["in_" + name[4:].rpartition("_")[0]])[0, 0] > 0
            close(nearest_grid(mask, *recorded[name].shape) * 2.5, recorded[name])


@pytest.mark.parametrize("path", unit_files("attention_*.npz"))
def test_attention(path):
    recorded = arrays(path)
    q, k, v = (torch.from_numpy(recorded[name]) for name in ("q", "k", "v"))  # (2, 1+R, heads, n, d)
    side, scale, label = math.isqrt(q.shape[3]), float(recorded["scale"]), recorded["label"]
    regions = None
    if label.ndim:
        regions = torch.stack([torch.from_numpy(label == token) for token in recorded["ref_index"]])
    stage = "rba" if "_rba_" in path.stem or path.stem.endswith("switch_after") else "rsa"

    out = attention_map(q, k, scale) @ v
    access = reference_access(stage, regions, range(len(recorded["masks"])), side, side)
    masks, weights = torch.from_numpy(recorded["masks"]) > 0, torch.from_numpy(recorded["weights"])
    bias, factor = reference_bias(masks, weights, access, side, side)
    out[1, 0] = injected_attention(q[1, 0], k[1, 0], v[1, 0], k[1, 1:], v[1, 1:], bias=bias, factor=factor, scale=scale)
    close(join_heads(out.flatten(0, 1)), recorded["out"])


@pytest.mark.parametrize("path", unit_files("segment_*.npz"))
def test_segmentation(path):
    recorded = arrays(path)
    layers = []
    for name in recorded:
        if name.startswith("self_"):
            side = math.isqrt(recorded[name].shape[1])
            cross = recorded["cross_" + name.removeprefix("self_")]
            layers.append(LayerMaps(torch.from_numpy(recorded[name]), torch.from_numpy(cross), side, side))
    rows, cols = recorded["score"].shape[1:]
    tokens = [(int(token),) for token in recorded["ref_index"]]
    found = segment(layers, rows=rows, cols=cols, tokens=tokens, ca_scale=float(recorded["ca_scale"]))
    close(found.score, recorded["score"])
    close(found.foreground_score, recorded["fore_score"])
    assert np.array_equal(found.owners, recorded["ca_mask"])
    assert np.array_equal(found.foreground[None], recorded["fore_mask"])
    assert np.array_equal(found.regions, recorded["ca_mask"][recorded["ref_index"]])


@pytest.mark.parametrize("path", unit_files("rate_*.npz"))
def test_guidance_rate(path):
    recorded = arrays(path)
    eps_u, eps_c = torch.from_numpy(recorded["eps_u"]), torch.from_numpy(recorded["eps_c"])
    owners = torch.arange(77)[:, None, None] == torch.from_numpy(recorded["label"])
    guidance = float(recorded["guidance"])
    rate = guidance_rate(eps_u, eps_c, owners=owners, foreground=torch.from_numpy(recorded["fore"]), guidance=guidance)
    close(rate, recorded["rate"])
    close(guide(eps_u, eps_c, rate, guidance), recorded["guided"])


@pytest.mark.parametrize("path", unit_files("schedule.npz"))
@pytest.mark.parametrize("steps", [50, 20, 7])
def test_noise_and_ddim_step(path, steps):
    if path is None or path.parent.parent == RECORDINGS:
        pytest.skip("not among the recordings of this repository")
    recorded = arrays(path)
    schedule = Schedule()
    z0, noise, x, eps = (torch.from_numpy(recorded[f"{name}_{steps}"]) for name in ("z", "noise", "x", "eps"))
    for i, timestep in enumerate(schedule.timesteps(steps).tolist()):
        close(noise_references(schedule, z0, noise, timestep), recorded[f"add_noise_{steps}"][i])
        close(ddim_step(x, eps, schedule.step_coefficients(steps)[i]), recorded[f"step_{steps}"][i])


def test_rba_access_prefers_the_later_concept_and_ignores_concepts_without_reference():
    everywhere = torch.ones(1, 2, 2, dtype=torch.bool)
    regions = everywhere.repeat(3, 1, 1)
    assert reference_access("rba", regions, (0, 1, 0), 2, 2).tolist() == [[False, True, False]] * 4
    assert reference_access("rba", regions, (0, 0, -1), 2, 2).tolist() == [[True, True, False]] * 4
    assert not reference_access("rba", ~regions, (0, 1, 2), 2, 2).any()


def test_rba_without_regions_is_refused():
    with pytest.raises(InputError, match="regions"):
        reference_access("rba", None, (0,), 2, 2)


@pytest.mark.parametrize("weight_mode", ["bias", "scale"])
@pytest.mark.parametrize("nothing", ["weight 0", "empty mask", "no access"])
def test_a_reference_that_is_not_seen_leaves_plain_attention(weight_mode, nothing):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 8)  # (2 heads, 2x2 tokens, 8)
    k_ref, v_ref = torch.randn(2, 1, 2, 4, 8)
    mask = torch.full((1, 128, 128), nothing != "empty mask")
    weight = torch.tensor([0.0 if nothing == "weight 0" else 2.0])
    access = torch.full((4, 1), nothing != "no access")
    bias, factor = reference_bias(mask, weight, access, 2, 2, weight_mode)
    found = injected_attention(q, k, v, k_ref, v_ref, bias=bias, factor=factor, scale=0.3)
    torch.testing.assert_close(found, attention_map(q, k, 0.3) @ v)


def test_weight_mode_scale_multiplies_the_logits_of_seen_keys():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 8)
    k_ref, v_ref = torch.randn(2, 1, 2, 4, 8)
    mask = torch.zeros(1, 2, 2, dtype=torch.bool)
    mask[0, 0] = True  # tokens 0 and 1
    bias, factor = reference_bias(mask, torch.tensor([2.5]), torch.ones(4, 1, dtype=torch.bool), 2, 2, "scale")
    found = injected_attention(q, k, v, k_ref, v_ref, bias=bias, factor=factor, scale=0.3)
    keys = torch.cat([k, 2.5 * k_ref[0, :, :2]], dim=1)
    values = torch.cat([v, v_ref[0, :, :2]], dim=1)
    torch.testing.assert_close(found, attention_map(q, keys, 0.3) @ values)


def test_stages_keep_step_0_and_the_step_at_alpha_in_the_first():
    assert stages_of(5, 0.4) == ("rsa", "rsa", "rsa", "rba", "rba")
    assert stages_of(3, 0.0) == ("rsa", "rba", "rba")
    assert stages_of(3, 1.0) == ("rsa", "rsa", "rsa")


@pytest.fixture(scope="module")
def reference() -> MagicFaceReference:
    return MagicFaceReference(load_unet(RECORDINGS / "models" / "sd15-mini"))


def step_inputs(reference: MagicFaceReference, h: int, w: int, references: int = 3, **changes) -> StepInputs:
    """A step with two concepts: the first has two tokens and references 0 and 2, the second reference 1."""
    generator = torch.Generator().manual_seed(3)
    width = reference.unet.config.cross_attention_dim
    masks = torch.zeros(references, 128, 128, dtype=torch.bool)
    masks[:, 20:100, 30:90] = True
    regions = torch.zeros(2, h // 2, w // 2, dtype=torch.bool)
    regions[0, : h // 4], regions[1, h // 4 :, : w // 4] = True, True
    inputs = StepInputs(
        latents=torch.randn(1, 4, h, w, generator=generator),
        timestep=501,
        text=torch.randn(2, 77, width, generator=generator),
        references=torch.randn(references, 4, h, w, generator=generator),
        reference_text=torch.randn(references, 77, width, generator=generator),
        reference_masks=masks,
        weights=torch.full((references,), 2.0),
        concept_of_reference=(0, 1, 0)[:references],
        tokens=((3, 4), (6,)),
        stage="rba",
        regions=regions,
        ca_scale=0.6,
        guidance=7.5,
        coefficients=(1.02, -0.05),
    )
    return replace(inputs, **changes)


def test_latents_need_not_be_square_nor_of_the_configured_size(reference):
    found = reference.step(step_inputs(reference, 16, 24))
    assert found.latents.shape == (1, 4, 16, 24)
    assert found.rate.shape == (16, 24)
    assert found.token_label.shape == (8, 12)
    assert found.regions.shape == (2, 8, 12)
    assert found.latents.isfinite().all()


def test_regions_are_the_cells_owned_by_any_token_of_the_concept(reference):
    found = reference.step(step_inputs(reference, 16, 16, ca_scale=0.9))
    label = found.token_label
    assert torch.equal(found.regions[0], (label == 3) | (label == 4))
    assert torch.equal(found.regions[1], label == 6)


def test_references_change_the_conditional_row_only(reference):
    off = reference.step(step_inputs(reference, 16, 16, stage="off"))
    none = reference.step(step_inputs(reference, 16, 16, references=0, stage="rsa"))
    for stage in ("rsa", "rba"):
        found = reference.step(step_inputs(reference, 16, 16, stage=stage))
        torch.testing.assert_close(found.eps_u, off.eps_u)
        assert (found.eps_c - off.eps_c).norm() > 1e-3 * off.eps_c.norm()
    torch.testing.assert_close(none.eps_c, off.eps_c)


def test_concepts_without_tokens_serve_the_first_stage_only(reference):
    tokens = ((), ())
    off = reference.step(step_inputs(reference, 16, 16, stage="off", tokens=tokens))
    rsa = reference.step(step_inputs(reference, 16, 16, stage="rsa", tokens=tokens))
    rba = reference.step(step_inputs(reference, 16, 16, stage="rba", tokens=tokens, regions=off.regions))
    assert not off.regions.any()
    assert (rsa.eps_c - off.eps_c).norm() > 1e-3 * off.eps_c.norm()
    torch.testing.assert_close(rba.eps_c, off.eps_c)


def test_semantic_guidance_off_gives_plain_guidance(reference):
    found = reference.step(step_inputs(reference, 16, 16, semantic_guidance=False))
    assert torch.equal(found.rate, torch.ones(16, 16))
    torch.testing.assert_close(found.eps_guided, found.eps_u + 7.5 * (found.eps_c - found.eps_u))


def test_the_loop_hands_latents_and_regions_on(reference):
    inputs = step_inputs(reference, 16, 16)
    noise = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    schedule = Schedule()
    first, second = generate_latents(
        reference,
        x_T=inputs.latents,
        text=inputs.text,
        z0=inputs.references,
        noise=noise,
        reference_text=inputs.reference_text,
        reference_masks=inputs.reference_masks,
        weights=inputs.weights,
        concept_of_reference=inputs.concept_of_reference,
        tokens=inputs.tokens,
        schedule=schedule,
        ca_scale=0.6,
        alpha=0.0,
    )
    again = reference.step(
        replace(
            inputs,
            latents=first.latents,
            timestep=1,
            references=noise_references(schedule, inputs.references, noise[1], 1),
            regions=first.regions,
            coefficients=schedule.step_coefficients(2)[1].tolist(),
        )
    )
    torch.testing.assert_close(second.latents, again.latents)


def test_sizes_that_the_unet_cannot_halve_are_refused(reference):
    with pytest.raises(InputError, match="multiples of 8"):
        step_inputs(reference, 20, 16)


def test_unequal_numbers_of_reference_inputs_are_refused(reference):
    with pytest.raises(InputError, match="expected equal numbers"):
        step_inputs(reference, 16, 16, weights=torch.ones(2))


def test_layers_that_do_not_exist_are_refused(reference):
    with pytest.raises(InputError, match="16"):
        MagicFaceReference(reference.unet, injection_layers=(15, 16))


def test_another_layout_is_refused():
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    with pytest.raises(CheckpointError, match="Stable Diffusion"):
        transformer_blocks(unet)
