"""PyTorch's contenders in a benchmark's process: the baselines, and the reference as the judge of parity."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from magicface_rt.export.checkpoint import Checkpoint
from magicface_rt.export.graphs import Form, VaeDecoder, VaeEncoder
from magicface_rt.export.reference import CONSTRAINED_BELOW, MagicFaceReference, StepInputs, generate_latents
from magicface_rt.images import load_reference, pixels_to_images
from magicface_rt.schedule import reference_noise
from magicface_rt.tokenizer import Tokenizer

from .baselines.authors import Authors
from .baselines.plain import Plain
from .baselines.strong import Compiled, Strong
from .contender import Run, Runner, Task, as_torch
from .counting import TorchCounter
from .workload import GUIDANCE, PROMPT, WEIGHT, Moment

KINDS = {"authors": Authors, "strong": Strong, "compiled": Compiled, "reference": MagicFaceReference}


class PyTorch(Runner):
    """A contender of PyTorch's.

    Plain Stable Diffusion makes the images of a batch together. The baselines' step is that of one image, so theirs are
    made one after another.
    """

    def __init__(self, task: Task) -> None:
        settings = task.settings
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.kind = task.contender.kind
        self.settings = settings
        self.bundle, self.workload = task.open()
        self.device = _device(settings.torch_device)
        self.on_device = self.device == "cuda"
        # A GPU computes in the bundle's precision, as it would when serving; a CPU is fast in float32 only.
        self.dtype = getattr(torch, self.bundle.dtype) if self.device == "cuda" else torch.float32
        assert settings.checkpoint is not None
        self.checkpoint = Checkpoint.open(settings.checkpoint)
        unet = self.checkpoint.load_unet(self.dtype).to(self.device)
        self.network: Any
        if self.kind == "plain":
            self.network = Plain(unet, self.bundle.schedule, task.case.steps)
        else:
            layers = [layer.index for layer in self.bundle.injection_layers]
            self.network = KINDS[self.kind](unet, injection_layers=layers)
        self.like = torch.empty(0, dtype=self.dtype, device=self.device)
        self._parts: Any = None
        if task.case.images > 1 and self.kind != "plain":
            self.notes += ("images are made one after another",)
        if self.kind == "compiled":
            self.notes += ("compiled code is not seen by the counter of operations",)

    def load(self) -> None:
        self._load_parts()

    # ----------------------------------------------------------------------------------------------------- single steps

    def run(self) -> Run:
        work = self.workload
        latents = self._batches(work.noise())
        regions: list[Tensor | None] = [None] * len(latents)
        margins: list[Tensor | None] = [None] * len(latents)
        costs: dict[str, dict[str, float]] = {"rows": {}, "flops": {}, "bytes": {}}
        moments = work.run(self.settings.parity_steps)
        if self.kind == "plain":
            self.network.scheduler.set_timesteps(len(moments))
        for moment in moments:
            # The first step of a stage is counted; counting changes no result.
            counter = TorchCounter() if moment.stage not in costs["rows"] and self.kind != "compiled" else None
            before = getattr(self.network, "rows_run", 0)
            with counter or contextlib.nullcontext():
                for image, x in enumerate(latents):
                    latents[image], regions[image], margins[image] = self._step(moment, x, regions[image])
            costs["rows"].setdefault(moment.stage, getattr(self.network, "rows_run", 0) - before)
            if counter is not None:
                costs["flops"][moment.stage] = counter.cost.flops
                costs["bytes"][moment.stage] = counter.cost.bytes
        if self.kind == "plain":
            self.network.scheduler.set_timesteps(work.case.steps)
        labels = np.zeros((work.case.images, *work.region_label.shape), np.int64)
        for image, found in enumerate(regions):
            for k, region in enumerate([] if found is None else found.cpu().numpy()):
                labels[image][region] = k + 1
        sixteen_bit = self.dtype != torch.float32
        known = [m.float().cpu().numpy() for m in margins if m is not None]
        margin = np.stack(known) if known else None
        found = torch.cat(latents).float().cpu().numpy()
        return Run(found, labels, **costs, sixteen_bit=sixteen_bit, margin=margin)  # type: ignore[arg-type]

    def step(self, stage: str) -> dict[str, float]:
        moment = self.workload.moment(stage)
        latents = self._batches(self.workload.noise())
        regions = torch.from_numpy(self.workload.regions).to(self.device)
        self._wait()
        start = perf_counter()
        for x in latents:
            self._step(moment, x, regions)
        self._wait()
        return {stage: perf_counter() - start}

    def _batches(self, noise: np.ndarray[Any, Any]) -> list[Tensor]:
        """What goes through a step together: all images, or each alone."""
        return [self._tensor(noise)] if isinstance(self.network, Plain) else [self._tensor(x[None]) for x in noise]

    def _step(
        self, moment: Moment, latents: Tensor, regions: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Do a step; return latents, regions, and how far each cell is from another region."""
        work = self.workload
        if self.kind == "plain":
            return self.network.step(moment.index, latents, self._tensor(work.text[:2]), GUIDANCE), None, None
        out = self.network.step(
            StepInputs(
                latents=latents,
                timestep=moment.timestep,
                text=self._tensor(work.text[:2]),
                references=self._tensor(moment.noised),
                reference_text=self._tensor(work.text[2:]),
                reference_masks=torch.from_numpy(work.masks.astype(bool)).to(self.device),
                weights=self._tensor(np.full(work.case.concepts, WEIGHT, np.float32)),
                concept_of_reference=tuple(range(work.case.concepts)),
                tokens=work.tokens,
                stage=moment.stage,
                regions=regions if moment.stage == "rba" else None,
                ca_scale=work.ca_scale,
                guidance=GUIDANCE,
                coefficients=moment.coefficients.tolist(),
            )
        )
        margin = out.margin if work.ca_scale >= CONSTRAINED_BELOW else torch.minimum(out.margin, out.fore_margin)
        return out.latents, out.regions, margin

    # --------------------------------------------------------------------------------------------------------- requests

    def request(self) -> dict[str, float]:
        work = self.workload
        tokenizer, encoder, vae_encoder, vae_decoder = self._load_parts()
        clock = _Clock(self._wait)
        concepts = work.concepts() if self.kind != "plain" else []
        prompts = ["", PROMPT, *(c.references[0].prompt for c in concepts)]
        with torch.no_grad():
            with clock.stage("loading"):
                loaded = [load_reference(c.references[0], name=c.name) for c in concepts]
            with clock.stage("text"):
                ids = torch.from_numpy(np.stack([tokenizer.encode(p) for p in prompts])).to(self.device)
                text = encoder(input_ids=ids).last_hidden_state
            z0 = self._tensor(work.z0[:0])
            if loaded:
                with clock.stage("vae_encode"):
                    pixels = np.concatenate([x.pixels(self.bundle.height, self.bundle.width) for x in loaded])
                    z0 = vae_encoder(self._tensor(pixels)).to(self.dtype)
            stages = work.stages(self.settings.alpha)
            latents = []
            for x in self._batches(work.noise()):
                for stage, step in zip(stages, self._steps(x, text, z0, loaded, stages, tokenizer), strict=True):
                    with clock.stage("steps" if self.kind == "plain" else f"{stage}_steps"):
                        x = step()
                latents.append(x)
            with clock.stage("decode"):
                for x in torch.cat(latents).split(1):
                    pixels_to_images(vae_decoder(x.float()).float().cpu().numpy())
            seconds = clock.finished()
            self.latents = torch.cat(latents).float().cpu().numpy()
        return seconds

    def _steps(self, x: Tensor, text: Tensor, z0: Tensor, loaded: Any, stages: Any, tokenizer: Any) -> Iterator[Any]:
        """Yield a function for each step, to be called in turn; it returns the latents after the step."""
        steps = self.workload.case.steps
        if self.kind == "plain":
            latents = x
            for i in range(steps):

                def plain(i: int = i) -> Tensor:
                    nonlocal latents
                    latents = self.network.step(i, latents, text[:2], GUIDANCE)
                    return latents

                yield plain
            return
        concepts = self.workload.concepts()
        noise = np.stack([np.repeat(reference_noise(0, i, self.workload.shape), len(z0), 0) for i in range(steps)])
        masks = [x.mask_grid for x in loaded] or np.zeros((0, 128, 128))
        outputs = generate_latents(
            self.network,
            x_T=x,
            text=text[:2],
            z0=z0,
            noise=torch.from_numpy(noise),
            reference_text=text[2:],
            reference_masks=torch.from_numpy(np.asarray(masks).astype(bool)).to(self.device),
            weights=self._tensor(np.full(len(concepts), WEIGHT, np.float32)),
            concept_of_reference=range(len(concepts)),
            tokens=[tokenizer.find_word(PROMPT, c.word) for c in concepts],
            schedule=self.bundle.schedule,
            ca_scale=self.workload.ca_scale,
            stages=stages,
        )
        for _ in range(steps):
            yield lambda: next(outputs).latents

    def _load_parts(self) -> Any:
        if self._parts is None:
            form = Form.of(self.bundle, torch.float32)
            file = self.bundle.path / self.bundle.tokenizer["file"]
            tokenizer = Tokenizer.from_file(
                file,
                pad_token_id=int(self.bundle.tokenizer["pad_token_id"]),
                max_length=int(self.bundle.tokenizer["max_length"]),
            )
            # The VAE stays in float32, where a 16-bit one would make black pictures on some checkpoints.
            vae = self.checkpoint.load_vae(torch.float32)
            self._parts = (
                tokenizer,
                self.checkpoint.load_text_encoder(self.dtype).to(self.device),
                _Float32(VaeEncoder(vae, form).eval().to(self.device)),
                VaeDecoder(vae, form).eval().to(self.device),
            )
        return self._parts

    # ------------------------------------------------------------------------------------------------------------ small

    def _tensor(self, array: Any) -> Tensor:
        return as_torch(array, self.like)

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def threads(self) -> int | None:
        return torch.get_num_threads() if self.device == "cpu" else None


class Judge(PyTorch):
    """The oracle of parity. For a 16-bit bundle it also shows what rounding to 16 bits costs."""

    def become_plain(self) -> None:
        """From now on leave out concepts, segmentation and semantic guidance, as plain Stable Diffusion must."""
        self.network, self.kind = _PlainByReference(self.network, self.bundle.schedule), "plain"

    def rounded(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the output of every layer is rounded to the bundle's 16 bits."""
        return _rounded(self.network.unet, getattr(torch, self.bundle.dtype))


class _PlainByReference:
    """`Plain.step`, computed by the reference with nothing to inject and a rate of 1."""

    def __init__(self, network: Any, schedule: Any) -> None:
        self.network, self.schedule, self.scheduler = network, schedule, self
        self.unet, self.steps = network.unet, 1

    def set_timesteps(self, steps: int) -> None:
        self.steps = steps

    def step(self, index: int, latents: Tensor, text: Tensor, guidance: float) -> Tensor:
        nothing = latents[:0]
        out = self.network.step(
            StepInputs(
                latents=latents,
                timestep=int(self.schedule.timesteps(self.steps)[index]),
                text=text,
                references=nothing,
                reference_text=text[:0],
                reference_masks=torch.zeros(0, 128, 128, dtype=torch.bool),
                weights=latents.new_zeros(0),
                concept_of_reference=(),
                tokens=(),
                stage="off",
                regions=None,
                ca_scale=0.9,
                guidance=guidance,
                coefficients=self.schedule.step_coefficients(self.steps)[index].tolist(),
                semantic_guidance=False,
            )
        )
        return out.latents


class _Float32:
    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, pixels: Tensor) -> Tensor:
        return self.module(pixels.float())


class _Clock:
    def __init__(self, wait: Any) -> None:
        self._wait, self._start, self._seconds = wait, perf_counter(), {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = perf_counter()
        yield
        self._wait()
        self._seconds[name] = self._seconds.get(name, 0.0) + perf_counter() - start

    def finished(self) -> dict[str, float]:
        return {**self._seconds, "total": perf_counter() - self._start}


@contextlib.contextmanager
def _rounded(module: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    def hook(_: Any, __: Any, output: Any) -> Any:
        is_float = isinstance(output, Tensor) and output.is_floating_point()
        return output.to(dtype).to(output.dtype) if is_float else output

    handles = [m.register_forward_hook(hook) for m in module.modules() if not list(m.children())]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name
