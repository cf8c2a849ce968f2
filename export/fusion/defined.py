"""Run the graphs for the CUDA provider on the CPU, by the definitions of their operators.

This checks the rewriting: attributes, layouts, the order of inputs, which tensors meet where. The CUDA kernels
themselves are not run.
"""

from __future__ import annotations

import onnx

from magicface_rt.backends import Backend, GraphRunner
from magicface_rt.backends.onnxruntime import HostRunner, import_onnxruntime
from magicface_rt.bundle import CUDA_RUNTIME, Bundle
from magicface_rt.errors import BackendError
from magicface_rt.process.interrupts import reraise_if_interrupt

from .definitions import define

_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


class DefinedCuda(Backend):
    """ONNX Runtime's CPU provider on `onnxruntime-cuda` files, with definitions of the operators that only CUDA has."""

    name = "onnxruntime-cuda-defined"

    def load(self, bundle: Bundle, graph: str) -> GraphRunner:
        contract = bundle.graph(graph)
        if CUDA_RUNTIME not in contract.files:
            raise BackendError(f"graph {graph} of bundle {bundle.path}: there is no file for {CUDA_RUNTIME}.")
        model = onnx.load_model(str(bundle.path / contract.files[CUDA_RUNTIME]), load_external_data=False)
        define(model)
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry(_WEIGHTS_FOLDER, str(bundle.path))
        try:
            session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            reraise_if_interrupt(error)
            raise BackendError(f"graph {graph} of bundle {bundle.path}: {self.name} refused it: {error}") from error
        return HostRunner(contract, session)
