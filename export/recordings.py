"""Recordings of the authors' implementation: folders of `case.json`, `inputs.npz`, `steps.npz`, with a U-Net beside.

Everything that is needed to compute the recorded steps again is taken from the case itself. A file that cannot be read,
lacks something, or does not fit the others is refused with a `RecordingError` that names it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from diffusers import UNet2DConditionModel

from magicface_rt.bundle_form import TOKENS
from magicface_rt.errors import CheckpointError, OptionError, RecordingError
from magicface_rt.files.plain_file import read_plain
from magicface_rt.files.strict_json import read_json
from magicface_rt.process.host_memory import as_host_memory_error
from magicface_rt.process.interrupts import reraise_if_interrupt
from magicface_rt.schedule import Schedule
from magicface_rt.values.shown import shown

from .block_layout import check_unet
from .npz import Header, read_npz

Array = npt.NDArray[Any]

LAYERS = 16
MOST_PATH = 1024
MOST_JSON_BYTES = 1 << 22
MOST_ARRAY_BYTES = 256 << 20
"""Largest size of inputs.npz or steps.npz, compressed or not. Those of 50 steps at 512 px have 16 MB."""

_SCHEDULER = {  # what the schedule of this package does; a case that names another value was made by another sampler
    "type": "DDIM",
    "clip_sample": False,
    "prediction_type": "epsilon",
    "eta": 0.0,
    "timestep_spacing": "leading",
}


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """The relative errors (2-norm) that the case allows in one step that starts from the recorded latents."""

    eps_u: float
    eps_c: float
    latents: float


@dataclass(frozen=True, kw_only=True)
class RecordedInputs:
    """`inputs.npz`: float32, masks bool."""

    x_T: Array  # (1, 4, h, w)  # noqa: N815 - its name in the file
    neg_embeds: Array  # (1, 77, D)
    target_embeds: Array  # (1, 77, D)
    ref_embeds: Array  # (R, 77, D)
    ref_z0: Array  # (R, 4, h, w)
    ref_noise: Array  # (T, R, 4, h, w)
    ref_masks: Array  # (R, 128, 128) bool


@dataclass(frozen=True, kw_only=True)
class RecordedSteps:
    """`steps.npz`: what the original computed at every step; float32 unless stated otherwise."""

    timesteps: Array  # (T) int64
    latents_in: Array  # (T, 1, 4, h, w)
    eps_u: Array  # (T, 1, 4, h, w)
    eps_c: Array  # (T, 1, 4, h, w)
    eps_guided: Array  # (T, 1, 4, h, w)
    latents_out: Array  # (T, 1, 4, h, w)
    label: Array  # (T, h/2, w/2) int64
    concept_mask: Array  # (T, N, h/2, w/2) bool
    fore_mask: Array  # (T, h/2, w/2) bool
    margin: Array  # (T, h/2, w/2)
    fore_margin: Array  # (T, h/2, w/2)
    rate: Array  # (T, h, w)


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One recorded case, checked.

    A case whose arrays hold only the first steps of its run gives their number as `recorded_steps`. Reference r belongs
    to concept r; references beyond the concepts are used in stage 1 only.
    """

    name: str
    folder: Path
    model: Path
    steps: int
    inject_step: int
    start_step: int
    end_step: int
    guidance: float
    ca_scale: float
    semantic_guidance: bool
    injection_layers: tuple[int, ...]
    tokens: tuple[tuple[int, ...], ...]  # of each of the N concepts: one in a recorded case, perhaps more elsewhere
    weights: tuple[float, ...]  # (R)
    schedule: Schedule
    tolerance: Tolerance
    free_run_latents: float | None  # None: the trajectory is not stable enough to be judged freely
    inputs: RecordedInputs
    recorded: RecordedSteps

    @property
    def free_run(self) -> bool:
        """Whether the trajectory may be compared from x_T alone."""
        return self.free_run_latents is not None

    @property
    def recorded_steps(self) -> int:
        return len(self.recorded.timesteps)

    @property
    def concept_of_reference(self) -> tuple[int, ...]:
        """The concept of each reference, -1 for references that have none."""
        return tuple(r if r < len(self.tokens) else -1 for r in range(len(self.weights)))

    @property
    def latent_size(self) -> tuple[int, int]:
        height, width = self.inputs.x_T.shape[-2:]
        return height, width

    def stage(self, step: int) -> Literal["off", "rsa", "rba"]:
        """The stage of a step: RBA after inject_step, but never at step 0, where there are no regions yet."""
        if not self.start_step <= step < self.end_step:
            return "off"
        return "rba" if step > self.inject_step and step > 0 else "rsa"

    @property
    def stages(self) -> tuple[Literal["off", "rsa", "rba"], ...]:
        return tuple(self.stage(step) for step in range(self.steps))

    def load_unet(self) -> UNet2DConditionModel:
        """Load the case's own U-Net, in float32 on the CPU, from its safetensors file."""
        return load_unet(self.model)

    @classmethod
    def load(cls, folder: str | Path) -> Recording:
        """Read and check a case folder. Raises `RecordingError`."""
        folder = Path(folder)
        case = _read_case(folder)
        steps, tokens = case.whole("steps", least=1), case.whole_numbers("ref_index")
        sizes = _array_sizes(case)
        inputs = _read_arrays(folder / "inputs.npz", _INPUTS, sizes)
        recorded = _read_arrays(folder / "steps.npz", _STEPS, sizes)
        if np.any(recorded["label"] < 0) or np.any(recorded["label"] >= TOKENS):
            raise RecordingError(f"{folder / 'steps.npz'}: label holds values outside 0..{TOKENS - 1}.")

        model = _resolved(folder, case)
        try:
            _check_model(model, text_width=sizes["D"])
        except RecordingError as error:
            why = str(error).removesuffix(".")
            raise case.refusal("model", case["model"], f"the folder of a U-Net to replay it with ({why})") from error
        schedule = _schedule(case.part("scheduler"))
        try:
            schedule.timesteps(steps)
        except OptionError as error:
            raise case.refusal("steps", steps, f"a number that the schedule can make ({error})") from error
        return cls(
            name=case.text("name") if "name" in case else folder.name,
            folder=folder,
            model=model,
            steps=steps,
            inject_step=case.whole("inject_step"),
            start_step=case.whole("start_step") if "start_step" in case else 0,
            end_step=case.whole("end_step") if "end_step" in case else steps,
            guidance=case.number("guidance_scale"),
            ca_scale=case.number("ca_scale"),
            semantic_guidance=case.flag("use_rate"),
            # the authors' code compares layer numbers, so one that no layer has does nothing
            injection_layers=_layers(case),
            tokens=tuple((token,) for token in tokens),
            weights=tuple(case.numbers("mask_weights")[: sizes["R"]]),
            schedule=schedule,
            tolerance=_tolerance(case),
            free_run_latents=case.positive("free_run_latents") if case.flag("free_run") else None,
            inputs=RecordedInputs(**inputs),
            recorded=RecordedSteps(**recorded),
        )


def load_unet(folder: Path) -> UNet2DConditionModel:
    """Load a diffusers U-Net folder of Stable Diffusion's layout, in float32 on the CPU; safetensors only.

    Raises `RecordingError`.
    """
    config = _check_model(folder)
    try:
        check_unet(f"model {folder}: ", config)  # building a network of a billion layers would take for ever
    except CheckpointError as error:
        raise RecordingError(str(error)) from error
    try:
        unet = UNet2DConditionModel.from_pretrained(
            str(folder), torch_dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
    except Exception as error:  # diffusers raises a dozen kinds
        reraise_if_interrupt(error)
        raise RecordingError(f"model {folder}: cannot be loaded as a UNet2DConditionModel: {error}") from error
    return unet.eval()


class _Case:
    """The object in case.json, with a getter for each kind of value. Raises `RecordingError` naming the key."""

    def __init__(self, values: dict[str, Any], path: Path, prefix: str = "") -> None:
        self.values, self.path, self.prefix = values, path, prefix

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def __getitem__(self, key: str) -> Any:
        if key not in self:
            raise RecordingError(f"{self.path}: lacks {self.prefix}{key}.")
        return self.values[key]

    def refusal(self, key: str, found: object, expected: str) -> RecordingError:
        return RecordingError(f"{self.path}: {self.prefix}{key} is {shown(found)}, expected {expected}.")

    def part(self, key: str) -> _Case:
        if not isinstance(self[key], dict):
            raise self.refusal(key, self[key], "an object")
        return _Case(self[key], self.path, f"{self.prefix}{key}.")

    def text(self, key: str) -> str:
        if not isinstance(self[key], str):
            raise self.refusal(key, self[key], "a string")
        return self[key]

    def flag(self, key: str) -> bool:
        if not isinstance(self[key], bool):
            raise self.refusal(key, self[key], "true or false")
        return self[key]

    def whole(self, key: str, *, least: int | None = None) -> int:
        value = self[key]
        if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
            raise self.refusal(key, value, "a whole number" + ("" if least is None else f" from {least}"))
        return value

    def number(self, key: str) -> float:
        if not _is_number(self[key]):
            raise self.refusal(key, self[key], "a finite number")
        return float(self[key])

    def positive(self, key: str) -> float:
        if self.number(key) <= 0:
            raise self.refusal(key, self[key], "a number above 0")
        return float(self[key])

    def numbers(self, key: str) -> list[float]:
        if not isinstance(self[key], list) or not all(map(_is_number, self[key])):
            raise self.refusal(key, self[key], "a list of finite numbers")
        return [float(value) for value in self[key]]

    def whole_numbers(self, key: str) -> list[int]:
        numbers = self.numbers(key)
        if any(number != int(number) for number in numbers):
            raise self.refusal(key, self[key], "a list of whole numbers")
        return [int(number) for number in numbers]

    def pair(self, key: str) -> tuple[int, int]:
        numbers = self.whole_numbers(key)
        if len(numbers) != 2 or min(numbers) < 1:
            raise self.refusal(key, self[key], "two whole numbers, [height, width]")
        return numbers[0], numbers[1]


def _is_number(value: object) -> bool:
    """Whether a value is a finite float, or a whole number of at most 2**63 in magnitude."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) <= 2**63


def _read_case(folder: Path) -> _Case:
    """Read case.json of a folder. Raises `RecordingError`, also if there is no such folder."""
    try:
        there = folder.is_dir()
    except OSError as error:  # no folder can have such a name
        reraise_if_interrupt(error)
        there = False
    if not there:
        raise RecordingError(f"recording {folder}: no such folder. Give the folder that holds case.json.")
    return _Case(_read_json(folder / "case.json"), folder / "case.json")


def _array_sizes(case: _Case) -> dict[str, int]:
    """The sizes of the recorded arrays by the letters of their shapes, except those that the arrays themselves tell."""
    count, steps = case.whole("n_refs", least=0), case.whole("steps", least=1)
    recorded_steps = case.whole("recorded_steps", least=1) if "recorded_steps" in case else steps
    if recorded_steps > steps:
        raise case.refusal("recorded_steps", recorded_steps, f"at most steps, {steps}")
    height, width = case.pair("latent_size")
    tokens = case.whole_numbers("ref_index")
    if any(not 0 <= token < TOKENS for token in tokens):
        raise case.refusal("ref_index", tokens, f"token positions 0..{TOKENS - 1}")
    weights = case.numbers("mask_weights")
    if len(weights) < count:
        raise case.refusal("mask_weights", weights, f"at least {count} numbers, one for each reference")
    if height % 8 or width % 8:
        raise case.refusal("latent_size", [height, width], "multiples of 8")
    if "mask_size" in case and case.pair("mask_size") != (height // 2, width // 2):
        raise case.refusal("mask_size", case["mask_size"], f"half of latent_size, {[height // 2, width // 2]}")
    return {
        "T": recorded_steps,
        "R": count,
        "N": len(tokens),
        "h": height,
        "w": width,
        "H": height // 2,
        "W": width // 2,
    }


def _tolerance(case: _Case) -> Tolerance:
    limits = case.part("tolerance")
    return Tolerance(**{name: limits.positive(name) for name in ("eps_u", "eps_c", "latents")})


def _schedule(config: _Case) -> Schedule:
    """The recorded schedule, with the steps offset that the original's pipeline really used."""
    for key, expected in _SCHEDULER.items():
        if key in config and config[key] != expected:
            raise config.refusal(key, config[key], repr(expected))
    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "steps_offset", "set_alpha_to_one")
    try:
        return Schedule(**{key: config[key] for key in keys})
    except CheckpointError as error:
        raise RecordingError(f"{config.path}: {error}") from error


def _resolved(folder: Path, case: _Case) -> Path:
    """The path of the case's model folder, which need not exist."""
    if len(case.text("model")) > MOST_PATH:
        raise case.refusal("model", case["model"], f"a folder's name of at most {MOST_PATH} characters")
    try:
        return (folder / case.text("model")).resolve()
    except (OSError, ValueError) as error:
        reraise_if_interrupt(error)
        raise case.refusal("model", case["model"], f"a folder's name ({error})") from error


def _check_model(folder: Path, *, text_width: int | None = None) -> dict[str, Any]:
    """Check that the folder holds a U-Net's config, for text of the given width, and its weights as safetensors.

    Returns the config.
    """
    config = _read_json(folder / "config.json", of=_MODEL)
    weights = folder / "diffusion_pytorch_model.safetensors"
    if not weights.is_file():
        raise RecordingError(f"{weights}: missing. Pickled weights are not read; convert them to safetensors.")
    if text_width is not None and config.get("cross_attention_dim") != text_width:
        raise RecordingError(
            f"{folder / 'config.json'}: cross_attention_dim is {shown(config.get('cross_attention_dim'))}, expected "
            f"{text_width}, the width of the recorded prompts."
        )
    return config


# name: (shape in the letters of this package, kind)
_INPUTS = {
    "x_T": ("1 4 h w", "float"),
    "neg_embeds": ("1 77 D", "float"),
    "target_embeds": ("1 77 D", "float"),
    "ref_embeds": ("R 77 D", "float"),
    "ref_z0": ("R 4 h w", "float"),
    "ref_noise": ("T R 4 h w", "float"),
    "ref_masks": ("R 128 128", "bool"),
}
_STEPS = {
    "timesteps": ("T", "int"),
    "latents_in": ("T 1 4 h w", "float"),
    "eps_u": ("T 1 4 h w", "float"),
    "eps_c": ("T 1 4 h w", "float"),
    "eps_guided": ("T 1 4 h w", "float"),
    "latents_out": ("T 1 4 h w", "float"),
    "label": ("T H W", "int"),
    "concept_mask": ("T N H W", "bool"),
    "fore_mask": ("T H W", "bool"),
    "margin": ("T H W", "float"),
    "fore_margin": ("T H W", "float"),
    "rate": ("T h w", "float"),
}


def _layers(case: _Case) -> tuple[int, ...]:
    """The injection layers, without numbers beyond the last layer, which the original silently ignores."""
    layers = {n for n in case.whole_numbers("layer_idx") if 0 <= n < LAYERS}
    if not layers:
        raise case.refusal("layer_idx", case["layer_idx"], f"at least one number 0..{LAYERS - 1}")
    return tuple(sorted(layers))


_RECORDING = "A recording is case.json, inputs.npz and steps.npz."
_MODEL = "A model is config.json and diffusion_pytorch_model.safetensors."


def _read_json(path: Path, *, of: str = _RECORDING) -> dict[str, Any]:
    try:
        value = read_json(read_plain(path, MOST_JSON_BYTES))
    except (OSError, ValueError) as error:
        reraise_if_interrupt(error)
        raise _unreadable(path, error, of) from error
    if not isinstance(value, dict):
        raise RecordingError(f"{path}: holds a {type(value).__name__}, expected an object.")
    return value


def _read_arrays(path: Path, wanted: Mapping[str, tuple[str, str]], sizes: dict[str, int]) -> dict[str, Array]:
    """Read an .npz and check its arrays against shapes in letters; a letter not in `sizes` is learned at first use."""

    def accept(name: str, header: Header) -> None:
        _check_header(path, name, header, *wanted[name], sizes)

    try:
        with as_host_memory_error():
            arrays = read_npz(path, list(wanted), accept, MOST_ARRAY_BYTES)
    except LookupError as missing:
        reraise_if_interrupt(missing)
        raise RecordingError(f"{path}: lacks {missing.args[0]}. Record the case again.") from missing
    except (OSError, ValueError) as error:
        reraise_if_interrupt(error)
        raise _unreadable(path, error, _RECORDING) from error
    return {name: _checked(array, path, name, wanted[name][1]) for name, array in arrays.items()}


def _unreadable(path: Path, error: Exception, of: str) -> RecordingError:
    """of: what the file's folder should hold, for the message if the file is missing."""
    if isinstance(error, ValueError) and not _is_there(path):
        return RecordingError(f"{path}: missing. {of}")
    return RecordingError(f"{path}: cannot be read: {error}. Copy it again.")


def _is_there(path: Path) -> bool:
    try:
        return os.path.lexists(path)
    except ValueError:  # no file can have such a name
        return False


def _check_header(path: Path, name: str, header: Header, letters_of: str, kind: str, sizes: dict[str, int]) -> None:
    """Check an array's shape and dtype before its numbers are read: a file may claim any number of them."""
    shape, dtype = header
    letters = letters_of.split()
    if len(shape) != len(letters):
        raise RecordingError(f"{path}: {name} has shape {shown(list(shape))}, expected [{', '.join(letters)}].")
    sizes_here = [int(letter) if letter.isdigit() else sizes.get(letter) for letter in letters]
    if any(known not in (None, size) for known, size in zip(sizes_here, shape, strict=True)):
        expected = [letter if known is None else known for letter, known in zip(letters, sizes_here, strict=True)]
        said = ", ".join(size if isinstance(size, str) else shown(size) for size in expected)
        raise RecordingError(f"{path}: {name} has shape {list(shape)}, expected [{said}] by case.json.")
    sizes.update({letter: size for letter, size in zip(letters, shape, strict=True) if not letter.isdigit()})
    if dtype.kind not in {"float": "f", "int": "iu", "bool": "biu"}[kind]:
        raise RecordingError(f"{path}: {name} is {dtype}, expected {kind}.")


def _checked(array: Array, path: Path, name: str, kind: str) -> Array:
    if kind == "bool":
        if not np.all((array == 0) | (array == 1)):
            raise RecordingError(f"{path}: {name} holds other values than 0 and 1.")
        return array.astype(bool)
    if kind == "int":
        return array.astype(np.int64)
    if not np.all(np.isfinite(array)):
        raise RecordingError(f"{path}: {name} holds NaN or infinity.")
    with np.errstate(over="ignore"):
        found = array.astype(np.float32, copy=False)
    if not np.all(np.isfinite(found)):
        raise RecordingError(f"{path}: {name} holds numbers beyond the range of float32.")
    return found
