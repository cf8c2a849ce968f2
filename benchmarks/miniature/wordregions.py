"""Find regions of finished pictures by the words' attention alone, to compare the method's own regions with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from magicface_rt.export.checkpoint import Checkpoint

from .architecture import scheduler
from .requests import Case
from .vocabulary import Vocabulary
from .wordmaps import Recorder, label_map, word_positions
from .world import PARTS, Pictures

TIMESTEP = 300


class WordRegions:
    """A checkpoint whose cross-attention is watched.

    Unlike the method's segmentation it has no smoothing by self-attention, no scale on the tokens of no concept, and no
    foreground. Every word that names a part competes, and the start token stands for the background.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._unet = checkpoint.load_unet(torch.float32).eval()
        self._vae = checkpoint.load_vae(torch.float32).eval()
        self._text = checkpoint.load_text_encoder(torch.float32).eval()
        self._scaling = checkpoint.vae_scaling_factor
        self._alpha = scheduler().alphas_cumprod[TIMESTEP]
        self._side = int(checkpoint.configs["unet"]["sample_size"]) // 2
        self._recorder = Recorder(self._unet, self._side**2)

    @torch.no_grad()
    def regions(self, case: Case, image: Tensor) -> Tensor:
        """Find the regions of an image float32 [3,h,w] in -1..1, which is noised first.

        Returns int64 [S/2,S/2]: k + 1 where concept k's word wins, else 0.
        """
        vocabulary = Vocabulary()
        ids = vocabulary.encode([case.caption])
        named = Pictures(torch.tensor([case.number]), image[None], torch.empty(0), [case.caption], case.target)
        clean = self._vae.encode(image[None]).latent_dist.mean * self._scaling
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(case.number))
        noised = self._alpha.sqrt() * clean + (1 - self._alpha).sqrt() * noise
        self._recorder.take()
        self._unet(noised, torch.tensor(TIMESTEP), self._text(input_ids=ids).last_hidden_state)
        found = label_map(
            [layer.words for layer in self._recorder.take()], word_positions(named, ids, vocabulary), self._side
        )[0]
        regions = torch.zeros_like(found)
        for k, part in enumerate(case.parts):
            regions[found == PARTS.index(part)] = k + 1
        return regions


def word_regions(checkpoint: Checkpoint, cases: Sequence[Case], images: Sequence[Tensor]) -> list[Tensor]:
    """The word regions of all pictures."""
    watched = WordRegions(checkpoint)
    return [watched.regions(case, image) for case, image in zip(cases, images, strict=True)]
