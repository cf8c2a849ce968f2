"""`magicface-rt verify`: replay recordings with PyTorch and with a bundle, and compare a bundle with its checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from magicface_rt.backends import Backend, open_backend
from magicface_rt.backends.host import BFLOAT16
from magicface_rt.bundle import Bundle, sha256
from magicface_rt.errors import BundleError, ParityError
from magicface_rt.files import atomic_files
from magicface_rt.process.host_memory import as_host_memory_error

from .attention import SELF_ATTENTIONS
from .bundle_runner import BundleStepRunner
from .checkpoint import Checkpoint
from .exporter import ExportOptions, export_unet_bundle, exporter_versions, graph_makers
from .graph_parity import CPU, check_graph
from .graphs import Form
from .made_from import why_not_made_from
from .recordings import Recording
from .reference import MagicFaceReference
from .replay import ReferenceStepRunner, ReplayReport, replay_free, replay_steps
from .threads import single_torch_thread
from .trajectory import TrajectoryReport, compare_trajectory

Report = Callable[[str], object]


@dataclass(frozen=True)
class Verdict:
    """The outcome of a verification: one or more reports, each with `passed`, `to_json` and `summary`."""

    subject: str
    reports: tuple[Any, ...]

    @property
    def passed(self) -> bool:
        return bool(self.reports) and all(report.passed for report in self.reports)

    def to_json(self) -> dict[str, Any]:
        return {
            "subject": self.subject,
            "passed": self.passed,
            "reports": [report.to_json() for report in self.reports],
        }

    def summary(self) -> list[str]:
        lines = [line for report in self.reports for line in report.summary()]
        return [*lines, f"{self.subject}: {'passed' if self.passed else 'FAILED'}"]


@as_host_memory_error()
def verify_case(case: str | Path, *, work: Path | None = None, report: Report = lambda _: None) -> Verdict:
    """Replay a recording with the PyTorch reference and with a bundle exported from the recording's own model.

    Each step is replayed from the recorded latents and, if the case allows it, freely from the recorded noise. Both
    sides run on one thread, as the recordings were made: another number of threads sums in another order, so a free run
    would drift differently (by some 1e-5), and which cells flip would depend on the machine. `work`: where the bundle
    is written, for a later call to find it; by default a temporary folder, which the next call removes if this process
    is killed.

    Raises:
        RecordingError: the recording cannot be read.
        ExportError: its model could not be exported.
        HostMemoryError: there is too little memory for it.
    """
    recording = Recording.load(case)
    reference = ReferenceStepRunner(recording)
    with single_torch_thread():
        reports = _replays(recording, reference, report)
    with nullcontext(work) if work is not None else atomic_files.temporary_folder("magicface-rt-verify") as place:
        bundle = _case_bundle(recording, place, report)
        with closing(open_backend("onnxruntime-cpu", threads=1)) as backend:
            reports += _replays(recording, BundleStepRunner(recording, bundle, backend), report)
    return Verdict(recording.name, tuple(reports))


def _replays(recording: Recording, runner: Any, report: Report) -> list[ReplayReport]:
    report(f"{recording.name}: {runner.name}, step by step")
    reports = [replay_steps(recording, runner)]
    if recording.free_run:
        report(f"{recording.name}: {runner.name}, free run")
        reports.append(replay_free(recording, runner))
    return reports


def _case_bundle(recording: Recording, work: Path, report: Report) -> Bundle:
    layers = [layer for layer in recording.injection_layers if layer < SELF_ATTENTIONS]
    rows, columns = recording.latent_size
    model = recording.model
    weights = sha256(model / "diffusion_pytorch_model.safetensors")[:12] + sha256(model / "config.json")[:8]
    references = max(6, len(recording.inputs.ref_masks))
    name = f"{weights}-{rows}x{columns}-references-{references}-layers-{'-'.join(map(str, layers))}"
    kept = _kept_bundle(work / name)
    if kept is not None:
        return kept
    options = ExportOptions(
        height=8 * rows,
        width=8 * columns,
        injection_layers=layers,
        references=references,
    )
    return export_unet_bundle(recording.load_unet, work / name, options, schedule=recording.schedule, report=report)


def _kept_bundle(folder: Path) -> Bundle | None:
    """Return the bundle of an earlier call, if this exporter made it and it is intact; remove any other bundle."""
    try:
        kept = Bundle.open(folder)
        if kept.exporter == exporter_versions():
            return kept
    except BundleError:
        if not (folder / "bundle.json").is_file():
            return None  # nothing is there, or no bundle of ours
    atomic_files.remove(folder)
    return None


@as_host_memory_error()
def verify_bundle(
    bundle: str | Path,
    checkpoint: str | Path,
    *,
    backend: str | Backend = "auto",
    steps: int = 6,
    report: Report = lambda _: None,
) -> Verdict:
    """Compare a bundle with PyTorch: graph by graph, step by step, and from noise to pixels.

    A TensorRT backend needs plans with the outputs that are compared; see `Target.with_parity_outputs`.

    Raises:
        BundleError, CheckpointError, BackendMissingError: what was given cannot be used.
        ParityError: the bundle was exported from another checkpoint, or with another schedule or tokenizer.
        HostMemoryError: there is too little memory for it.
    """
    if isinstance(backend, str):
        with closing(open_backend(backend)) as own:
            return verify_bundle(bundle, checkpoint, backend=own, steps=steps, report=report)
    opened, source = Bundle.open(bundle), Checkpoint.open(checkpoint)
    report("checkpoint: hashing")
    found = source.content_hash()
    source.check_unchanged()
    if reason := why_not_made_from(opened, source, found):
        raise ParityError(f"{reason}. Give the checkpoint it was made from, or export it again.")
    reports: list[Any] = []
    vocabulary = int(source.configs["text_encoder"]["vocab_size"])
    layers = [layer.index for layer in opened.injection_layers]
    dtype = getattr(torch, opened.dtype)
    for make in graph_makers(source, Form.of(opened, dtype), layers):
        graph = make().eval().requires_grad_(False)
        report(f"{graph.name}: comparing with PyTorch")
        reports.append(check_graph(opened, graph, vocabulary, backend))
        del graph
    if opened.dtype == BFLOAT16 and backend.name == CPU:  # its graphs were compared in float32 arithmetic
        reports.append(TrajectoryReport("requests", {}, {}, (f"not made: {backend.name} has no bfloat16 kernels",)))
    else:
        report(f"{steps} steps: comparing with the PyTorch reference")
        reference = MagicFaceReference(source.load_unet(torch.float32), injection_layers=tuple(layers))
        reports += compare_trajectory(opened, backend, reference, source, steps)
    source.check_unchanged()  # what is mapped may have been written to after it was loaded
    return Verdict(str(opened.path), tuple(reports))
