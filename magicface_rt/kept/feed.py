"""Feeds a batch's reference keys into `denoise_step`, step by step: computed beside it, or from host or device.

The tokens of an image's references lie end to end in the order of its concepts, then padding. All images of a batch
share one row of keys, or each has its own.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Arrays
from ..backends.binding import Binding
from ..backends.key_uploader import KeyUploader
from ..backends.pieces import DeviceArray, OutputRows, Piece
from ..bundle import Bundle, reference_tensor_names
from ..options import WeightMode
from ..regions import PADDING, KeptTokens, MaskedReference, Stage, bucket, kept_tokens, key_access
from .reference import KeptReference

Float32Array = NDArray[np.float32]


class Source(ABC):
    """Where the keys of one reference come from. `tokens`: their number by factor."""

    tokens: Mapping[int, int]


class StoredKeys(Source):
    """Keys that were prepared. `on_device`: their arrays by step and name, if all of them are on the device."""

    def __init__(self, kept: KeptReference, on_device: Mapping[tuple[int, str], DeviceArray] | None = None) -> None:
        self.kept = kept
        self.tokens = kept.tokens
        self.on_device = on_device


class ComputedKeys(Source):
    """Keys that a `ReferencePass` computes at each step. `number`: the reference's number in the pass."""

    def __init__(self, number: int, tokens: Mapping[int, int]) -> None:
        self.number = number
        self.tokens = tokens


@dataclass(frozen=True)
class PlacedKeys:
    """The keys of a reference in an image. `concept` counts the image's concepts from 0."""

    source: Source
    concept: int
    weight: float


class ReferencePass:
    """Runs references through `reference_kv` at each step, beside the target.

    masks: uint8 [128, 128] each; text: [R, 77, D]; noised: a function from a step to the references' latents at its
    timestep, float32 [R, 4, h, w]; padded: whether token counts are padded to buckets.
    """

    def __init__(
        self,
        bundle: Bundle,
        binding: Binding,
        *,
        masks: Sequence[NDArray[np.uint8]],
        text: NDArray[Any],
        noised: Callable[[int], Float32Array],
        timesteps: Sequence[int],
        padded: bool = False,
    ) -> None:
        self.binding = binding
        self._noised, self._timesteps, self._rows = noised, timesteps, len(masks)
        self._ahead: tuple[int, Float32Array] | None = None
        self._first: dict[int, NDArray[np.int64]] = {}
        binding.set("text", text)
        marked = [MaskedReference(mask, number, 1.0) for number, mask in enumerate(masks)]
        for factor in bundle.factors:
            tokens = kept_tokens(marked, *bundle.grid(factor))
            self._first[factor] = np.searchsorted(tokens.concept[tokens.concept != PADDING], np.arange(len(masks) + 1))
            index = tokens.padded(bucket(tokens.count, binding.largest(f"M{factor}"))) if padded else tokens
            binding.set(f"kept_{factor}", index.index)

    @property
    def references(self) -> int:
        """The number of references, R."""
        return self._rows

    def sources(self) -> list[ComputedKeys]:
        """Return a source for each reference."""
        counts = {factor: np.diff(first) for factor, first in self._first.items()}
        return [ComputedKeys(n, {f: int(c[n]) for f, c in counts.items()}) for n in range(self._rows)]

    def rows_of(self, source: ComputedKeys, factor: int, output: str) -> OutputRows:
        """Return where a reference's keys are in an output."""
        return OutputRows(self.binding, output, int(self._first[factor][source.number]), source.tokens[factor])

    def prepare(self, step: int) -> None:
        """Noise the references for a step, while the device is busy."""
        self._ahead = (step, self._noised(step))

    def run(self, step: int) -> None:
        """Start the pass of a step."""
        if self._ahead is None or self._ahead[0] != step:
            self.prepare(step)
        assert self._ahead
        self.binding.set("latents", self._ahead[1])
        self.binding.set("timestep", np.full(self._rows, self._timesteps[step], np.int64))
        self.binding.run()


class KeyFeed:
    """The keys of a batch. `rows`: the references of each row of keys, in order; one row for all images or one each.

    binding       the binding of `denoise_step`
    computing     the pass that computes the `ComputedKeys`, None if there are none
    padded        pad token counts to buckets; rows of different lengths are always padded to the longest
    key_uploader  uploads keys ahead of need, None if there is no device or all keys are on it
    """

    def __init__(
        self,
        bundle: Bundle,
        binding: Binding,
        rows: Sequence[Sequence[PlacedKeys]],
        *,
        computing: ReferencePass | None = None,
        padded: bool = False,
        key_uploader: KeyUploader | None = None,
    ) -> None:
        self._binding = binding
        self._computing = computing
        self._key_uploader = key_uploader
        self._rows = [[placed for placed in row if placed.weight != 0] for row in rows]
        self._tensors = {
            name: (layer.factor, layer.width)
            for layer in bundle.injection_layers
            for name in reference_tensor_names(layer.index)
        }
        self.tokens = [{factor: _row_tokens(row, factor) for factor in bundle.factors} for row in self._rows]
        for factor in bundle.factors:
            longest = max(row[factor].count for row in self.tokens)
            if padded:
                longest = bucket(longest, binding.largest(f"M{factor}"))
            for row in self.tokens:
                row[factor] = row[factor].padded(longest)
        self._linked = self._is_reference_pass()
        self._started = False
        self._brought: tuple[int, dict[tuple[int, str], DeviceArray]] | None = None

    def access(self, stages: Sequence[Stage], weight_modes: Sequence[WeightMode]) -> Arrays:
        """Return `key_group`, `key_bias` and `key_scale` [K, M] by factor, for each row's stage and weight mode."""
        rows = [key_access(t, s, w) for t, s, w in zip(self.tokens, stages, weight_modes, strict=True)]
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    def start(self, step: int) -> None:
        """Put the step's keys into place, or enqueue that."""
        if self._computing is not None:
            self._computing.run(step)
        if self._linked:
            assert self._computing
            if not self._started:
                for name in self._tensors:
                    self._binding.link(name, self._computing.binding, name)
        elif any(self._rows) or not self._started:
            self._lay(step)
        self._started = True

    def prepare(self, step: int) -> None:
        """Get the next step's keys ready while the device computes."""
        if self._computing is not None:
            self._computing.prepare(step)
        if self._key_uploader is not None:
            self._bring(step)

    @property
    def rows(self) -> int:
        """The number of rows of keys: 1 if all images of the batch share theirs, else the number of images."""
        return len(self._rows)

    @property
    def seconds(self) -> float:
        """How long the last step's reference pass took, excluding time spent waiting."""
        return self._computing.binding.seconds if self._computing is not None else 0.0

    def check(self) -> None:
        """Raise NonFiniteError if the last step's reference pass gave values that are not finite."""
        if self._computing is not None:
            self._computing.binding.check()

    def non_finite_message(self, step: int) -> str:
        """Return a message on stored keys of a step that are not finite; "" if all are finite."""
        for source in (placed.source for row in self._rows for placed in row):
            if isinstance(source, StoredKeys) and (said := source.kept.non_finite_message(step)):
                return said
        return ""

    def _is_reference_pass(self) -> bool:
        """Whether there is one row of keys, and it is just what the pass puts out."""
        if self._computing is None or len(self._rows) != 1:
            return False
        numbers = [p.source.number if isinstance(p.source, ComputedKeys) else None for p in self._rows[0]]
        return numbers == list(range(self._computing.references))

    def _bring(self, step: int) -> None:
        assert self._key_uploader
        wanted = {}
        for row in self._rows:
            for placed in row:
                source = placed.source
                if isinstance(source, StoredKeys) and source.on_device is None:
                    for name, (factor, _) in self._tensors.items():
                        if source.tokens[factor] and (id(source), name) not in wanted:
                            wanted[(id(source), name)] = source.kept.tensors[name].step(step)
        self._brought = (step, self._key_uploader.bring(wanted) if wanted else {})

    def _lay(self, step: int) -> None:
        if self._key_uploader is not None and (self._brought is None or self._brought[0] != step):
            self._bring(step)
        for name, (factor, width) in self._tensors.items():
            shape = (len(self._rows), self.tokens[0][factor].count, width)
            self._binding.lay(name, shape, self._pieces(step, name, factor))
        if self._key_uploader is not None:
            self._key_uploader.used()

    def _pieces(self, step: int, name: str, factor: int) -> list[Piece]:
        pieces, seen = [], dict[int, Any]()
        for number, row in enumerate(self._rows):
            start = 0
            for placed in row:
                count = placed.source.tokens[factor]
                if count:
                    if id(placed.source) not in seen:  # 8-bit keys must be decoded, so once for all rows
                        seen[id(placed.source)] = self._values(placed.source, step, name, factor)
                    pieces.append(Piece(number, start, count, seen[id(placed.source)]))
                    start += count
        return pieces

    def _values(self, source: Source, step: int, name: str, factor: int) -> NDArray[Any] | DeviceArray | OutputRows:
        if isinstance(source, ComputedKeys):
            assert self._computing
            return self._computing.rows_of(source, factor, name)
        assert isinstance(source, StoredKeys)
        if source.on_device is not None:
            return source.on_device[(step, name)]
        if self._key_uploader is not None:
            assert self._brought
            return self._brought[1][(id(source), name)]
        return source.kept.tensors[name].step(step)


def _row_tokens(row: Sequence[PlacedKeys], factor: int) -> KeptTokens:
    """Like `kept_tokens`, for references whose keys are laid end to end."""
    counts = [placed.source.tokens[factor] for placed in row]
    total = sum(counts)
    if not total:
        return KeptTokens(np.zeros(1, np.int64), np.full(1, PADDING), np.zeros(1, np.float32))
    return KeptTokens(
        np.arange(total),
        np.repeat([placed.concept for placed in row], counts),
        np.repeat(np.array([placed.weight for placed in row], np.float32), counts),
    )
