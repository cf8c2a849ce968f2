"""Parsers of what is none of the formats of one file: arguments, reports, archives, what a page sends.

Each is a function of bytes (`byte_targets`), so that an attack guided by coverage can feed it as well.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from byte_targets import TARGETS, Target
from corruptions import DAMAGES, EXTREMES, ODD_BYTES, cuts, edits_of, flips, texts_of
from hypothesis import strategies as st
from outcomes import inputs, loop

pytest.importorskip("torch")

NEEDS = {
    "page's": ("fastapi", "gradio"),
    "authorization": ("fastapi",),
    "recording": ("diffusers",),
    "inspector": ("onnx",),
}
HERE = (
    "recording",
    "recording's archive",
    "recording's array",
    "page's photographs",
    "page's event",
    "authorization",
    "kept option",
    "size",
    "bench report",
    "plan text",
    "inspector",
)
"""The others have loops of their own, beside what else is done to them."""

JSON = {"UTF-16", "a byte order mark in front"}
READ: dict[str, set[str]] = {
    "bench report": JSON,
    "recording": JSON,
    "page's event": JSON,
    "page's photographs": {*JSON, "nothing at all"},
    "size": {"half", "one byte"},  # fewer digits
    # wherever it lies in a plan, whole
    "plan text": {
        "one byte more",
        "a megabyte more",
        "all but one byte",
        "without its first byte",
        "twice",
        "a byte order mark in front",
        "a length of 2^40 in front",
        "a length of 2^64 - 1 in front",
        "a pickle in front",
        "a zip's mark in front",
    },
}
"""Damages after which it is still one that may be read. After all others it is refused."""

each = pytest.mark.parametrize("name", HERE)
Make = Callable[[str], Target]


@pytest.fixture
def make(tmp_path: Path, request: pytest.FixtureRequest) -> Make:
    def target(name: str) -> Target:
        for needed in next((needs for begin, needs in NEEDS.items() if name.startswith(begin)), ()):
            pytest.importorskip(needed)
        bundle = request.getfixturevalue("tiny_bundle") if name == "authorization" else tmp_path
        return TARGETS[name](tmp_path, bundle)

    return target


@each
def test_the_sound_one_is_read(name: str, make: Make) -> None:
    target = make(name)
    assert target.use(target.sample) is not None


@each
def test_it_damaged_cut_and_flipped(name: str, make: Make) -> None:
    target = make(name)
    read = {damage for damage in DAMAGES if target.use(DAMAGES[damage](target.sample)) is not None}
    assert read == READ.get(name, set())
    for content in [*(target.sample[:keep] for keep in cuts(target.sample, most=60)), *flips(target.sample, most=60)]:
        target.use(content)
    for content in (*ODD_BYTES, *EXTREMES):
        target.use(content)


@each
@inputs
def test_any_edit(name: str, inputs: int, make: Make) -> None:
    target = make(name)
    contents = edits_of(target.sample)
    if target.tree is not None:
        contents |= texts_of(target.tree)
    if len(target.sample) < 100:  # of a few bytes there are few edits
        contents |= st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass"))
    loop(inputs, contents, target.use)


SIZES = {
    "9" * 400: None,
    "9" * 5000: None,
    "0." + "1" * 10_000: None,
    "9e99": None,
    "\u0661\u0662": None,
    "1" * 18: 111_111_111_111_111_111,
    "8EiB": None,
    "0": 0,
    " 4 GiB ": 4 << 30,
    "1.5kB": 1500,
    "1.": None,
    "-1": None,
    "nan": None,
}


@pytest.mark.parametrize("text", SIZES, ids=range(len(SIZES)))
def test_a_size_that_no_machine_has_is_refused_and_not_an_overflow(text: str) -> None:
    from magicface_rt.errors import OptionError
    from magicface_rt.values.sizes import parse_size

    if SIZES[text] is not None:
        assert parse_size(text, "--keep") == SIZES[text]
        return
    with pytest.raises(OptionError, match=r"--keep is .*, expected a size such as 4GiB") as raised:
        parse_size(text, "--keep")
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("number", [10**400, 2**63, -1, True])
def test_a_number_of_bytes_that_no_machine_has(number: int) -> None:
    from magicface_rt.errors import OptionError
    from magicface_rt.values.sizes import parse_size

    with pytest.raises(OptionError, match=r"keep is .*, expected a size"):
        parse_size(number, "keep")


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '[{"slot": 1e999, "image": "", "mask": null, "name": ""}]', '{"a": ' * 50_000, "9" * 10_000],
    ids=["deep", "endless", "deep objects", "digits"],
)
def test_what_the_pages_script_does_not_send(text: str) -> None:
    pytest.importorskip("gradio")
    from magicface_rt.errors import OptionError
    from magicface_rt.ui.form import photographs

    with pytest.raises(OptionError, match="Load it again"):
        photographs(text.encode())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("size=12582912", "size=" + "9" * 5000),
        ("main {", "main {" + "\n" * 200_000),
        ("  region =", "  region" + " " * 200_000),
        ("main {\n", "main {\n" * 50_000),
    ],
)
def test_a_plans_text_that_nobody_wrote(old: str, new: str) -> None:
    """Of so many empty lines it took minutes."""
    from outcomes import judged

    from magicface_rt.engines.plan_text import read_plan
    from tests.engines.test_plan_text import TEXT, plan

    data = plan(TEXT.replace(old, new, 1).removesuffix("}\n"))
    found = judged("plan text", lambda: read_plan(data), names=None)
    assert found is not None
    assert found.understood == old.startswith("main {")  # where nothing is lost by it


@pytest.mark.parametrize("password", [b"\xff", b"=", b"", b"YTpi", b"/w==", b"A" * 50_000])
def test_what_a_browser_sends_in_place_of_a_token_is_no_fault_of_the_service(password: bytes, make: Make) -> None:
    assert make("authorization").use(b"Basic " + password) is None
