"""From a checkpoint to a bundle: trace each graph, write it, compare it with PyTorch, and only then show the folder."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from magicface_rt.backends.ort_arena import trim
from magicface_rt.bundle import CUDA_RUNTIME, Bundle
from magicface_rt.errors import BackendError, OptionError, ParityError
from magicface_rt.process.host_memory import as_host_memory_error, shortage
from magicface_rt.schedule import Schedule

from .attention import DEFAULT_INJECTION_LAYERS, SELF_ATTENTIONS
from .bundle_writer import BundleWriter
from .checkpoint import Checkpoint
from .fusion.defined import DefinedCuda
from .graph_parity import Expected, GraphParity, compare_graph, expected_outputs
from .graphs import DenoiseStep, Form, Graph, ReferenceKV, TextEncoder, VaeDecoder, VaeEncoder, injected
from .operators import GROUPS
from .tracing import trace

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

Report = Callable[[str], object]
"""Called with a line on what is being done."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is fixed when a bundle is made.

    dtype               "fp32" (CPU), "fp16", "bf16" (GPUs): of weights and activations
    height, width       pixels, multiples of 64; None: the checkpoint's own size
    injection_layers    self-attentions that see references, of 0..15
    concepts            1..6, concepts of a request
    references          references of a request, all concepts together
    images              images computed together
    expected_mask_share part of a reference inside its mask; engines are tuned for it

    Raises `OptionError` for a value out of range.
    """

    dtype: str = "fp32"
    height: int | None = None
    width: int | None = None
    injection_layers: Sequence[int] = DEFAULT_INJECTION_LAYERS
    concepts: int = GROUPS - 1
    references: int = 6
    images: int = 4
    expected_mask_share: float = 0.3

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise OptionError(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}.")
        for name in ("height", "width"):
            size = getattr(self, name)
            if size is not None and (size < 64 or size % 64 or size > 4096):
                raise OptionError(f"{name} is {size} pixels, expected a multiple of 64 from 64 to 4096.")
        layers = tuple(sorted(set(self.injection_layers)))
        if not layers or layers[0] < 0 or layers[-1] >= SELF_ATTENTIONS:
            raise OptionError(
                f"injection_layers are {list(self.injection_layers)}, expected numbers from 0 to {SELF_ATTENTIONS - 1}."
            )
        object.__setattr__(self, "injection_layers", layers)
        for name, high in (("concepts", GROUPS - 1), ("references", 64), ("images", 64)):
            if not 1 <= getattr(self, name) <= high:
                raise OptionError(f"{name} is {getattr(self, name)}, expected 1 to {high}.")
        if not 0 < self.expected_mask_share <= 1:
            raise OptionError(f"expected_mask_share is {self.expected_mask_share}, expected above 0, up to 1.")


def exporter_versions() -> dict[str, str]:
    """The versions that a bundle is made with: releases, and a hash of the sources, which change between releases."""
    sources = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        sources.update(path.read_bytes())
    releases = {name: version(name) for name in ("magicface_rt", "torch", "diffusers", "onnx", "onnxscript")}
    return {**releases, "sources": sources.hexdigest()[:16]}


@as_host_memory_error()
def export_bundle(
    checkpoint: Checkpoint, out: str | Path, options: ExportOptions | None = None, *, report: Report = lambda _: None
) -> Bundle:
    """Export all five graphs of a checkpoint.

    One component is in memory at a time. Every graph is compared with PyTorch before the bundle appears, in its forms
    for ONNX Runtime; that for TensorRT needs gigabytes on the CPU, and is compared by `verify` with its plans.

    Raises:
        CheckpointError: the checkpoint cannot be read, or a file of its weights changed since it was opened.
        ExportError: a graph could not be traced.
        ParityError: a graph does not compute what PyTorch does; no bundle is left behind.
        OutputError: `out` exists or cannot be written.
        HostMemoryError: there is too little memory for it.
    """
    options = options or ExportOptions()
    form = _form(checkpoint, options)
    offset, stored = checkpoint.schedule.steps_offset, checkpoint.configs["scheduler"].get("steps_offset")
    if stored is not None and stored != offset:
        report(f"scheduler: warning: steps_offset is {offset} and not {stored}, as in diffusers' pipeline")
    vocabulary = int(checkpoint.configs["text_encoder"]["vocab_size"])
    if checkpoint.tokens < vocabulary:
        report(
            f"tokenizer: warning: it has {checkpoint.tokens} tokens and the text encoder {vocabulary}: words that only "
            "the text encoder was taught are read as others"
        )
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(checkpoint.configs["unet"]))
    manifest = {
        **_manifest(unet, form, options, checkpoint.schedule),
        "architecture": checkpoint.architecture["name"],
        "checkpoint_hash": checkpoint.content_hash(),
        "vae_scaling_factor": checkpoint.vae_scaling_factor,
        "tokenizer": {
            "file": "tokenizer.json",
            "pad_token_id": checkpoint.pad_token_id,
            "max_length": checkpoint.max_length,
        },
    }
    makers = graph_makers(checkpoint, form, options.injection_layers)
    with BundleWriter(Path(out)) as writer:
        writer.add_file("tokenizer.json", checkpoint.tokenizer_json)
        return _write(writer, makers, manifest, vocabulary, report, check_source=checkpoint.check_unchanged)


def graph_makers(checkpoint: Checkpoint, form: Form, layers: Sequence[int]) -> Iterator[Callable[[], Graph]]:
    """Yield a maker of each of a bundle's five graphs; it loads the checkpoint when called, so one is in memory."""
    dtype = form.dtype
    yield lambda: TextEncoder(checkpoint.load_text_encoder(dtype), form)
    yield lambda: VaeEncoder(checkpoint.load_vae(dtype), form)
    yield lambda: VaeDecoder(checkpoint.load_vae(dtype), form)
    yield lambda: ReferenceKV(checkpoint.load_unet(dtype), form, layers)
    yield lambda: DenoiseStep(checkpoint.load_unet(dtype), form, layers)


@as_host_memory_error()
def export_unet_bundle(
    load_unet: Callable[[], UNet2DConditionModel],
    out: str | Path,
    options: ExportOptions,
    *,
    schedule: Schedule,
    report: Report = lambda _: None,
) -> Bundle:
    """Export `reference_kv` and `denoise_step` of a U-Net alone, as recordings hold it. Raises as `export_bundle`."""
    unet = load_unet()
    side = 8 * int(unet.config.sample_size)
    form = Form(
        height=options.height or side,
        width=options.width or side,
        vae_factor=8,
        dtype=DTYPES[options.dtype],
        text_width=int(unet.config.cross_attention_dim),
    )

    manifest = {
        **_manifest(unet, form, options, schedule),
        "architecture": "unet",
        "checkpoint_hash": "",
        "vae_scaling_factor": 1.0,
        "tokenizer": {},
    }
    makers = _unet_graph_makers(unet, form, options.injection_layers)
    del unet  # so that it is not in memory beside the graphs that are compared in the end
    with BundleWriter(Path(out)) as writer:
        return _write(writer, makers, manifest, 1, report)


def _unet_graph_makers(unet: UNet2DConditionModel, form: Form, layers: Sequence[int]) -> Iterator[Callable[[], Graph]]:
    """Yield a maker of each of a U-Net's two graphs; the U-Net is held only until both have been made."""
    yield lambda: ReferenceKV(unet.to(form.dtype), form, layers)
    yield lambda: DenoiseStep(unet.to(form.dtype), form, layers)


def _write(
    writer: BundleWriter,
    components: Iterator[Callable[[], Graph]],
    manifest: dict[str, Any],
    vocabulary: int,
    report: Report,
    *,
    check_source: Callable[[], None] = lambda: None,
) -> Bundle:
    """Write and compare the graphs, and give the bundle its name.

    check_source   called once all weights are written; raises if they may not be those that `manifest` tells
    """
    expected: list[Expected] = []
    for make in components:
        graph = make().eval().requires_grad_(False)
        report(f"{graph.name}: tracing")
        fused = writer.add_graph(graph, trace(graph))
        for what in fused.missed:
            report(f"{graph.name}: warning: {what} was traced in a form that is not known, and stays slow on CUDA")
        report(f"{graph.name}: running in PyTorch")
        expected.append(expected_outputs(graph, vocabulary))
        del graph, make
        gc.collect()
        trim()
    check_source()
    hidden = writer.write_manifest({**manifest, "parity": {}})
    parity: dict[str, dict[str, Any]] = {}
    for one in expected:
        report(f"{one.graph}: comparing with PyTorch")
        parity[one.graph] = _passed(compare_graph(hidden, one, scratch=writer.folder)).to_json()
        if CUDA_RUNTIME in hidden.graph(one.graph).files:
            report(f"{one.graph}: comparing the form for CUDA with PyTorch")
            try:
                parity[one.graph][CUDA_RUNTIME] = _passed(compare_graph(hidden, one, DefinedCuda())).to_json()
            except (ParityError, BackendError) as error:  # the plain form has passed, and CUDA can serve it as well
                if shortage(error) is not None:  # which says nothing of the form
                    raise
                report(f"warning: without the form for CUDA: {error}")
                writer.drop_cuda_file(one.graph)
    writer.write_manifest({**manifest, "parity": parity})
    return writer.finish()


def _passed(found: GraphParity) -> GraphParity:
    if not found.passed:
        raise ParityError(f"graph {found.graph}: not what PyTorch computes: {'; '.join(found.failures())}.")
    return found


def _form(checkpoint: Checkpoint, options: ExportOptions) -> Form:
    side = checkpoint.vae_factor * int(checkpoint.configs["unet"]["sample_size"])
    return Form(
        height=options.height or side,
        width=options.width or side,
        vae_factor=checkpoint.vae_factor,
        dtype=DTYPES[options.dtype],
        text_width=checkpoint.text_width,
    )


def _manifest(unet: UNet2DConditionModel, form: Form, options: ExportOptions, schedule: Schedule) -> dict[str, Any]:
    layers = injected(unet, options.injection_layers)
    return {
        "dtype": form.dtype_name,
        "height": form.height,
        "width": form.width,
        "vae_factor": form.vae_factor,
        "latent_channels": form.latent_channels,
        "text_width": form.text_width,
        "injection_layers": [
            {"index": x.index, "factor": x.factor, "num_heads": x.num_heads, "width": x.width} for x in layers
        ],
        "limits": {
            "concepts": options.concepts,
            "references": options.references,
            "images": options.images,
            "kept_tokens": {
                str(factor): options.references * (form.rows // factor) * (form.columns // factor)
                for factor in sorted({x.factor for x in layers})
            },
        },
        "expected_mask_share": options.expected_mask_share,
        "scheduler": schedule.to_config(),
        "exporter": exporter_versions(),
    }
