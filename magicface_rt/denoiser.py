"""The loop of a request's steps: `denoise_step` of a bundle, driven with the quantities of the method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .backends.base import Arrays
from .backends.binding import Binding
from .bundle import Bundle
from .computed import ComputedOnce
from .options import WeightMode
from .regions import Stage, cell_groups, token_arrays

Float32Array = NDArray[np.float32]

STATE = ("latents_out", "region_label_out")
"""The outputs that the next step needs; the others exist for comparison."""

SERVED_OUTPUTS = {"denoise_step": STATE}
"""The outputs that a graph must produce while it serves, by graph; a graph that is not named produces all."""


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """The inputs that stay the same for every step of a request of B images.

    text: [2, B, 77, D], negative prompt and prompt, in the bundle's dtype; tokens: positions per concept.
    """

    text: NDArray[Any]
    tokens: Sequence[Sequence[int]]
    ca_scale: float
    scale: float
    semantic: bool
    weight_mode: WeightMode

    @property
    def images(self) -> int:
        """The number of images, B."""
        return int(self.text.shape[1])

    @ComputedOnce
    def arrays(self) -> Arrays:
        """The `denoise_step` inputs that do not change from step to step."""
        images = self.images
        return {
            "text": self.text,
            **token_arrays(self.tokens, self.ca_scale, images),
            "semantic_guidance": np.full(images, float(self.semantic), np.float32),
            "guidance": np.full(images, self.scale, np.float32),
        }


class Keys(Protocol):
    """Provides the reference keys of each step; see `magicface_rt.kept.feed.KeyFeed`."""

    def access(self, stages: Sequence[Stage], weight_modes: Sequence[WeightMode]) -> Arrays: ...

    def start(self, step: int) -> None: ...

    def prepare(self, step: int) -> None: ...

    @property
    def rows(self) -> int: ...

    @property
    def seconds(self) -> float: ...

    def check(self) -> None: ...


class DenoisingLoop:
    """Takes a batch of B images from noise to latents, over a binding of `denoise_step`.

    Whatever the next step needs stays where the backend computes: latents and region labels pass from one step to the
    next, and `keys` provides the reference keys. Each step uploads only a few numbers and whatever else has changed. A
    step is done when `wait` returns; until then it may only have been enqueued.

    latents: the noise, float32 [B, 4, h, w]; guidance: entries for one or several consecutive images each, B in all.
    `keys` has one row for all images, which requires the same stage and weight mode for all, or a row for each image.
    """

    def __init__(
        self,
        bundle: Bundle,
        denoise_step: Binding,
        *,
        latents: Float32Array,
        guidance: Sequence[Guidance],
        keys: Keys,
    ) -> None:
        self._step = denoise_step
        self._keys = keys
        self._images = len(latents)
        self._sizes = [one.images for one in guidance]
        self._weight_modes: list[WeightMode] = [one.weight_mode for one in guidance]
        self._no_label = np.zeros((self._images, bundle.rows // 2, bundle.columns // 2), np.int64)
        self._stages: tuple[Stage, ...] | None = None
        for name in guidance[0].arrays:
            joined = [one.arrays[name] for one in guidance]
            denoise_step.set(name, np.concatenate(joined, axis=1 if name == "text" else 0))
        denoise_step.set("latents", latents)

    def step(self, step: int, timestep: int, coefficients: Float32Array, stages: Sequence[Stage]) -> None:
        """Start a step. coefficients: the schedule's row for it, float32 [2]; stages: one for each of `guidance`."""
        self._keys.start(step)
        self._set_stages(tuple(stages))
        self._step.set("timestep", np.full(self._images, timestep, np.int64))
        self._step.set("ddim", np.tile(coefficients, (self._images, 1)))
        self._step.run()
        self._step.feed_back("latents", "latents_out")

    def _set_stages(self, stages: tuple[Stage, ...]) -> None:
        before, self._stages = self._stages, stages
        if before is not None and all(stage == "rba" for stage in stages):
            self._step.feed_back("region_label", "region_label_out")
        elif before is not None and "rba" in stages:
            # The images are in different stages: some use their labels, the others do not.
            self._step.set("region_label", self._cell_groups(stages, self._step.read("region_label_out")))
        elif stages != before:
            self._step.set("region_label", self._cell_groups(stages, self._no_label))
        if stages != before:
            shared = self._keys.rows == 1
            sizes = [1] if shared else self._sizes
            of_rows = [stage for stage, size in zip(stages, sizes, strict=False) for _ in range(size)]
            modes = [mode for mode, size in zip(self._weight_modes, sizes, strict=False) for _ in range(size)]
            for name, array in self._keys.access(of_rows, modes).items():
                self._step.set(name, array)

    def _cell_groups(self, stages: Sequence[Stage], label: NDArray[np.int64]) -> NDArray[np.int64]:
        parts = np.split(label, np.cumsum(self._sizes)[:-1])
        return np.concatenate([cell_groups(stage, part) for stage, part in zip(stages, parts, strict=True)])

    def prepare(self, step: int) -> None:
        """Prepare a step while the device works on the previous one."""
        self._keys.prepare(step)

    def wait(self) -> float:
        """Wait for the step to finish; return the seconds of its reference pass, excluding time spent waiting.

        Raises:
            DeviceError: a graph failed on the device.
        """
        self._step.wait()
        return self._keys.seconds

    def check(self) -> None:
        """Raise NonFiniteError, naming the graph, if the last step or its keys and values are not finite."""
        self._keys.check()
        self._step.check()

    def read(self) -> tuple[Float32Array, NDArray[np.int64]]:
        """Return latents [B, 4, h, w] and region labels [B, h/2, w/2] after the last step."""
        return self._step.read("latents_out"), self._step.read("region_label_out")
