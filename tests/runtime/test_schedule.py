from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magicface_rt.errors import CheckpointError, OptionError
from magicface_rt.schedule import Schedule, is_region_step, reference_noise, target_noise
from tests.locations import DATA, ROOT

RECORDED = np.load(DATA / "unit" / "schedule.npz")
LENGTHS = (50, 20, 7)


def test_alphas_equal_the_recorded_ones_bit_by_bit() -> None:
    schedule = Schedule()
    np.testing.assert_array_equal(schedule.alphas_cumprod, RECORDED["alphas_cumprod_all"])
    assert schedule.alphas_cumprod.dtype == np.float32
    assert schedule.final_alpha == RECORDED["final_alpha_cumprod"]


@pytest.mark.parametrize("steps", LENGTHS)
def test_timesteps_equal_the_recorded_ones(steps: int) -> None:
    timesteps = Schedule().timesteps(steps)
    assert timesteps.dtype == np.int64
    np.testing.assert_array_equal(timesteps, RECORDED[f"timesteps_{steps}"])


def test_an_offset_of_zero_gives_the_timesteps_outside_the_pipeline() -> None:
    np.testing.assert_array_equal(Schedule(steps_offset=0).timesteps(50), RECORDED["timesteps_50_outside_pipeline"])


@pytest.mark.parametrize("steps", LENGTHS)
def test_steps_equal_the_recorded_ones(steps: int) -> None:
    x, eps = RECORDED[f"x_{steps}"], RECORDED[f"eps_{steps}"]
    moved = np.stack([keep * x + add * eps for keep, add in Schedule().step_coefficients(steps)])
    np.testing.assert_allclose(moved, RECORDED[f"step_{steps}"], rtol=0, atol=2e-6)


@pytest.mark.parametrize("steps", LENGTHS)
def test_noised_latents_equal_the_recorded_ones(steps: int) -> None:
    schedule, z, noise = Schedule(), RECORDED[f"z_{steps}"], RECORDED[f"noise_{steps}"]
    noised = np.stack([schedule.add_noise(z, noise, int(t)) for t in schedule.timesteps(steps)])
    assert noised.dtype == np.float32
    np.testing.assert_allclose(noised, RECORDED[f"add_noise_{steps}"], rtol=0, atol=2e-6)


def test_rows_may_have_timesteps_of_their_own() -> None:
    schedule, z, noise = Schedule(), RECORDED["z_7"], RECORDED["noise_7"]
    together = schedule.add_noise(z, noise, np.array([853, 1]))
    np.testing.assert_array_equal(together[:1], schedule.add_noise(z[:1], noise[:1], 853))
    np.testing.assert_array_equal(together[1:], schedule.add_noise(z[1:], noise[1:], 1))


@given(
    steps=st.integers(1, 999),
    offset=st.integers(0, 1),
    to_one=st.booleans(),
    kind=st.sampled_from(["scaled_linear", "linear"]),
)
def test_coefficients_follow_the_formula_in_float64(steps: int, offset: int, to_one: bool, kind: Any) -> None:
    schedule = Schedule(steps_offset=offset, set_alpha_to_one=to_one, beta_schedule=kind)
    coefficients = schedule.step_coefficients(steps)
    assert coefficients.shape == (steps, 2)
    assert coefficients.dtype == np.float32
    alphas = [float(a) for a in schedule.alphas_cumprod]
    stride = 1000 // steps
    for i in {0, steps // 2, steps - 1}:
        t = (steps - 1 - i) * stride + offset
        a = alphas[t]
        a_next = alphas[t - stride] if t >= stride else (1.0 if to_one else alphas[0])
        x, eps = 0.7, -1.3
        clean = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
        expected = math.sqrt(a_next) * clean + math.sqrt(1 - a_next) * eps
        assert coefficients[i] @ np.array([x, eps]) == pytest.approx(expected, rel=2e-6, abs=2e-6)


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.0, True, "50", None, 10**30])
def test_impossible_numbers_of_steps_are_refused(steps: Any) -> None:
    with pytest.raises(OptionError, match="steps is"):
        Schedule().timesteps(steps)


def test_steps_that_would_start_beyond_the_training_are_refused() -> None:
    with pytest.raises(OptionError, match="at most 999 steps"):
        Schedule().timesteps(1000)
    assert Schedule(steps_offset=0).timesteps(1000)[0] == 999


def test_the_page_of_requests_has_the_first_timesteps() -> None:
    page = (ROOT / "docs" / "requests.md").read_text(encoding="utf-8")
    header, _, values = page[page.index("| T |") :].splitlines()[:3]
    numbers, firsts = ([int(cell) for cell in line.strip("|").split("|")[1:]] for line in (header, values))
    assert firsts == [Schedule().timesteps(steps)[0] for steps in numbers]
    assert len(numbers) == 10
    lowest = min(Schedule().timesteps(steps)[0] for steps in range(10, 201))
    assert f"With 10 to 200 steps the drawing begins at\ntimestep {lowest} or above" in page


@pytest.mark.parametrize("timestep", [-1, 1000, 1.5, np.array([3, 1000]), np.array([-1, 3])])
def test_timesteps_that_do_not_exist_are_refused(timestep: Any) -> None:
    z = np.zeros((2, 4, 2, 2), np.float32)
    with pytest.raises(OptionError, match="timestep is"):
        Schedule().add_noise(z, z, timestep)


def test_config_comes_back_equal() -> None:
    schedule = Schedule(num_train_timesteps=500, beta_start=0.001, beta_schedule="linear", steps_offset=0)
    assert Schedule.from_config(schedule.to_config()) == schedule


def test_the_config_of_stable_diffusion_gives_the_defaults() -> None:
    config = {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.6.0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
    }
    assert Schedule.from_config(config) == Schedule()


def test_an_offset_in_the_config_of_a_bundle_is_used_and_a_missing_one_is_the_pipelines() -> None:
    assert Schedule.from_config({"steps_offset": 0}).steps_offset == 0
    assert Schedule.from_config({}).steps_offset == 1


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"prediction_type": "v_prediction"}, "v_prediction"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "squaredcos_cap_v2"),
        ({"beta_start": float("nan")}, "beta_start"),
        ({"beta_end": "0.012"}, "beta_end"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"steps_offset": -1}, "steps_offset"),
        ({"set_alpha_to_one": "no"}, "set_alpha_to_one"),
        ({"num_train_timesteps": 1_000_001}, "num_train_timesteps is 1000001"),
        ({"num_train_timesteps": 10.0}, "num_train_timesteps is 10.0"),
        ({"num_train_timesteps": 10, "steps_offset": 10}, "steps_offset is 10, expected a whole number from 0 to 9"),
        ({"steps_offset": True}, "steps_offset is True"),
        ({"beta_start": 0}, "beta_start is 0,"),
        ({"beta_start": 1e-9}, "beta_start is 1e-09, expected a number from 1e-07 up, below 1"),
        ({"beta_end": 1}, "beta_end is 1,"),
        ({"beta_end": True}, "beta_end is True"),
    ],
)
def test_configs_that_make_no_such_schedule_are_refused_by_name(config: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        Schedule.from_config(config)


@pytest.mark.parametrize(
    ("steps", "alpha", "first"),
    [(50, 0.4, 21), (20, 0.4, 9), (100, 0.29, 30), (8, 0.0, 1), (8, -0.125, 1), (7, 0.4, 3)],
)
def test_the_second_stage_begins_after_alpha_of_the_steps(steps: int, alpha: float, first: int) -> None:
    assert [is_region_step(i, steps, alpha) for i in range(steps)] == [i >= first for i in range(steps)]


@given(steps=st.integers(1, 1000))
def test_alpha_one_is_the_first_stage_throughout(steps: int) -> None:
    assert not any(is_region_step(i, steps, 1.0) for i in range(steps))


@given(inject=st.integers(0, 1000), steps=st.integers(1, 1000))
def test_alpha_as_a_quotient_gives_back_the_step_it_was_made_of(inject: int, steps: int) -> None:
    assert [is_region_step(i, steps, inject / steps) for i in range(steps)] == [i > inject for i in range(steps)]


def test_noise_is_what_it_always_was() -> None:
    shape = (1, 4, 2, 2)
    np.testing.assert_array_equal(
        target_noise(7, 0, shape).ravel()[:4],
        np.array([-0.29333900, 1.70383060, 1.53919180, 0.63675386], np.float32),
    )
    np.testing.assert_array_equal(
        reference_noise(0, 0, shape).ravel()[:4],
        np.array([-2.23901180, 0.94217896, -1.18732330, -0.82684225], np.float32),
    )


def test_every_draw_has_a_stream_of_its_own() -> None:
    draws = [target_noise(s, k, (64,)) for s in (0, 1, 2**64 - 1) for k in (0, 1)]
    draws += [reference_noise(s, i, (64,)) for s in (0, 1, 2**64 - 1) for i in (0, 1)]
    assert len({draw.tobytes() for draw in draws}) == len(draws)
    assert all(draw.dtype == np.float32 for draw in draws)


def test_noise_is_normal() -> None:
    noise = target_noise(3, 0, (4, 64, 64))
    assert abs(noise.mean()) < 0.03
    assert noise.std() == pytest.approx(1, abs=0.02)


def test_a_larger_draw_begins_with_the_smaller_one() -> None:
    np.testing.assert_array_equal(reference_noise(5, 2, (3, 4, 8, 8))[:1], reference_noise(5, 2, (1, 4, 8, 8)))


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, None])
def test_seeds_out_of_range_are_refused(seed: Any) -> None:
    with pytest.raises(OptionError, match="seed is"):
        target_noise(seed, 0, (1,))
    with pytest.raises(OptionError, match="reference_seed is"):
        reference_noise(seed, 0, (1,))


@pytest.mark.parametrize("stream", [-1, 2**63])
def test_streams_out_of_range_are_refused(stream: int) -> None:
    with pytest.raises(OptionError, match="image_index"):
        target_noise(0, stream, (1,))
    with pytest.raises(OptionError, match="step"):
        reference_noise(0, stream, (1,))


def test_the_ends_of_the_ranges_make_schedules() -> None:
    for config in (
        {"num_train_timesteps": 1_000_000},
        {"num_train_timesteps": 10, "steps_offset": 9},
        {"beta_start": 1e-7, "beta_end": 0.999},
    ):
        assert Schedule.from_config(config) == Schedule(**config)  # type: ignore[arg-type]


def test_a_schedule_of_one_timestep() -> None:
    schedule = Schedule(num_train_timesteps=1, steps_offset=0)
    np.testing.assert_array_equal(schedule.alphas_cumprod, np.float32(1) - np.float32(0.00085**0.5) ** 2)
    assert schedule.timesteps(1).tolist() == [0]


def test_keys_that_are_null_are_as_if_absent() -> None:
    assert Schedule.from_config({"beta_start": None, "steps_offset": None, "prediction_type": "epsilon"}) == Schedule()


def test_the_config_is_one_of_diffusers() -> None:
    assert Schedule().to_config() == {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
        "clip_sample": False,
    }


def test_a_schedule_cannot_be_changed() -> None:
    schedule = Schedule()
    with pytest.raises(FrozenInstanceError):
        schedule.steps_offset = 0  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        schedule.alphas_cumprod[0] = 1
    with pytest.raises(TypeError):
        Schedule(500)  # type: ignore[misc]


@pytest.mark.parametrize("to_one", [False, True])
def test_the_step_to_timestep_0_and_the_one_after_it(to_one: bool) -> None:
    """Timesteps 500 and 0: the first leads to abar[0], which is a trained one, and the second beyond it."""
    schedule = Schedule(steps_offset=0, set_alpha_to_one=to_one)
    a500, a0 = (float(schedule.alphas_cumprod[t]) for t in (500, 0))
    (keep, _), (last, add) = schedule.step_coefficients(2)
    assert keep == pytest.approx(math.sqrt(a0 / a500), rel=1e-6)
    assert last == pytest.approx(math.sqrt((1 if to_one else a0) / a0), rel=1e-6)
    assert add == pytest.approx(-math.sqrt((1 - a0) / a0) if to_one else 0, abs=1e-6)


def test_noise_at_timestep_0_and_on_nothing() -> None:
    schedule, ones = Schedule(), np.ones((1, 4, 2, 2), np.float32)
    a0 = float(schedule.alphas_cumprod[0])
    np.testing.assert_allclose(schedule.add_noise(ones, ones, 0), math.sqrt(a0) + math.sqrt(1 - a0), rtol=1e-6)
    assert schedule.add_noise(ones[:0], ones[:0], np.zeros(0, np.int64)).shape == (0, 4, 2, 2)
    np.testing.assert_array_equal(
        schedule.add_noise(ones, ones, np.array([3], np.uint8)), schedule.add_noise(ones, ones, 3)
    )


def test_the_last_streams_are_streams() -> None:
    last = target_noise(0, 2**63 - 1, (8,)), reference_noise(0, 2**63 - 1, (8,)), reference_noise(0, 0, (8,))
    assert len({draw.tobytes() for draw in last}) == 3


@pytest.mark.parametrize("count", [2, 3, 5, 33, 100, 999, 1001])
def test_betas_of_any_number_of_timesteps_are_torchs_bit_by_bit(count: int) -> None:
    torch = pytest.importorskip("torch")
    for start, end in ((0.00085, 0.012), (0.2, 0.7), (0.3, 0.9)):
        schedule = Schedule(
            num_train_timesteps=count, beta_start=start, beta_end=end, beta_schedule="linear", steps_offset=0
        )
        betas = torch.linspace(start, end, count, dtype=torch.float32)
        np.testing.assert_array_equal(schedule.alphas_cumprod, torch.cumprod(1 - betas, 0).numpy())
