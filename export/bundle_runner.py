"""Replay recordings with a bundle in place of the PyTorch implementation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from magicface_rt.backends import Backend, GraphRunner
from magicface_rt.backends.host import to_contract_dtype
from magicface_rt.bundle import Bundle
from magicface_rt.denoiser import Guidance
from magicface_rt.options import WeightMode
from magicface_rt.regions import MaskedReference
from magicface_rt.single_step import Denoiser, ReferenceSet

from .recordings import Recording
from .replay import RunnerOutputs

ALL_OUTPUTS = (
    "latents_out",
    "region_label_out",
    "eps",
    "token_label",
    "token_margin",
    "foreground_margin",
    "rate",
)


class BundleStepRunner:
    """A bundle as a `StepRunner`: each call runs one `denoise_step` on recorded inputs, fed as Session feeds it."""

    def __init__(
        self,
        recording: Recording,
        bundle: Bundle,
        backend: Backend,
        *,
        weight_mode: WeightMode = "bias",
        runner: Callable[[str], GraphRunner] | None = None,
    ) -> None:
        """`runner`: returns a graph of the bundle that is loaded already, as `Session.runner` does."""
        load = runner or (lambda graph: backend.load(bundle, graph))
        self.name = f"bundle on {backend.name}"
        self.recording = recording
        self.bundle = bundle
        self.denoiser = Denoiser(bundle, load("reference_kv"), load("denoise_step"))
        inputs = recording.inputs
        self.references = ReferenceSet.of(
            bundle,
            [
                # A reference of no concept is seen in stage 1 only: its keys get a group that no cell ever has.
                MaskedReference(mask.astype(np.uint8), len(recording.tokens) if concept < 0 else concept, weight)
                for mask, concept, weight in zip(
                    inputs.ref_masks, recording.concept_of_reference, recording.weights, strict=True
                )
            ],
        )
        self.guidance = Guidance(
            text=to_contract_dtype(np.stack([inputs.neg_embeds, inputs.target_embeds]), bundle.dtype),
            tokens=recording.tokens,
            ca_scale=recording.ca_scale,
            scale=recording.guidance,
            semantic=recording.semantic_guidance,
            weight_mode=weight_mode,
        )
        self.reference_text = to_contract_dtype(inputs.ref_embeds, bundle.dtype)
        self.timesteps = recording.schedule.timesteps(recording.steps)
        self.coefficients = recording.schedule.step_coefficients(recording.steps)

    def run(self, step: int, latents: np.ndarray, regions: np.ndarray | None) -> RunnerOutputs:
        """Run one step from `latents` [1,4,h,w] and the previous regions bool [N,h/2,w/2]."""
        recording, timestep = self.recording, int(self.timesteps[step])
        noised = recording.schedule.add_noise(recording.inputs.ref_z0, recording.inputs.ref_noise[step], timestep)
        out = self.denoiser.step(
            np.asarray(latents, np.float32),
            timestep,
            self.coefficients[step],
            stage=recording.stage(step),
            region_label=self._label(regions),
            references=self.references,
            reference_kv=self.denoiser.reference_kv(self.references, noised, timestep, self.reference_text),
            guidance=self.guidance,
            outputs=ALL_OUTPUTS,
        )
        label, foreground = out["token_label"][0], out["foreground_margin"][0] > 0
        labelled = foreground | (recording.ca_scale >= 0.9)
        owned = [np.isin(label, list(tokens)) & labelled for tokens in recording.tokens]
        return RunnerOutputs(
            eps_u=out["eps"][0],
            eps_c=out["eps"][1],
            latents_out=out["latents_out"],
            token_label=label,
            regions=np.stack(owned) if owned else np.zeros((0, *label.shape), bool),
            foreground=foreground,
            rate=out["rate"][0],
            margin=out["token_margin"][0],
            fore_margin=np.abs(out["foreground_margin"][0]),
        )

    def _label(self, regions: np.ndarray | None) -> np.ndarray:
        """The region label; where two regions overlap, the later concept gets the cell."""
        label = np.zeros((1, self.bundle.rows // 2, self.bundle.columns // 2), np.int64)
        for concept, region in enumerate(regions if regions is not None else ()):
            label[0][np.asarray(region, bool)] = concept + 1
        return label
