"""The inputs of a case, drawn from a seed, equal for every contender and in every process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from magicface_rt import Bundle, Concept, Options, Reference
from magicface_rt.regions import MaskedReference
from magicface_rt.schedule import Schedule, is_region_step, reference_noise, target_noise

from .settings import Case

Float32Array = NDArray[np.float32]

WORDS = ("man", "hat", "dog", "car", "tree", "lamp")
PROMPT = "a photo of a man with a hat, a dog and a car, a tree and a lamp"
WEIGHT = 2.5
GUIDANCE = 7.5
MASK_GRID = 128
STAGES = ("rsa", "rba")


@dataclass(frozen=True)
class Workload:
    """A case for a bundle. Steps take drawn text and latents, so they need neither text encoder nor VAE.

    text: float32 [2 + N, 77, D], rows negative prompt, prompt, references; z0: float32 [N, 4, h, w].
    """

    case: Case
    text: Float32Array
    z0: Float32Array
    masks: NDArray[np.uint8]  # [N, 128, 128]
    regions: NDArray[np.bool_]  # [N, h/2, w/2], drawn: what a timed RBA step starts from
    schedule: Schedule
    seed: int
    shape: tuple[int, ...]  # of one image's latents

    @classmethod
    def of(cls, bundle: Bundle, case: Case, seed: int) -> Workload:
        rng = np.random.default_rng(seed)
        shape = (1, bundle.latent_channels, bundle.rows, bundle.columns)
        text = rng.standard_normal((2 + len(WORDS), 77, bundle.text_width), dtype=np.float32)
        z0 = rng.standard_normal((len(WORDS), *shape[1:]), dtype=np.float32)
        n = case.concepts
        return cls(
            case,
            text[: 2 + n],
            z0[:n],
            np.stack([mask_of_share(case.mask_share)] * n) if n else np.zeros((0, MASK_GRID, MASK_GRID), np.uint8),
            bands(n, bundle.rows // 2, bundle.columns // 2),
            bundle.schedule,
            seed,
            shape,
        )

    @property
    def ca_scale(self) -> float:
        return Options().effective_ca_scale(self.case.concepts)

    @property
    def tokens(self) -> tuple[tuple[int, ...], ...]:
        return tuple((2 * k + 2,) for k in range(self.case.concepts))

    @property
    def masked(self) -> list[MaskedReference]:
        return [MaskedReference(mask, k, WEIGHT) for k, mask in enumerate(self.masks)]

    @property
    def region_label(self) -> NDArray[np.int64]:
        """The drawn regions as labels [h/2, w/2]: k + 1 for concept k, 0 for none."""
        label = np.zeros(self.regions.shape[1:], np.int64)
        for k, region in enumerate(self.regions):
            label[region] = k + 1
        return label

    def noise(self) -> Float32Array:
        """The images' starting noise, [B, 4, h, w]."""
        return np.concatenate([target_noise(self.seed, k, self.shape) for k in range(self.case.images)])

    def run(self, steps: int) -> list[Moment]:
        """The steps of a whole run, for parity: RSA in the first, RBA after.

        They are few and large, so an error in a prediction shows in the latents; in a small step it would hardly move
        them.
        """
        return [self._moment(i, steps, "rba" if i else "rsa") for i in range(steps)]

    def moment(self, stage: str) -> Moment:
        """The step that is timed, from the middle of the case's schedule."""
        return self._moment(self.case.steps // 2, self.case.steps, stage)

    def _moment(self, index: int, steps: int, stage: str) -> Moment:
        timestep = int(self.schedule.timesteps(steps)[index])
        noised = self.schedule.add_noise(self.z0, reference_noise(0, index, self.shape), timestep)
        return Moment(index, steps, stage, timestep, self.schedule.step_coefficients(steps)[index], noised)

    def concepts(self) -> list[Concept]:
        """The concepts of a whole request: drawn pictures with masks of the case's share."""
        return drawn_concepts(self.case.concepts, self.case.mask_share)

    def options(self, alpha: float) -> Options:
        return Options(steps=self.case.steps, images=self.case.images, seed=self.seed, alpha=alpha)

    def stages(self, alpha: float) -> list[str]:
        """The stage of each of the case's steps."""
        return ["rba" if is_region_step(i, self.case.steps, alpha) else "rsa" for i in range(self.case.steps)]


@dataclass(frozen=True)
class Moment:
    """One step of a run. `noised`: float32 [N, 4, h, w]; `coefficients`: float32 [2]."""

    index: int
    steps: int
    stage: str
    timestep: int
    coefficients: Float32Array
    noised: Float32Array

    @property
    def name(self) -> str:
        """The name of the file that holds its reference keys and values, without suffix."""
        return f"step-{self.index}-of-{self.steps}"


def mask_of_share(share: float) -> NDArray[np.uint8]:
    """A mask [128, 128] in which the upper rows are set, as many as come closest to the share."""
    mask = np.zeros((MASK_GRID, MASK_GRID), np.uint8)
    mask[: max(1, round(MASK_GRID * share))] = 1
    return mask


def bands(count: int, rows: int, columns: int) -> NDArray[np.bool_]:
    """Divide the grid into upright bands of equal width, one for each concept and the last for none: bool [N, h, w]."""
    owner = np.arange(columns) * (count + 1) // columns
    return (
        np.stack([np.tile(owner == k, (rows, 1)) for k in range(count)])
        if count
        else np.zeros((0, rows, columns), bool)
    )


def drawn_concepts(count: int, share: float) -> list[Concept]:
    """Draw concepts of soft random colours with a rectangular mask; nothing is learnt from them."""
    rng = np.random.default_rng(3)
    mask = np.repeat(np.repeat(mask_of_share(share), 2, 0), 2, 1) * np.uint8(255)
    concepts = []
    for word in WORDS[:count]:
        picture = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((256, 256), Image.BICUBIC)
        concepts.append(Concept(word, Reference(picture, mask=mask, prompt=f"a {word}"), weight=WEIGHT))
    return concepts


def sizes_of(bundle: Bundle, workload: Workload) -> Mapping[str, Any]:
    """The values of the graphs' symbols in this case."""
    from magicface_rt.single_step import ReferenceSet

    kept = ReferenceSet.of(bundle, workload.masked).kept
    sizes = {f"M{factor}": tokens.count for factor, tokens in kept.items()}
    return {"B": workload.case.images, "K": 1, "R": max(1, workload.case.concepts), **sizes}
