"""A machine with a GPU, a flavour of TensorRT and an engine store, all made up but the store."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from magicface_rt.backends import TensorRT
from magicface_rt.backends import device as device_module
from magicface_rt.bundle import Bundle, GraphContract, Tensor
from magicface_rt.engines import finding  # noqa: F401 - with the real builder, which a World replaces
from magicface_rt.engines import flavour as flavour_module
from magicface_rt.engines.log import ErrorRecord
from magicface_rt.engines.plan_key import PlanKey
from magicface_rt.engines.store import EngineStore
from magicface_rt.engines.targets import Target, target_for

from .fake_cuda import FakeCuda
from .fake_tensorrt import FakeTensorRT, Recipe, bundle_recipe

FLAVOUR = "tensorrt-rtx"


def _logger(trt: Any) -> ErrorRecord:
    logger = ErrorRecord()
    logger.add_error("something of long ago")
    return logger


class World:
    """`cuda` and `trt` stand in for the libraries; `build` puts a plan into `store`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, *, flavour: str = FLAVOUR, **cuda: Any) -> None:
        self.cuda = FakeCuda(**cuda)
        self.flavour = flavour
        self.trt = FakeTensorRT(self.cuda, rtx=flavour == FLAVOUR)
        self.store = EngineStore(folder / "store")
        self.built: list[str] = []
        monkeypatch.setattr(device_module, "import_cuda", lambda: self.cuda)
        monkeypatch.setattr(flavour_module, "load_flavour", self._load_flavour)
        builder = SimpleNamespace(plan_key=self.plan_key, build_plan=self._build_plan)
        monkeypatch.setitem(sys.modules, "magicface_rt.engines.builder", builder)
        monkeypatch.setitem(
            sys.modules,
            "magicface_rt.engines.log",
            SimpleNamespace(trt_logger=_logger),
        )

    def _load_flavour(self, name: str) -> Any:
        if name != self.flavour:
            raise flavour_module.BackendMissingError(f"{name} is not installed")
        return flavour_module.Flavour(name, self.trt, self.trt.__version__)

    def plan_key(self, bundle: Any, graph: str, flavour: Any, target: Target) -> PlanKey:
        return PlanKey(
            graph=graph,
            graph_hash=hashlib.sha256(f"{bundle.hash} {graph}".encode()).hexdigest(),
            flavour=flavour.name,
            flavour_version=flavour.version,
            precision="fp32",
            compute_capabilities=("8.6", "8.9"),
            profile={},
            builder_options={"target": target.name},
        )

    def target(self) -> Target:
        major, minor = self.cuda.capability
        return target_for(self.flavour, f"{major}.{minor}")

    def build(self, bundle: Any, graph: str, recipe: Recipe, target: Target | None = None) -> None:
        name = f"{bundle.hash} {graph}"
        self.trt.recipes[name] = recipe
        key = self.plan_key(bundle, graph, self._load_flavour(self.flavour), target or self.target())

        def make(path: Path) -> dict[str, Any]:
            path.write_bytes(name.encode().ljust(recipe.weights))
            return {"gate": {"scratch_bytes": recipe.scratch}}

        self.store.build(key, make)

    def _build_plan(
        self,
        bundle: Any,
        graph: str,
        flavour: Any,
        target: Target,
        store: Any,
        *,
        device: int,
        report: Callable[[str], object],
    ) -> Any:
        assert device == 0
        report(f"building {graph}")
        self.built.append(graph)
        recipe = self.trt.recipes.get(f"{bundle.hash} {graph}") or bundle_recipe(bundle, graph)
        self.build(bundle, graph, recipe, target)
        return store.get(self.plan_key(bundle, graph, flavour, target))

    def build_all(self, bundle: Bundle) -> None:
        """Plans of a real bundle, computed by ONNX Runtime; the step's without what is only compared."""
        for graph in bundle.graphs:
            only = ("latents_out", "region_label_out") if graph == "denoise_step" else None
            self.build(bundle, graph, bundle_recipe(bundle, graph, only))

    def backend(self, **options: Any) -> TensorRT:
        return TensorRT(self.flavour, store=self.store, **options)

    def leave(self, nbytes: int) -> None:
        """Somebody else takes the device's memory, but for so many bytes of what is free."""
        self.cuda.total = self.cuda.allocated() + nbytes

    def nothing_left(self) -> bool:
        """Everything that was made on the device is gone, and so are the library's objects."""
        return not self.cuda.alive() and not self.trt.alive


# ------------------------------------------------------------------------- a bundle of two graphs that can be seen into

SOURCE = GraphContract(
    "source",
    (Tensor("x", "float32", ("M", 2)), Tensor("gain", "float32", (1,))),
    (Tensor("k", "float32", ("M", 2)),),
    {},
)
STEP = GraphContract(
    "step",
    (
        Tensor("state", "float32", ("B", 3)),
        Tensor("k", "float32", ("K", "M", 2)),
        Tensor("bias", "float32", ("B",)),
        Tensor("label", "int64", ("B",)),
    ),
    (
        Tensor("state_out", "float32", ("B", 3)),
        Tensor("label_out", "int64", ("B",)),
        Tensor("seen", "float32", ("B",)),
    ),
    {},
)


def source(x: np.ndarray, gain: np.ndarray) -> dict[str, np.ndarray]:
    return {"k": x * gain}


def step(state: np.ndarray, k: np.ndarray, bias: np.ndarray, label: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "state_out": (state + bias[:, None] + k.sum() + label[:, None]).astype(np.float32),
        "label_out": label + 1,
        "seen": bias * 2,
    }


class SmallBundle:
    """As much of a `Bundle` as a backend looks at."""

    hash = "small"
    path = Path("small")
    dtype = "float32"

    def __init__(self) -> None:
        self.graphs = {"source": SOURCE, "step": STEP}

    def graph(self, name: str) -> GraphContract:
        return self.graphs[name]


def small_recipes(**changes: Any) -> dict[str, Recipe]:
    return {
        "source": Recipe(SOURCE, lambda a: source(**a), {"M": (1, 64)}, **changes),
        "step": Recipe(STEP, lambda a: step(**a), {"M": (1, 64), "B": (1, 4), "K": (1, 4)}, **changes),
    }
