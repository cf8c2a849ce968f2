"""The DDIM schedule, the two-stage switch, and all random numbers.

DDIM with eta 0, epsilon prediction, no clipping and "leading" spacing, whatever scheduler class a checkpoint names:

    beta_j   = linspace(sqrt(beta_start), sqrt(beta_end), N)_j ** 2        ("scaled_linear"; "linear" has no roots)
    abar     = cumprod(1 - beta)
    t_i      = (T - 1 - i) * floor(N / T) + steps_offset                   i = 0..T-1
    x_t      = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise                   (`Schedule.add_noise`)
    x_{i+1}  = c_i0 x_i + c_i1 eps_i                                       (`Schedule.step_coefficients`)

where, with a = abar[t_i] and a' = abar[t_i - floor(N / T)] (`final_alpha` when that timestep is negative),
c_i0 = sqrt(a' / a) and c_i1 = sqrt(1 - a') - sqrt(a' / a) sqrt(1 - a).

Random numbers come from numpy's Philox4x64 and nothing else. A draw is named by a 128-bit key of two 64-bit words:

    target, image number k of a request     key = (seed, k)
    references, loop step i                 key = (reference_seed, 2**63 | i)

Each draw starts its own counter at 0 and fills its array in C order with float32 normals, so a picture depends neither
on the backend, nor on the batch it was made in, nor on the number of references.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .computed import ComputedOnce
from .errors import CheckpointError, OptionError
from .values.plain_numbers import as_float
from .values.shown import shown

__all__ = ["Schedule", "is_region_step", "reference_noise", "target_noise"]

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]

_REFERENCE_STREAMS = 2**63  # the upper half of the key's second word; target images use the lower half
_BETA_SCHEDULES = ("scaled_linear", "linear")

LEAST_BETA = 1e-7
"""The schedule is computed in float32, in which 1 minus a smaller beta may be 1: a timestep without noise."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The noise schedule of a checkpoint; the defaults are Stable Diffusion 1.5's.

    Raises `CheckpointError` for values that do not make a schedule: they come from a checkpoint or a bundle.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: Literal["scaled_linear", "linear"] = "scaled_linear"
    steps_offset: int = 1
    set_alpha_to_one: bool = False

    def __post_init__(self) -> None:
        count, offset = self.num_train_timesteps, self.steps_offset
        if not _is_int(count) or not 1 <= count <= 1_000_000:
            raise _refusal("num_train_timesteps", count, "a whole number from 1 to 1000000")
        if not _is_int(offset) or not 0 <= offset < count:
            raise _refusal("steps_offset", offset, f"a whole number from 0 to {count - 1}")
        for name in ("beta_start", "beta_end"):
            beta = getattr(self, name)
            if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not LEAST_BETA <= beta < 1:
                raise _refusal(name, beta, f"a number from {LEAST_BETA} up, below 1")
        if self.beta_schedule not in _BETA_SCHEDULES:
            raise _refusal("beta_schedule", self.beta_schedule, " or ".join(map(repr, _BETA_SCHEDULES)))
        if not isinstance(self.set_alpha_to_one, bool):
            raise _refusal("set_alpha_to_one", self.set_alpha_to_one, "true or false")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Schedule:
        """Make the schedule of a diffusers `scheduler_config.json`, whatever its scheduler class.

        Keys that are absent have the values of Stable Diffusion, `steps_offset` 1 among them; keys that are present
        have their own, as a bundle's must. Sampler settings that DDIM does not have (solver order, spacing, clipping)
        are ignored.

        Raises `CheckpointError`, naming the key, for a `prediction_type` other than "epsilon", for trained betas, for
        betas rescaled to zero terminal SNR, and for values out of range.
        """
        prediction = config.get("prediction_type", "epsilon")
        if prediction != "epsilon":
            raise CheckpointError(
                f"scheduler config: prediction_type is {shown(prediction)}, expected 'epsilon'. "
                "MagicFace is defined for noise prediction; use a checkpoint such as Stable Diffusion 1.5 or 2.1-base."
            )
        if config.get("trained_betas") is not None:
            raise _refusal("trained_betas", "a list", "absent or null, as only computed betas are supported")
        if config.get("rescale_betas_zero_snr"):
            raise _refusal("rescale_betas_zero_snr", config["rescale_betas_zero_snr"], "absent or false")
        known = {key: config[key] for key in cls.__dataclass_fields__ if config.get(key) is not None}
        return cls(**known)

    def to_config(self) -> dict[str, Any]:
        """Return a diffusers-style config that `from_config` reads as an equal schedule, diffusers as a DDIM one."""
        return {
            "_class_name": "DDIMScheduler",
            **asdict(self),
            "prediction_type": "epsilon",
            "timestep_spacing": "leading",
            "clip_sample": False,
        }

    @ComputedOnce
    def alphas_cumprod(self) -> Float32Array:
        """abar, float32 [num_train_timesteps], read-only; equal bit by bit to what diffusers computes."""
        if self.beta_schedule == "scaled_linear":
            betas = _linspace32(self.beta_start**0.5, self.beta_end**0.5, self.num_train_timesteps) ** 2
        else:
            betas = _linspace32(self.beta_start, self.beta_end, self.num_train_timesteps)
        alphas = np.float32(1) - betas
        # torch accumulates a float32 product in double on the CPU and rounds every partial product
        abar = np.cumprod(alphas, dtype=np.float64).astype(np.float32)
        abar.setflags(write=False)
        return abar

    @property
    def final_alpha(self) -> float:
        """abar of the step after the last: 1, or abar[0] where `set_alpha_to_one` is false."""
        return 1.0 if self.set_alpha_to_one else float(self.alphas_cumprod[0])

    def timesteps(self, steps: int) -> Int64Array:
        """Return the timesteps of a run of `steps` steps, int64 [T], descending.

        Raises `OptionError` for a number of steps that the schedule cannot make.
        """
        count = self.num_train_timesteps
        if not _is_int(steps) or not 1 <= steps <= count:
            raise OptionError(f"steps is {steps!r}, expected a whole number from 1 to {count}.")
        stride = count // steps
        timesteps = np.arange(steps - 1, -1, -1, dtype=np.int64) * stride + self.steps_offset
        if timesteps[0] >= count:
            raise OptionError(
                f"steps is {steps}, which with the checkpoint's steps_offset of {self.steps_offset} would start at "
                f"timestep {timesteps[0]}; the last trained one is {count - 1}. Use at most {steps - 1} steps."
            )
        return timesteps

    def step_coefficients(self, steps: int) -> Float32Array:
        """Return DDIM coefficients, float32 [T,2]: next = c[i,0] * latents + c[i,1] * eps.

        Computed in float64 from the float32 abar and rounded once. Raises `OptionError` as `timesteps`.
        """
        timesteps = self.timesteps(steps)
        previous = timesteps - self.num_train_timesteps // steps
        abar = self.alphas_cumprod.astype(np.float64)
        a = abar[timesteps]
        a_next = np.where(previous >= 0, abar[np.maximum(previous, 0)], self.final_alpha)
        keep = np.sqrt(a_next / a)
        return np.stack([keep, np.sqrt(1 - a_next) - keep * np.sqrt(1 - a)], axis=1).astype(np.float32)

    def add_noise(self, latents: Float32Array, noise: Float32Array, timestep: int | Int64Array) -> Float32Array:
        """Noise clean latents: float32 [R,4,h,w] and [R,4,h,w] (or broadcastable) -> float32 [R,4,h,w].

        `timestep` is one number, or int64 [R] with one for each row. Raises `OptionError` for a timestep that the
        schedule does not have.
        """
        t = np.asarray(timestep)
        if t.dtype.kind not in "iu" or (t.size and not (t.min() >= 0 and t.max() < self.num_train_timesteps)):
            raise OptionError(f"timestep is {timestep!r}, expected whole numbers 0..{self.num_train_timesteps - 1}.")
        abar = self.alphas_cumprod[t]
        if t.ndim:
            abar = abar.reshape(-1, *(1,) * (latents.ndim - 1))  # (R,1,1,1)
        noised = np.sqrt(abar) * latents + np.sqrt(np.float32(1) - abar) * noise
        return np.asarray(noised, dtype=np.float32)


def is_region_step(step: int, steps: int, alpha: float) -> bool:
    """Whether loop step `step` of `steps` is in the second stage (RBA): step > alpha * steps, and never step 0.

    The comparison is strict, so alpha 0.4 of 50 steps gives the first stage 21 steps, 0..20. Step 0 belongs to the
    first stage at any alpha, because no regions are known before it.
    """
    # the small term absorbs products such as 0.29 * 100 = 28.999999999999996
    return step >= 1 and step > math.floor(as_float(alpha) * steps + 1e-9)


def target_noise(seed: int, image_index: int, shape: Sequence[int]) -> Float32Array:
    """Draw the first latents of image number `image_index` of a request: float32 standard normals of `shape`.

    Raises `OptionError` for a seed outside 0..2**64-1 or an image index outside 0..2**63-1.
    """
    if not _is_int(image_index) or not 0 <= image_index < _REFERENCE_STREAMS:
        raise OptionError(f"image_index is {image_index!r}, expected a whole number from 0 to 2**63-1.")
    return _normals("seed", seed, image_index, shape)


def reference_noise(reference_seed: int, step: int, shape: Sequence[int]) -> Float32Array:
    """Draw the noise put on the references at loop step `step`: float32 standard normals of `shape`.

    Draw it in one reference's shape, [1,4,h,w], and use it for every reference: then what a reference contributes does
    not depend on which others are used with it, and its keys and values can be kept.

    Raises `OptionError` for a seed outside 0..2**64-1 or a negative step.
    """
    if not _is_int(step) or not 0 <= step < _REFERENCE_STREAMS:
        raise OptionError(f"step is {step!r}, expected a whole number from 0 to 2**63-1.")
    return _normals("reference_seed", reference_seed, _REFERENCE_STREAMS | step, shape)


def _normals(name: str, seed: int, stream: int, shape: Sequence[int]) -> Float32Array:
    if not _is_int(seed) or not 0 <= seed < 2**64:
        raise OptionError(f"{name} is {seed!r}, expected a whole number from 0 to 2**64-1.")
    key = np.array([int(seed), int(stream)], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(tuple(shape), dtype=np.float32)


def _linspace32(start: float, end: float, count: int) -> Float32Array:
    """torch.linspace in float32, bit for bit: computed from both ends, with a float32 step and fused multiply-adds."""
    first, last = np.float32(start), np.float32(end)
    if count == 1:
        return np.array([first], dtype=np.float32)
    step = np.float64((last - first) / np.float32(count - 1))
    index = np.arange(count)
    # float64 holds the products exactly, so that the cast is the only rounding, as in a fused multiply-add
    upward = np.float64(first) + step * index
    downward = np.float64(last) - step * (count - 1 - index)
    return np.asarray(np.where(index < count // 2, upward, downward), dtype=np.float32)


def _is_int(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _refusal(key: str, found: object, expected: str) -> CheckpointError:
    return CheckpointError(f"scheduler config: {key} is {shown(found)}, expected {expected}.")
