"""The two stages of training: the autoencoder, then the U-Net together with the text encoder.

Everything in a step follows from (seed, pictures seen, number of processes), so a run that was stopped continues bit
for bit as if it had not been.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from . import sheets
from .architecture import Miniature, Size, build_autoencoder, build_text_encoder, build_unet, scheduler
from .crew import Crew
from .state import load_optimiser, optimiser_tensors, read_state, with_prefix, without_prefix, write_state
from .vocabulary import Vocabulary
from .wordmaps import Recorder, contest_loss, grounding_loss, inside, label_map, overlap, word_positions
from .world import PARTS, Pictures, World

ALONE = Crew()
SHEET_WORLD = 1_000_003  # the seed of the pictures on sheets, which training never sees


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a stage is trained; lengths are in pictures, so a plan means the same at every batch size."""

    pictures: int
    batch: int
    rate: float
    warm_up: int = 5_000
    plateau: int = 100_000  # from here on the rate falls with the root of the pictures seen
    landing: float = 0.15  # share of the pictures over which the rate falls to 2 % at the end
    average: int = 30_000  # half life of the averaged weights
    dropout: float = 0.1
    snr: float = 5.0
    grounding: float = 0.0

    def learning_rate(self, seen: int) -> float:
        rise = min(1.0, (seen + self.batch) / self.warm_up)
        fall = math.sqrt(self.plateau / max(self.plateau, seen))
        landing = min(1.0, max(0.0, self.pictures - seen) / (self.landing * self.pictures))
        return self.rate * rise * fall * (0.02 + 0.98 * landing)

    def forgetting(self, seen: int) -> float:
        """The part of the averaged weights that a step replaces; the half life grows with the run at first."""
        return 1.0 - 0.5 ** (self.batch / min(self.average, 0.07 * seen + self.batch))


class Stage(ABC):
    """A stage in training: networks, their averages, the optimiser and the count of pictures seen."""

    name: str

    def __init__(
        self, size: Size, plan: Plan, networks: dict[str, nn.Module], *, seed: int, device: torch.device, bf16: bool
    ) -> None:
        self.size, self.plan, self.seed, self.device, self.bf16 = size, plan, seed, device, bf16
        self.networks = {name: network.to(device) for name, network in networks.items()}
        self._parameters = {
            f"{n}.{k}": p for n, network in self.networks.items() for k, p in network.named_parameters()
        }
        self.average = {name: p.detach().clone() for name, p in self._parameters.items()}
        decay = [p for p in self._parameters.values() if p.ndim > 1]
        rest = [p for p in self._parameters.values() if p.ndim <= 1]
        groups = [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=plan.rate, betas=(0.9, 0.99), fused=True)
        self.world = World(size=size.pixels, seed=seed)
        self.seen = 0

    @abstractmethod
    def loss(self, numbers: range, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of these pictures, and figures for the log."""

    @abstractmethod
    def sheet(self, path: Path) -> dict[str, float]:
        """Write a sheet of what the averaged weights do; return figures for the log."""

    @property
    def done(self) -> bool:
        return self.seen >= self.plan.pictures

    def step(self, crew: Crew = ALONE) -> dict[str, Tensor]:
        """Take one step on the next pictures, which the crew shares. The figures are of this process's part."""
        plan, numbers = self.plan, crew.part(range(self.seen, self.seen + self.plan.batch))
        generator = torch.Generator(self.device).manual_seed(
            (self.seed * 1_000_003 + numbers[0]) * 2 + (self.name == "denoiser")
        )
        rate = plan.learning_rate(self.seen)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        loss, figures = self.loss(numbers, generator)
        loss.backward()  # type: ignore[no-untyped-call]
        crew.average(p.grad for p in self._parameters.values() if p.grad is not None)
        norm = nn.utils.clip_grad_norm_(self._parameters.values(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.seen += plan.batch
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.values()), list(self._parameters.values()), plan.forgetting(self.seen)
            )
        return {"loss": loss.detach(), "norm": norm, **figures}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights into the networks within this context, for sheets and for writing them out."""
        live = {name: p.detach().clone() for name, p in self._parameters.items()}
        try:
            self._put(self.average)
            yield
        finally:
            self._put(live)

    def _put(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, p in self._parameters.items():
                p.copy_(values[name])

    def save(self, folder: Path) -> None:
        tensors = {
            **with_prefix("live", dict(self._parameters)),
            **with_prefix("average", self.average),
            **with_prefix("optimiser", optimiser_tensors(self.optimiser)),
        }
        write_state(
            folder, tensors, {"seen": self.seen, "seed": self.seed, "size": self.size.name, "plan": asdict(self.plan)}
        )

    def load(self, folder: Path) -> bool:
        """Load the state in `folder` to continue from; return False if there is none.

        The plan stays this stage's own, so a run can be made longer.
        """
        state = read_state(folder)
        if state is None:
            return False
        tensors, counters = state
        if (counters["seed"], counters["size"]) != (self.seed, self.size.name):
            raise SystemExit(
                f"{folder}: a run of size {counters['size']} and seed {counters['seed']}, "
                f"expected {self.size.name} and {self.seed}; use another --out"
            )
        self._put(without_prefix("live", tensors))
        for name, tensor in without_prefix("average", tensors).items():
            self.average[name].copy_(tensor)
        load_optimiser(self.optimiser, without_prefix("optimiser", tensors))
        self.seen = counters["seen"]
        return True


class AutoencoderStage(Stage):
    """Pixels to latents and back.

    The loss is L1 on pixels and on their differences (edges), squares on the errors of cells' mean colours, and a small
    pull towards unit normal.
    """

    name = "autoencoder"
    EDGES, COLOURS, PULL = 1.0, 10.0, 1e-4

    def __init__(self, size: Size, plan: Plan, *, seed: int, device: torch.device, bf16: bool = False) -> None:
        torch.manual_seed(seed)
        self.vae = build_autoencoder(size)
        super().__init__(size, plan, {"vae": self.vae}, seed=seed, device=device, bf16=bf16)

    def loss(self, numbers: range, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        images = self.world.draw(numbers, device=self.device).images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            posterior = self.vae.encode(images).latent_dist
            latents = posterior.mean + posterior.std * torch.randn(
                posterior.mean.shape, generator=generator, device=self.device
            )
            back = self.vae.decode(latents).sample.float()
        pixels = (back - images).abs().mean()
        edges = sum(((back - images).diff(dim=d)).abs().mean() for d in (2, 3))
        pull = posterior.kl().float().mean() / posterior.mean[0].numel()
        colours = F.avg_pool2d(back - images, self.size.factor).square().mean()
        loss = pixels + self.EDGES * edges + self.COLOURS * colours + self.PULL * pull
        return loss, {"pixels": pixels.detach(), "colours": colours.detach(), "pull": pull.detach()}

    @torch.no_grad()
    def sheet(self, path: Path) -> dict[str, float]:
        images = World(size=self.size.pixels, seed=SHEET_WORLD).draw(range(24), device=self.device).images
        with self.averaged():
            back = self.vae.decode(self.vae.encode(images).latent_dist.mean).sample
        sheets.save(
            torch.stack([images, back], 1).flatten(0, 1), path, columns=8, enlarge=3 if self.size.pixels < 128 else 1
        )
        return {"sheet_pixels": (back - images).abs().mean().item()}

    @torch.no_grad()
    def finished(self) -> AutoencoderKL:
        """Return the averaged autoencoder, its scaling factor set so that latents have a standard deviation of 1."""
        self._put(self.average)
        worlds = World(size=self.size.pixels, seed=SHEET_WORLD)
        latents = torch.cat(
            [
                self.vae.encode(worlds.draw(range(i, i + 32), device=self.device).images).latent_dist.mean
                for i in range(0, 512, 32)
            ]
        )
        self.vae.register_to_config(scaling_factor=round(1.0 / latents.std().item(), 5))
        return self.vae.requires_grad_(False).eval()


class DenoiserStage(Stage):
    """Predicts the noise in latents from latents, time and text; the text encoder is trained along with the U-Net."""

    name = "denoiser"

    def __init__(
        self,
        size: Size,
        plan: Plan,
        vae: AutoencoderKL,
        *,
        seed: int,
        device: torch.device,
        bf16: bool = False,
        compiled: bool = False,
    ) -> None:
        torch.manual_seed(seed + 1)
        self.vae, self.vocabulary = vae, Vocabulary()
        self.unet, self.text_encoder = build_unet(size), build_text_encoder(size, self.vocabulary)
        super().__init__(
            size, plan, {"unet": self.unet, "text_encoder": self.text_encoder}, seed=seed, device=device, bf16=bf16
        )
        self.recorder = Recorder(self.unet, (size.side // 2) ** 2)
        self.alphas = scheduler().alphas_cumprod.to(device)
        self._forward = torch.compile(self.unet) if compiled else self.unet

    def loss(self, numbers: range, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        plan, device = self.plan, self.device
        pictures = self.world.draw(numbers, device=device)
        n = len(numbers)
        ids = self.vocabulary.encode([*pictures.captions, ""])
        positions = word_positions(pictures, ids[:-1], self.vocabulary).to(device)
        t = torch.randint(0, 1000, (n,), generator=generator, device=device)
        empty = torch.rand(n, generator=generator, device=device) < plan.dropout
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            with torch.no_grad():
                latents = self.vae.encode(
                    pictures.images.contiguous(memory_format=torch.channels_last)
                ).latent_dist.mean.float()
            clean = latents * self.vae.config.scaling_factor
            noise = torch.randn(clean.shape, generator=generator, device=device)
            alpha = self.alphas[t].view(-1, 1, 1, 1)
            noised = (alpha.sqrt() * clean + (1 - alpha).sqrt() * noise).contiguous(memory_format=torch.channels_last)
            text = self.text_encoder(ids.to(device)).last_hidden_state  # [n+1,77,D]; the last is the empty caption's
            row = torch.where(empty, n, torch.arange(n, device=device))
            eps = self._forward(noised, t, text[row]).sample.float()
        snr = alpha / (1 - alpha)
        errors = (eps - noise).square() * (snr.clamp(max=plan.snr) / snr)
        positions[:, 1:] = positions[:, 1:].masked_fill(empty[:, None], -1)
        layers = self.recorder.take()
        shares = inside([m for layer in layers for m in (layer.words, layer.spread)], positions, pictures.labels)
        loss = errors.mean()
        figures = {"error": errors.detach().mean(), "inside": shares.detach()[:, :, 1:].nanmean()}
        if plan.grounding:
            signal = alpha.flatten().sqrt()
            contest = contest_loss(
                [layer.spread for layer in layers], positions, pictures.labels, signal, self.size.side // 2
            )
            loss = loss + plan.grounding * (grounding_loss(shares, signal) + contest)
            figures["contest"] = contest.detach()
        return loss, figures

    def model(self) -> Miniature:
        return Miniature(self.size, self.vocabulary, self.vae, self.text_encoder, self.unet)

    @torch.no_grad()
    def sheet(self, path: Path) -> dict[str, float]:
        """Write pictures, with what the model makes of their captions below each row.

        `*-words.png` has the pictures, the true parts and the found parts.
        """
        truth = World(size=self.size.pixels, seed=SHEET_WORLD).draw(range(24), device=self.device)
        enlarge = 3 if self.size.pixels < 128 else 1
        with self.averaged():
            made = self.model().sample(truth.captions, seed=self.seed)
            self.recorder.take()
            found, positions = self._words(truth, t=300)
        rows = torch.cat([torch.cat([truth.images[i : i + 8], made[i : i + 8]]) for i in range(0, 24, 8)])
        sheets.save(rows, path, columns=8, enlarge=enlarge)
        path.with_suffix(".txt").write_text("\n".join(truth.captions) + "\n", encoding="utf-8")
        coloured = sheets.coloured(F.interpolate(found[:, None].float(), size=truth.labels.shape[1:]).long()[:, 0])
        stacked = torch.stack([truth.images, sheets.coloured(truth.labels.long()), coloured], 1).flatten(0, 1)
        sheets.save(stacked, path.with_name(path.stem + "-words.png"), columns=12, enlarge=enlarge)
        named = (positions >= 0).any(0)
        scores = {part: score for part, score in overlap(found, truth.labels).items() if named[PARTS.index(part)]}
        return {"iou": sum(scores.values()) / len(scores), **{f"iou_{part}": score for part, score in scores.items()}}

    def _words(self, pictures: Pictures, *, t: int) -> tuple[Tensor, Tensor]:
        """The label map and word positions of drawn pictures that are noised to time t."""
        ids = self.vocabulary.encode(pictures.captions)
        positions = word_positions(pictures, ids, self.vocabulary).to(self.device)
        clean = self.vae.encode(pictures.images).latent_dist.mean * self.vae.config.scaling_factor
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        noised = self.alphas[t].sqrt() * clean + (1 - self.alphas[t]).sqrt() * noise
        self.unet(noised, torch.tensor(t, device=self.device), self.text_encoder(ids.to(self.device)).last_hidden_state)
        return label_map([layer.spread for layer in self.recorder.take()], positions, self.size.side // 2), positions
