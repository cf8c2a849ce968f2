"""A store with one plan, all that is done with one, and manifests that somebody else wrote into it."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

from corruptions import as_json
from outcomes import judged

from magicface_rt.engines import layout, manifest
from magicface_rt.engines.plan_key import PlanKey
from magicface_rt.engines.store import Damaged, EngineStore
from tests.engines.store_worker import sample_key, writer

__all__ = ["FACTS", "PLAN", "sample_key", "spoiled", "used", "with_a_plan", "writer"]

PLAN = random.Random(0).randbytes(1024)
FACTS: dict[str, Any] = {"gate": {"scratch_bytes": 5, "layers": ["a", "b"]}, "seconds": 1.5, "note": "a"}


def with_a_plan(store: EngineStore) -> EngineStore:
    """The store, in which the plan of `sample_key()` was built."""
    store.build(sample_key(), writer(PLAN, **FACTS))
    return store


def used(store: EngineStore, key: PlanKey) -> bytes | None:
    """All that is done with a store that somebody else wrote into; the plan's bytes where it is taken for sound."""

    def use() -> bytes:
        for entry in store.entries():
            assert isinstance(entry, Damaged) or isinstance(entry.bytes, int)
            assert store.size(entry) >= 0
            assert store.last_used(entry) >= 0
        for _, differences in store.why(key):
            assert all(str(difference) for difference in differences)
        store.verify()
        store.prune()
        found = store.get(key)
        with store.in_use(found):
            return store.read(found)

    return judged("engine store", use, names=store.root)


def spoiled(store: EngineStore, content: dict[str, Any] | bytes) -> Path:
    """Put a manifest of that content into a store, with a checksum that is right, where it would be found. Of bytes,
    which are no such content, it is they.
    """
    if isinstance(content, bytes):
        return _put(layout.plan_folder(store.root, "tensorrt-rtx", hashlib.sha256(content).hexdigest()), content)
    try:
        text = manifest._text({**content, "checksum": manifest._checksum(content)})
    except ValueError:  # NaN, which a manifest does not hold
        text = as_json({**content, "checksum": "0" * 64}).encode()
    try:
        key = PlanKey.from_dict(content["key"])
        folder = layout.plan_folder(store.root, key.flavour, key.digest)
    except Exception:
        digest = hashlib.sha256(text).hexdigest()
        folder = layout.plan_folder(store.root, "tensorrt-rtx", digest)
    return _put(folder, text)


def _put(folder: Path, text: bytes) -> Path:
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_bytes(text)
    (folder / "plan").write_bytes(PLAN)
    return folder
