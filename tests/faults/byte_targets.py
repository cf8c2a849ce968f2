"""Every parser as a function of bytes: what tests edit by chance and what an attack guided by coverage feeds.

`TARGETS[name](folder, bundle)` makes one. `folder` is its own; `bundle`: a small one, of which some parsers need the
manifest or the tokenizer.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outcomes import MOST_MESSAGE, judged
from single_files import FORMATS, Format, encoded, picture

LITTLE = 256 << 20


@dataclass(frozen=True)
class Target:
    """`use` is given the bytes and judges what becomes of them: it raises where that is nothing that may, and returns
    None where they were refused or not understood.

    tree  what the sample's JSON holds, for those whose values are replaced one by one
    """

    sample: bytes
    use: Callable[[bytes], object]
    tree: Any = None


Make = Callable[[Path, Path], Target]
TARGETS: dict[str, Make] = {}
"""By name."""


def _target(name: str) -> Callable[[Make], Make]:
    def add(make: Make) -> Make:
        TARGETS[name] = make
        return make

    return add


def _written(path: Path, then: Callable[[], object]) -> Callable[[bytes], object]:
    """Puts the bytes into a file and reads what that is a part of."""

    def use(content: bytes) -> object:
        path.write_bytes(content)
        return then()

    return use


def _of_json(tree: Any, use: Callable[[bytes], object]) -> Target:
    return Target(json.dumps(tree).encode(), use, tree)


# --------------------------------------------------------------------------------------------------- files of one kind


def _of_format(one: Format, folder: Path, _: Path) -> Target:
    path = folder / f"file.{one.suffix}"

    def use(content: bytes) -> object:
        path.write_bytes(content)
        return judged(one.name, lambda: one.read(path), names=path, memory=one.memory)

    return Target(one.sample(), use)


TARGETS.update({one.name: functools.partial(_of_format, one) for one in FORMATS})

# -------------------------------------------------------------------------------------------------------------- bundles


@_target("bundle manifest")
def _bundle_manifest(folder: Path, bundle: Path) -> Target:
    from bundle_outline import opened, outline

    path, manifest = outline(bundle, folder / "bundle")

    def use(content: bytes) -> object:
        path.write_bytes(content)
        return opened(path.parent)

    return _of_json(manifest, use)


# ---------------------------------------------------------------------------------------------------------------- plans


@_target("plan manifest")
def _plan_manifest(folder: Path, _: Path) -> Target:
    from plan_store import PLAN, sample_key, spoiled, used, with_a_plan

    from magicface_rt.engines.store import EngineStore

    store = EngineStore(folder / "store")
    with_a_plan(store)
    content = json.loads((store.get(sample_key()).folder / "manifest.json").read_bytes())
    content.pop("checksum")

    def use(text: bytes) -> object:
        """With a checksum that is right, in the folder that is right, where the bytes are JSON."""
        shutil.rmtree(store.root, ignore_errors=True)
        try:
            changed = json.loads(text)
        except (ValueError, RecursionError):
            changed = None
        spoiled(store, changed if isinstance(changed, dict) else text)
        found = used(store, sample_key())
        assert found in (None, PLAN)
        return found

    return _of_json(content, use)


@_target("runtime cache")
def _runtime_cache(folder: Path, _: Path) -> Target:
    from runtime_caches import SOUND, given

    path = folder / "plan.cache"

    def use(content: bytes) -> object:
        path.write_bytes(content)
        found = given(path)
        digest, blob = content[:32], content[32:]  # guided, it finds the right digest of another content
        assert found == (blob if hashlib.sha256(blob).digest() == digest else b"")
        return found

    return Target(SOUND, use)


@_target("plan text")
def _plan_text(_: Path, __: Path) -> Target:
    from magicface_rt.engines.plan_text import read_plan
    from tests.engines.test_plan_text import TEXT, plan

    def use(content: bytes) -> object:
        found = judged("plan text", lambda: read_plan(content), names=None)
        assert found is not None
        assert found.understood or len(found.problem) > 10
        assert found.scratch_bytes >= 0
        return found if found.understood else None

    return Target(plan(TEXT), use)


@_target("inspector")
def _inspector(_: Path, __: Path) -> Target:
    from magicface_rt.engines.gate import _inspected_kernels

    layer = {"Name": "a", "LayerType": "function", "TacticName": "b_0x1", "Metadata": "[ONNX Layer: node | attn (F)]"}

    def use(content: bytes) -> object:
        text = content.decode("utf-8", "replace")
        found = judged("inspector", lambda: _inspected_kernels(text), names=None)
        assert found is not None
        kernels, problem = found
        assert problem or any(kernel.layers for kernel in kernels)
        return None if problem else found

    return _of_json({"Layers": [layer, layer], "Bindings": ["x"]}, use)


# ---------------------------------------------------------------------------------------------------------- checkpoints


def _of_checkpoint(name: str, folder: Path, _: Path) -> Target:
    from checkpoint_outline import TEXTS, opened, outline

    checkpoint = outline(folder / "checkpoint")

    return _of_json(TEXTS[name], _written(checkpoint / name, lambda: opened(checkpoint)))


for _component in ("unet", "vae", "text_encoder"):
    TARGETS[f"{_component} config"] = functools.partial(_of_checkpoint, f"{_component}/config.json")
TARGETS["scheduler config"] = functools.partial(_of_checkpoint, "scheduler/scheduler_config.json")
TARGETS["tokenizer config"] = functools.partial(_of_checkpoint, "tokenizer/tokenizer_config.json")


@_target("shard index")
def _shard_index(folder: Path, _: Path) -> Target:
    from checkpoint_outline import INDEX, SHARDS, opened, outline_in_shards

    checkpoint = outline_in_shards(folder / "checkpoint")

    return _of_json(SHARDS, _written(checkpoint / INDEX, lambda: opened(checkpoint)))


def _of_vocabulary(name: str, folder: Path, _: Path) -> Target:
    from checkpoint_outline import VOCABULARY, opened, outline_with_vocabulary

    checkpoint = outline_with_vocabulary(folder / "checkpoint")
    path = checkpoint / "tokenizer" / name

    use = _written(path, lambda: opened(checkpoint))
    return Target(path.read_bytes(), use, VOCABULARY if name == "vocab.json" else None)


TARGETS["vocabulary"] = functools.partial(_of_vocabulary, "vocab.json")
TARGETS["merges"] = functools.partial(_of_vocabulary, "merges.txt")


def _of_added_tokens(name: str, folder: Path, _: Path) -> Target:
    from checkpoint_outline import opened, outline_with_added_tokens

    checkpoint = outline_with_added_tokens(folder / "checkpoint")
    path = checkpoint / "tokenizer" / name

    return _of_json(json.loads(path.read_bytes()), _written(path, lambda: opened(checkpoint)))


TARGETS["added tokens"] = functools.partial(_of_added_tokens, "added_tokens.json")
TARGETS["added tokens decoder"] = functools.partial(_of_added_tokens, "tokenizer_config.json")

# ----------------------------------------------------------------------------------------------------------- recordings


@_target("recording")
def _recording(folder: Path, _: Path) -> Target:
    from small_recording import CASE, loaded, recording

    case = recording(folder / "case")

    return _of_json(CASE, _written(case / "case.json", lambda: loaded(case)))


@_target("recording's archive")
def _archive(folder: Path, _: Path) -> Target:
    from small_recording import INPUTS, loaded, npy, npz_of, recording

    case = recording(folder / "case")

    def use(content: bytes) -> object:
        (case / "inputs.npz").write_bytes(content)
        return loaded(case)

    members = {name: npy(array) for name, array in INPUTS.items()}
    return Target(npz_of(members, compression=zipfile.ZIP_DEFLATED), use)


@_target("recording's array")
def _array(folder: Path, _: Path) -> Target:
    """One member, in an archive whose checksums are right."""
    from small_recording import INPUTS, loaded, npy, npz_of, recording

    case = recording(folder / "case")
    members = {name: npy(array) for name, array in INPUTS.items()}

    def use(content: bytes) -> object:
        (case / "inputs.npz").write_bytes(npz_of({**members, "ref_z0": content}))
        return loaded(case)

    return Target(members["ref_z0"], use)


# ---------------------------------------------------------------------------------------------------------------- HTTP


@_target("order")
def _order(_: Path, bundle: Path) -> Target:
    from door import JSON, ORDER, answered

    door = _door(bundle)
    return _of_json(ORDER, lambda body: answered("order", lambda: door.ask("POST", "/v1/images", JSON, [body])))


@_target("form")
def _form(_: Path, bundle: Path) -> Target:
    from door import FORM, SOUND, answered

    door = _door(bundle)
    return Target(SOUND, lambda body: answered("form", lambda: door.ask("PUT", "/v1/concepts", FORM, [body])))


@_target("authorization")
def _authorization(_: Path, bundle: Path) -> Target:
    """As a browser sends it to the page: a name and the token, in base64."""
    from base64 import b64encode

    from door import FINE, answered

    from magicface_rt.serve.auth import Tokens

    token = "0123456789abcdef" * 2
    door = _door(bundle, tokens=Tokens([token]))
    sound = b"Basic " + b64encode(f"anybody:{token}".encode())

    def use(value: bytes) -> object:
        headers = [(b"authorization", value)]
        status = answered("authorization", lambda: door.ask("GET", "/ui/queue", "", [b""], headers), fine={*FINE, 401})
        if token.encode() not in value and not value[:6].lower().startswith(b"basic"):
            assert status == 401
        return None if status == 401 else status

    return Target(sound, use)


@_target("accept")
def _accept(_: Path, __: Path) -> Target:
    """The header that says whether the answer is a PNG. An application is given bytes, and reads them as Latin-1."""
    from door import ORDER

    from magicface_rt.serve.reading import wants_png
    from magicface_rt.serve.schemas import PictureOrder

    order = PictureOrder.model_validate({**ORDER, "response": None, "stream": False})

    def use(value: bytes) -> object:
        found = judged("accept", lambda: wants_png(order, value.decode("latin-1")), names="Accept")
        if found:
            assert b"/" in value
        return found

    return Target(b"text/html, image/png;q=0.9, application/json;q=0.8, */*;q=0.1", use)


def _door(bundle: Path, **who: Any) -> Any:
    from door import Door

    from magicface_rt import Bundle

    return Door(Bundle.open(bundle, check_hashes=False), **who)


@_target("page's photographs")
def _photographs(_: Path, __: Path) -> Target:
    from base64 import b64encode

    from magicface_rt.ui.form import Photograph, photographs

    one = {"slot": 1, "image": b64encode(encoded("PNG", picture())).decode(), "mask": None, "name": "man.png"}

    def use(content: bytes) -> object:
        found = judged("page's photographs", lambda: photographs(content), names="the page")
        for photograph in found or ():
            assert isinstance(photograph, Photograph)
            assert type(photograph.slot) is int
            assert type(photograph.image) is str
            assert len(photograph.name) <= 256
        return found

    return _of_json([one, {**one, "slot": 2, "mask": "aGVsbG8="}], use)


NAMED = ("the body", "the key", "fn_index", "session_hash", "data")
"""What a message on an event is about."""


@_target("page's event")
def _event(_: Path, __: Path) -> Target:
    from magicface_rt.ui.event import read_event

    event = {"data": ["[]", "a man", 3, 1.5, None], "fn_index": 3, "session_hash": "abc", "trigger_id": 5}
    kinds = ("photographs", "text", "number", "number", "text")

    def use(content: bytes) -> object:
        found = judged("page's event", lambda: read_event(content, {3: kinds}), names=NAMED)
        if found is not None:
            handed_on, photographs = found
            assert isinstance(photographs, bytes)
            known = json.loads(handed_on)
            assert set(known) == {"data", "fn_index", "session_hash"}
            assert known["data"][0] == ""
            assert len(known["data"]) == len(kinds)
            assert all(one is None or type(one) in (str, int, float) for one in known["data"])
        return found

    return _of_json(event, use)


# --------------------------------------------------------------------------------------------------------------- client


def _of_answer(what: str, _: Path, __: Path) -> Target:
    from stranger import KINDS, WHAT, Stranger

    call, status, body, kind = WHAT[what]
    stranger = Stranger()

    def use(content: bytes) -> object:
        stranger.says(status, content, {"content-type": KINDS[kind]})
        return stranger.asked(f"answer: {what}", call)

    return Target(body, use)


for _what in ("pictures", "events", "events, failed", "concept", "concepts", "problem"):
    TARGETS[f"answer: {_what}"] = functools.partial(_of_answer, _what)

# -------------------------------------------------------------------------------------------------------- command line


def _of_text(name: str, sample: str, read: Callable[[str], object], said: str, _: Path, __: Path) -> Target:
    """An argument, as a system gives it to a process."""
    return Target(
        sample.encode(), lambda content: judged(name, lambda: read(os.fsdecode(content)), names=said, memory=LITTLE)
    )


def _concept(text: str) -> object:
    from magicface_rt.jobs import parse_concept_option

    return parse_concept_option(text)


def _kept(text: str) -> object:
    from magicface_rt.cli._kept_options import load_kept

    return load_kept([text])


def _size(text: str) -> object:
    from magicface_rt.values.sizes import parse_size

    found = parse_size(text, "--keep")
    assert type(found) is int
    assert 0 <= found < 2**63
    return found


_OPTIONS: dict[str, tuple[str, Callable[[str], object], str]] = {
    "concept option": ('word=man,image="a, b.png",mask=m.png,weight=2.5,token_index=5 6', _concept, "concept option"),
    "size": ("1.5GiB", _size, "--keep"),
}
for _name, (_sample, _read, _said) in _OPTIONS.items():
    TARGETS[_name] = functools.partial(_of_text, _name, _sample, _read, _said)


@_target("kept option")
def _kept_option(folder: Path, _: Path) -> Target:
    path = folder / "man.concept"
    path.write_bytes(next(one for one in FORMATS if one.name == "kept concept").sample())

    def use(content: bytes) -> object:
        text = os.fsdecode(content)
        most = MOST_MESSAGE + 16 * len(text)  # a file's name stands in a message as it is, and in that of the system
        return judged(
            "kept option", lambda: _kept(text), names=("--kept ", "kept concept "), memory=LITTLE, message=most
        )

    return Target(f"file={path},word=person,weight=2,token_index=3,name=x".encode(), use)


@_target("bench report")
def _report(folder: Path, _: Path) -> Target:
    from benchmarks import resuming
    from benchmarks.settings import Settings
    from tests.benchmarks.test_bench_capacity import outcome, report

    now, settings = resuming.describe(), Settings(bundles=("b",), kinds=("kept",))
    resuming.describe = lambda: now  # which asks other programs
    content = report(outcome(), **{name: now[name] for name in resuming.SAME_MACHINE})
    content["settings"] = settings.to_json()
    path = folder / "bench.json"

    def use(text: bytes) -> object:
        path.write_bytes(text)

        def earlier() -> resuming.Earlier:
            found = resuming.Earlier(path, settings)
            assert all(found.has(case["bundle"], _case(case)) for case in found.cases)
            return found

        return judged("bench report", earlier, names=path)

    return _of_json(content, use)


def _case(case: Any) -> Any:
    from benchmarks.settings import Case

    return Case(case["concepts"], case["mask_share"], case["images"], case["steps"])
