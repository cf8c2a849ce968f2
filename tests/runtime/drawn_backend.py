"""A backend whose graphs are a few lines of numpy over a real bundle's contracts: every input that should matter does.

What a key is worth depends on its reference's latents, prompt and timestep and on its place in the mask; what a picture
is depends on every key that its cells may see, by group, bias and scale. So a key too many, too few, of another step or
in another's place shows in the latents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from magicface_rt.backends import Backend, GraphRunner
from magicface_rt.backends.checks import ShapeRanges
from magicface_rt.bundle import Bundle, GraphContract

Arrays = Mapping[str, np.ndarray]


class Drawn(Backend):
    """`runs`: how often each graph ran; `rows`: how many rows `reference_kv` was given; `keys`: the shapes of a layer's
    keys; `unseen`: the largest of the keys that nobody may see; `fail`: raised by a graph; `limits`: by graph, the
    shapes that it takes.
    """

    name = "drawn"

    def __init__(self, limits: Mapping[str, ShapeRanges] | None = None) -> None:
        self.limits = limits or {}
        self.runs: Counter[str] = Counter()
        self.rows: list[int] = []
        self.keys: list[tuple[int, ...]] = []
        self.unseen = 0.0
        self.fail: dict[str, BaseException] = {}

    def load(self, bundle: Bundle, graph: str) -> GraphRunner:
        return _Runner(bundle.graph(graph), bundle, self)


class _Runner(GraphRunner):
    def __init__(self, contract: GraphContract, bundle: Bundle, backend: Drawn) -> None:
        super().__init__(contract)
        self.bundle = bundle
        self.backend = backend

    @property
    def limits(self) -> ShapeRanges:
        return self.backend.limits.get(self.contract.name, {})

    def _run(self, inputs: Arrays, outputs: Sequence[str]) -> dict[str, np.ndarray]:
        name = self.contract.name
        self.backend.runs[name] += 1
        if name in self.backend.fail:
            raise self.backend.fail[name]
        results: dict[str, Any] = getattr(self, name)(inputs)
        return {output: results[output] for output in outputs}

    def text_encoder(self, inputs: Arrays) -> dict[str, np.ndarray]:
        place = np.arange(1, 78) * (1 + np.arange(self.bundle.text_width)[:, None])
        return {"text": np.sin(inputs["token_ids"][:, :, None] * place.T).astype(np.float32)}

    def vae_encoder(self, inputs: Arrays) -> dict[str, np.ndarray]:
        small = inputs["pixels"][:, :, ::8, ::8]
        return {"latents": np.concatenate([small, small[:, :1]], axis=1)}

    def vae_decoder(self, inputs: Arrays) -> dict[str, np.ndarray]:
        return {"pixels": np.tanh(inputs["latents"][:, :3].repeat(8, axis=2).repeat(8, axis=3))}

    def reference_kv(self, inputs: Arrays) -> dict[str, np.ndarray]:
        latents, text = inputs["latents"], inputs["text"]
        self.backend.rows.append(len(latents))
        results = {}
        for layer in self.bundle.injection_layers:
            small = latents[:, :, :: layer.factor, :: layer.factor].mean(axis=1).reshape(len(latents), -1)
            row = text.mean(axis=(1, 2)) + inputs["timestep"] / 500
            values = (small + row[:, None]).reshape(-1)[inputs[f"kept_{layer.factor}"]]  # [M]
            wave = np.arange(1, layer.width + 1, dtype=np.float32) / layer.width
            results[f"k_ref_{layer.index}"] = np.sin(values[:, None] * wave + layer.index).astype(np.float32)
            results[f"v_ref_{layer.index}"] = np.cos(values[:, None] * wave - layer.index).astype(np.float32)
        return results

    def denoise_step(self, inputs: Arrays) -> dict[str, np.ndarray]:
        latents, label = inputs["latents"], inputs["region_label"]
        self.backend.keys.append(inputs[f"k_ref_{self.bundle.injection_layers[-1].index}"].shape)
        moved, labels = [], []
        for b in range(len(latents)):
            seen = np.zeros(label[b].shape, np.float64)
            for layer in self.bundle.injection_layers:
                r = min(b, len(inputs["key_group_1"]) - 1)
                group, bias, scale = (inputs[f"key_{kind}_{layer.factor}"][r] for kind in ("group", "bias", "scale"))
                k, v = (inputs[f"{kind}_ref_{layer.index}"][r].astype(np.float64) for kind in "kv")
                self.backend.unseen = max(self.backend.unseen, np.abs(k[group == -1]).max(initial=0))
                worth = np.exp(bias / 4) * (k * scale[:, None]).sum(axis=1) * (1 + v).sum(axis=1)
                for g in range(1, 8):
                    seen += np.where(label[b] == g, worth[group == g].sum(), 0.0) / 1e4
            whole = seen.repeat(2, axis=0).repeat(2, axis=1) + inputs["text"][:, b].mean() + inputs["guidance"][b] / 9
            whole = whole + inputs["token_scale"][b].mean() + inputs["semantic_guidance"][b]
            keep, add = inputs["ddim"][b]
            moved.append((keep * latents[b] + add * np.tanh(whole + latents[b])).astype(np.float32))
            groups = int(inputs["token_group"][b].max())
            cells = moved[-1][0, ::2, ::2]
            labels.append(np.where(cells > 0.3, np.minimum(groups, 1 + (cells > 1)), 0).astype(np.int64))
        return {"latents_out": np.stack(moved), "region_label_out": np.stack(labels)}
