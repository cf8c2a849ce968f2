"""A bundle as far as it is looked at before its graphs are: its manifest, and files of the right sizes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from outcomes import judged
from shares import Share

from magicface_rt import Bundle
from magicface_rt.bundle import MANIFEST
from magicface_rt.kept import Origin
from magicface_rt.session import tokenizer_of

TOKENIZERS = Share(10, subject="bundles", what="tokenizers were read")
"""Reading one takes a while."""


def outline(bundle: Path, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The manifest's path and content, without what is only told; of the files only the tokenizer holds anything."""
    folder.mkdir()
    manifest = {**json.loads((bundle / MANIFEST).read_bytes()), "parity": {}, "exporter": {}}
    for name, entry in manifest["files"].items():
        (folder / name).touch()
        os.truncate(folder / name, entry["bytes"])
    name = manifest["tokenizer"]["file"]
    (folder / name).write_bytes((bundle / name).read_bytes())
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder / MANIFEST, manifest


def opened(folder: Path, *, check_hashes: bool = False) -> Bundle | None:
    def use() -> Bundle:
        bundle = Bundle.open(folder, check_hashes=check_hashes)
        # What a Session does with it before it computes.
        assert bundle.rows * bundle.columns > 0
        assert all(min(bundle.grid(factor)) > 0 for factor in bundle.factors)
        assert set(bundle.limits.kept_tokens) == set(bundle.factors)
        Origin.of(bundle, 1, 0).to_dict()
        assert all(isinstance(size, (int, str)) for g in bundle.graphs.values() for t in g.inputs for size in t.shape)
        if "text_encoder" in bundle.graphs and bundle.tokenizer and TOKENIZERS.takes((folder / MANIFEST).read_bytes()):
            tokenizer_of(bundle)
        return bundle

    return judged("bundle", use, names=folder)
