"""The SDK in a benchmark's process: single steps over the backend's bindings, requests by Session."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magicface_rt import Bundle, Session
from magicface_rt.backends import Backend, Binding, GraphRunner, open_backend
from magicface_rt.backends.base import Arrays
from magicface_rt.backends.host import to_bfloat16
from magicface_rt.denoiser import STATE, Guidance
from magicface_rt.process.cores import cores
from magicface_rt.regions import cell_groups, key_access
from magicface_rt.single_step import Denoiser, ReferenceSet, padding_keys

from .contender import Run, Runner, Task
from .workload import GUIDANCE, PROMPT, Moment


class Ours(Runner):
    """The SDK as a contender: "bare" runs the reference pass at each step, "kept" reads keys that `prepare` wrote."""

    def __init__(self, task: Task) -> None:
        self.settings, self.case = task.settings, task.case
        self._name = task.contender.backend
        self.on_device = self._name != "onnxruntime-cpu"
        self.bundle, self.workload = task.open()
        self.backend = _open(task, self.bundle)
        self.folder = Path(task.folder)
        self.kept = task.contender.kind == "kept"
        self.with_references = bool(task.case.concepts)
        # If there are requests, the Session's graphs are used for steps as well, so none is loaded twice.
        self.session = Session(self.bundle, backend=self.backend) if task.settings.request_rounds else None
        self._runners: dict[str, GraphRunner] = {}
        self._bindings: tuple[Binding, Binding | None] | None = None
        self._keys: dict[str, Arrays] = {}
        self._prepared: list[Any] | None = None
        self.references = ReferenceSet.of(self.bundle, self.workload.masked)
        if self.on_device and self.kept and self.with_references:
            self.notes += ("a single step uploads its keys and values; a Session holds them on the device",)

    def load(self) -> None:
        assert self.session is not None
        for graph in ("text_encoder", "denoise_step", "vae_decoder"):
            self.session.runner(graph)
        for graph in ("vae_encoder", "reference_kv") if self.with_references and not self.kept else ():
            self.session.runner(graph)

    def run(self) -> Run:
        latents, label = (
            self.workload.noise(),
            np.zeros((self.case.images, *self.workload.region_label.shape), np.int64),
        )
        rows: dict[str, int] = {}
        for moment in self.workload.run(self.settings.parity_steps):
            step, kv = self._bound()
            self._set_stage(step, moment.stage, label)
            step.set("latents", latents)
            self._start(step, kv, moment)
            step.wait()
            latents, label = step.read("latents_out"), step.read("region_label_out")
            rows.setdefault(moment.stage, self._rows)
        return Run(latents, label, rows, sixteen_bit=self.bundle.dtype != "float32")

    def step(self, stage: str) -> dict[str, float]:
        moment = self.workload.moment(stage)
        step, kv = self._bound()
        self._set_stage(step, stage, np.stack([self.workload.region_label] * self.case.images))
        step.set("latents", self.workload.noise())
        if self.kept:
            self._load_keys(moment)
        start = perf_counter()
        self._start(step, kv, moment)
        step.wait()
        seconds = {stage: perf_counter() - start}
        if kv is not None:
            seconds["reference_pass"] = kv.seconds
        return seconds

    def request(self) -> dict[str, float]:
        assert self.session is not None
        if self._prepared is None:
            concepts = self.workload.concepts()
            self._prepared = _load_prepared(self.folder, concepts) if self.kept else list(concepts)
        result = self.session.generate(PROMPT, self._prepared, options=self.workload.options(self.settings.alpha))
        self.latents, timings = result.latents, result.timings
        stages = self.workload.stages(self.settings.alpha)
        # The reference pass costs the same at every step, so its share is taken off each.
        apart = timings.reference_pass / len(timings.steps)
        spent = {"rsa_steps": 0.0, "rba_steps": 0.0}
        for i, seconds in enumerate(timings.steps):
            spent[f"{stages[i % len(stages)]}_steps"] += seconds - apart
        return {
            "loading": timings.loading,
            "text": timings.text_encoding,
            "vae_encode": timings.image_encoding,
            "reference_pass": timings.reference_pass,
            **spent,
            "decode": timings.decoding,
            "total": timings.total,
        }

    def threads(self) -> int | None:
        return self.settings.threads or cores() if not self.on_device else None

    def kept_bytes(self) -> int:
        if not self.kept or not self.with_references:
            return 0
        return sum(array.nbytes for array in self._load_keys(self.workload.moment("rba")).values())

    def close(self) -> None:
        if self.session is not None:
            self.session.close()
        for binding in self._bindings or ():
            if binding is not None:
                binding.close()
        for runner in self._runners.values():
            runner.close()
        self.backend.close()

    # --------------------------------------------------------------------------------------------------------- one step

    def _runner(self, graph: str) -> GraphRunner:
        if self.session is not None:
            return self.session.runner(graph)
        if graph not in self._runners:
            self._runners[graph] = self.backend.load(self.bundle, graph)
        return self._runners[graph]

    def _bound(self) -> tuple[Binding, Binding | None]:
        """Bind `denoise_step` and, if it runs, `reference_kv`, and set what stays the same from step to step."""
        if self._bindings is not None:
            return self._bindings
        step = self._runner("denoise_step").bind(STATE)
        text = as_bundle_dtype(self.workload.text, self.bundle)
        guidance = Guidance(
            text=np.repeat(text[:2, None], self.case.images, axis=1),
            tokens=self.workload.tokens,
            ca_scale=self.workload.ca_scale,
            scale=GUIDANCE,
            semantic=True,
            weight_mode="bias",
        )
        self._text_shape = guidance.text.shape
        for name, array in guidance.arrays.items():
            step.set(name, array)
        kv = None
        if self.with_references and not self.kept:
            kv = self._runner("reference_kv").bind(beside=step)
            kv.set("text", text[2:])
            for name, array in self.references.arrays.items():
                kv.set(name, array)
        if not self.with_references:
            for name, array in padding_keys(self.bundle).items():
                step.set(name, array)
        self._bindings = step, kv
        return step, kv

    def _set_stage(self, step: Binding, stage: Any, label: NDArray[np.int64]) -> None:
        step.set("region_label", cell_groups(stage, label))
        for name, array in key_access(self.references.kept, stage, "bias").items():
            step.set(name, array)

    def _start(self, step: Binding, kv: Binding | None, moment: Moment) -> None:
        self._rows = self._text_shape[0] * self._text_shape[1]
        if kv is not None:
            kv.set("latents", moment.noised)
            kv.set("timestep", np.full(len(moment.noised), moment.timestep, np.int64))
            kv.run()
            self._rows += len(moment.noised)
            for name in kv.outputs:
                step.link(name, kv, name)
        elif self.with_references:
            for name, array in self._load_keys(moment).items():
                step.set(name, array)
        step.set("timestep", np.full(self.case.images, moment.timestep, np.int64))
        step.set("ddim", np.tile(moment.coefficients, (self.case.images, 1)))
        step.run()

    def _load_keys(self, moment: Moment) -> Arrays:
        if not self.with_references:
            return {}
        if moment.name not in self._keys:
            with np.load(self.folder / f"{moment.name}.npz") as file:
                self._keys[moment.name] = {name: file[name] for name in file.files}
        return self._keys[moment.name]


def prepare(task: Task) -> dict[str, float]:
    """Write what the kind "kept" reads: keys and values of the steps that are compared and timed, and for requests
    those of `Session.prepare`.

    This runs in a process of its own, because it is done once for a concept and not for each request.

    Returns seconds: "reference_pass" of one step with all references (median of a few), "prepare" of all concepts for
    all steps, without the loading of graphs and the writing of files.
    """
    bundle, workload = task.open()
    backend, folder, seconds = _open(task, bundle), Path(task.folder), dict[str, float]()
    runner = backend.load(bundle, "reference_kv")
    denoiser = Denoiser(bundle, runner, runner)
    references, text = ReferenceSet.of(bundle, workload.masked), as_bundle_dtype(workload.text, bundle)
    passes = []
    for moment in (*workload.run(task.settings.parity_steps), workload.moment("rba")):
        start = perf_counter()
        keys = denoiser.reference_kv(references, moment.noised, moment.timestep, text[2:])
        passes.append(perf_counter() - start)
        np.savez(folder / f"{moment.name}.npz", **keys)
    seconds["reference_pass"] = median(passes)
    runner.close()
    if task.settings.request_rounds:
        seconds["prepare"] = 0.0
        with Session(bundle, backend=backend) as session:
            for graph in ("text_encoder", "vae_encoder", "reference_kv"):
                session.runner(graph)
            for concept in workload.concepts():
                start = perf_counter()
                kept = session.prepare(concept, steps=task.case.steps)
                seconds["prepare"] += perf_counter() - start
                kept.save(folder / f"{concept.word}.kept", overwrite=True)
    backend.close()
    return seconds


def _load_prepared(folder: Path, concepts: Any) -> list[Any]:
    from magicface_rt import KeptConcept

    return [KeptConcept.load(folder / f"{concept.word}.kept") for concept in concepts]


def as_bundle_dtype(array: NDArray[np.float32], bundle: Bundle) -> NDArray[Any]:
    """Round an array to the bundle's dtype, as a host array holds it."""
    return to_bfloat16(array) if bundle.dtype == "bfloat16" else array.astype(bundle.dtype)


def _open(task: Task, bundle: Bundle) -> Backend:
    settings = task.settings
    return open_backend(task.contender.backend, threads=settings.threads, store=settings.store, bundle=bundle)
