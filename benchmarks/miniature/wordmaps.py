"""Where words look: attention maps of the coarse layers, and how well a word's map covers the part that it names.

The method's segmentation reads exactly these layers (grids of S/2, S/4, S/8): the words' maps, carried along the
self-attention. So both have to be right before the method can be judged: words must look at their parts, and places at
their own part. Where self-attention is uniform, whatever is carried along it is the same everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.nn import functional as F

from .vocabulary import Vocabulary
from .world import PARTS, Pictures

SHARPNESS = 6.0
"""Power of the scores in the contest of tokens: the others, 76 with a usual score of 1, must not win by their sum."""


@dataclass(frozen=True)
class Layer:
    """One layer's maps, averaged over heads.

    words [rows,n,77]: of its cross-attention; places [rows,n,n]: of the self-attention before it.
    """

    words: Tensor
    places: Tensor

    @property
    def spread(self) -> Tensor:
        """The words' maps carried along the self-attention, (S C + 3 S S C) / 4: [rows,n,77].

        This is what the method's segmentation reads (docs/design.md, "The algorithm").
        """
        once = self.places @ self.words
        return (once + 3 * (self.places @ once)) / 4


class Recorder:
    """Records the attentions of layers of at most `tokens` pixels."""

    def __init__(self, unet: UNet2DConditionModel, tokens: int) -> None:
        self._layers: list[Layer] = []
        self._places: Tensor | None = None
        self._tokens = tokens
        unet.set_attn_processor({name: _Recording(self, plain) for name, plain in unet.attn_processors.items()})

    def saw(self, probabilities: Tensor, cross: bool) -> None:
        """Record one attention. Each layer calls this in turn: a block's self-attention, then its cross-attention."""
        if not cross:
            self._places = probabilities
            return
        assert self._places is not None
        self._layers.append(Layer(probabilities, self._places))
        self._places = None

    def take(self) -> list[Layer]:
        """Return the layers of the pass just made, and start an empty list for the next."""
        layers, self._layers = self._layers, []
        return layers


class _Recording:
    def __init__(self, recorder: Recorder, fused: object) -> None:
        self._recorder, self._fused = recorder, fused

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **rest: object
    ) -> Tensor:
        recorded = hidden_states.shape[1] <= self._recorder._tokens
        # On a CPU the fused attention's backward pass is slow with heads this narrow.
        if not recorded and hidden_states.device.type != "cpu":
            return self._fused(attn, hidden_states, encoder_hidden_states, **rest)  # type: ignore[operator,no-any-return]
        seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # [rows,heads,tokens,width]

        q, k, v = heads(attn.to_q(hidden_states)), heads(attn.to_k(seen)), heads(attn.to_v(seen))
        logits = (q * attn.scale) @ k.transpose(-1, -2)
        probabilities = (logits.float() if recorded else logits).softmax(-1)
        if recorded:
            self._recorder.saw(probabilities.mean(1), encoder_hidden_states is not None)
        out = (probabilities.to(v.dtype) @ v).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))  # type: ignore[no-any-return]


def word_positions(pictures: Pictures, ids: Tensor, vocabulary: Vocabulary) -> Tensor:
    """The position of the word that names each part, int64 [n,parts].

    It is 0, the start token, for the background, and -1 if there is no word.
    """
    columns = [torch.zeros(len(ids), dtype=torch.int64)]
    for part in PARTS[1:]:
        numbers = torch.tensor([-1 if word is None else vocabulary.word(word) for word in pictures.words(part)])
        found = ids == numbers[:, None]
        columns.append(torch.where(found.any(1), found.int().argmax(1), -1))
    return torch.stack(columns, 1)


def part_shares(labels: Tensor, side: int) -> Tensor:
    """How much of each cell belongs to each part, float32 [n,side*side,parts]."""
    planes = torch.stack([labels == number for number in range(len(PARTS))], 1).float()
    return F.adaptive_avg_pool2d(planes, side).flatten(2).transpose(1, 2)


def inside(maps: list[Tensor], positions: Tensor, labels: Tensor) -> Tensor:
    """The share of a word's attention on its part, float32 [layers,rows,parts]; NaN if the part has no word."""
    parts = {n: part_shares(labels, math.isqrt(n)) for n in {probabilities.shape[1] for probabilities in maps}}
    shares = []
    for probabilities in maps:
        rows, n, _ = probabilities.shape
        words = probabilities.gather(2, positions.clamp(min=0)[:, None].expand(rows, n, -1))
        shares.append((words * parts[n]).sum(1) / words.sum(1).clamp(min=1e-12))
    return torch.stack(shares).masked_fill(positions < 0, math.nan)


def grounding_loss(shares: Tensor, signal: Tensor) -> Tensor:
    """Mean of -log(share inside) over layers and named parts.

    `signal` [rows] in 0..1 weighs rows by how much of the picture the noise has left.
    """
    named = ~shares.isnan()
    loss = -(torch.where(named, shares, 1.0) + 1e-3).log() * signal[None, :, None]
    return loss.sum() / named.sum()


def contest_loss(maps: list[Tensor], positions: Tensor, labels: Tensor, signal: Tensor, side: int) -> Tensor:
    """Mean of -log(chance that a part's word wins the part's cells), over the named parts except the background.

    Tokens compete as in `label_map`; `signal` is as in `grounding_loss`. That a word looks at its part is not enough:
    an article or a full stop that looks there as well may win the cell, which then belongs to no concept.
    """
    chances = (SHARPNESS * _scores(maps, side).flatten(2).clamp(min=1e-6).log()).log_softmax(1)  # [rows,77,cells]
    positions = positions[:, 1:]
    of_words = chances.gather(1, positions.clamp(min=0)[:, :, None].expand(-1, -1, chances.shape[2]))
    cells = part_shares(labels, side)[:, :, 1:].transpose(1, 2) * (positions >= 0)[:, :, None]  # [rows,parts,cells]
    area = cells.sum(2)
    loss = -(cells * of_words).sum(2) / area.clamp(min=1e-6) * signal[:, None]
    return loss[area > 0].sum() / (area > 0).sum().clamp(min=1)


def label_map(maps: list[Tensor], positions: Tensor, side: int) -> Tensor:
    """The part whose word scores highest among all 77 tokens, int64 [rows,side,side]; -1 if that token names no part.

    A token's score is its map over its own spatial mean, averaged over the layers, as in the method, but without the
    smoothing kernel.
    """
    winner = _scores(maps, side).argmax(1)  # [rows,side,side]
    labels = torch.full_like(winner, -1)
    for part in range(positions.shape[1]):
        place = positions[:, part, None, None]
        labels[(winner == place) & (place >= 0)] = part
    return labels


def _scores(maps: list[Tensor], side: int) -> Tensor:
    """Each token's map over its own spatial mean, averaged over layers: float32 [rows,tokens,side,side]."""
    score: Tensor | float = 0.0
    for probabilities in maps:
        rows, n, tokens = probabilities.shape
        grid = math.isqrt(n)
        image = probabilities.transpose(1, 2).reshape(rows, tokens, grid, grid)
        image = F.interpolate(image, size=(side, side), mode="bilinear")
        score = score + image / image.mean((2, 3), keepdim=True).clamp(min=1e-8) / len(maps)
    assert isinstance(score, Tensor)
    return score


def overlap(found: Tensor, labels: Tensor) -> dict[str, float]:
    """Intersection over union by part, over all rows: `found` [n,side,side] against the commonest part of each cell."""
    side = found.shape[-1]
    truth = part_shares(labels, side).argmax(2).view_as(found)
    result = {}
    for number, part in enumerate(PARTS):
        both, either = ((found == number) & (truth == number)).sum(), ((found == number) | (truth == number)).sum()
        result[part] = (both / either.clamp(min=1)).item()
    return result
