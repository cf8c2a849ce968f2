"""The same request by Session and by the PyTorch reference, side by side: 50 steps, two concepts.

    .venv/bin/python -m benchmarks.session_vs_pytorch BUNDLE CHECKPOINT [--steps 50] [--rounds 3]

The two alternate, so that whatever else the machine does meets both. What is timed on both sides: from the encoded
references and prompts to the final latents. Prints the median seconds of each and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch

from magicface_rt import Bundle, Options, Session
from magicface_rt.export.checkpoint import Checkpoint
from magicface_rt.export.reference import MagicFaceReference
from magicface_rt.export.trajectory import PROMPT, drawn_concepts, run_pytorch
from magicface_rt.images import load_reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("checkpoint")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    bundle, checkpoint = Bundle.open(arguments.bundle), Checkpoint.open(arguments.checkpoint)
    layers = tuple(layer.index for layer in bundle.injection_layers)
    reference = MagicFaceReference(checkpoint.load_unet(torch.float32), injection_layers=layers)
    concepts = drawn_concepts()
    loaded = [load_reference(c.references[0], name=c.name) for c in concepts]
    options = Options(steps=arguments.steps, seed=7)
    seconds: dict[str, list[float]] = {"session": [], "pytorch": []}
    with Session(bundle, backend="onnxruntime-cpu") as session:
        session.generate(PROMPT, concepts, steps=1)
        for _ in range(arguments.rounds):
            result = session.generate(PROMPT, concepts, options=options)
            seconds["session"].append(sum(result.timings.steps))
            start = time.perf_counter()
            outputs, _, decoding = run_pytorch(
                bundle, reference, checkpoint, session.tokenizer, concepts, loaded, options
            )
            seconds["pytorch"].append(time.perf_counter() - start - decoding)
            drift = np.linalg.norm(result.latents - outputs[-1].latents.numpy()) / np.linalg.norm(result.latents)
            print(f"session {seconds['session'][-1]:.2f} s, pytorch {seconds['pytorch'][-1]:.2f} s, drift {drift:.1e}")
    ours, theirs = (statistics.median(values) for values in (seconds["session"], seconds["pytorch"]))
    print(f"median of {arguments.rounds}: session {ours:.2f} s, pytorch reference {theirs:.2f} s")
    print(f"ratio pytorch / session: {theirs / ours:.2f}")


if __name__ == "__main__":
    main()
