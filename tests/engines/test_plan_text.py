"""Reading a plan's own text: memory regions and kernels, and knowing when they were not understood."""

from __future__ import annotations

import mmap
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magicface_rt.engines.plan_text import Kernel, PlanFacts, Region, read_plan

SOFTMAX = "[ONNX Layer: node_of_probabilities | up.attn (RegionAttention)]"
VALUES = "[ONNX Layer: node_of_out_wide | up.attn (RegionAttention)]"

TEXT = f"""header {{
  version = 5
  n_accelerators = 1
  memory_budget = 68719476736
  region = {{ name=devmem_topdown_0 size=12582912 alignment=128 instance=0 type=user place=accelerator unified=false }}
  region = {{ name=devmem_topdown_1 size=3145728 alignment=128 instance=0 type=user place=accelerator unified=false }}
  region = {{ name=hmem_topdown_0 size=99999 alignment=128 instance=0 type=user place=host unified=false }}
  region = {{ name=m1-consts size=56 alignment=128 instance=0 type=system place=accelerator unified=false constant=true }}
  inputs={{ "q.1" }}
}}
descriptors {{
  tensor={{ alignment=128 dims={{ 4096 }} name="a" offset=0 region="devmem_topdown_0" type=fp16 }}
  tensor={{ alignment=128 dims={{ 4096 }} name="q.1" offset=0 region="" type=fp16 }}
}}
main {{
 label bb1:
  shape_call={{ name="s_0" stream=0 layers="" }}
  function={{ name=_gemm_mha_v2 fqn=_gemm_mha_v2_0x97 args={{ "a" }} grid = {{ 64 1 8 }} layers="{VALUES}\x1f{SOFTMAX}" swap_ab=false }}
  function={{ name=__myl_Tran fqn=__myl_Tran_0x90 args={{ "a" }} cond_fqn = {{ binary = 32 }} swap_ab=false }}
  fully_connected={{ name="node_linear" output={{ "b" }} layers="[ONNX Layer: node_linear]" }}
}}
shape_main {{
  function={{ name=not_a_kernel fqn=not_a_kernel_0x1 layers="{SOFTMAX}" }}
}}
"""  # noqa: E501 - the lines are the library's


def plan(*texts: str, padding: int = 64) -> bytes:
    """A plan as the library lays it out: weights, then each program behind its signature."""
    out = b""
    for text in texts:
        data = text.encode()
        out += b"\x9c" * padding + b"NLYM\xa1\xda\x1e\x00" + len(data).to_bytes(8, "little") + data
    return out + b"\x9c" * padding


def facts(text: str) -> PlanFacts:
    return read_plan(plan(text))


def test_regions_and_kernels() -> None:
    found = facts(TEXT)

    assert found.understood
    assert found.problem == ""
    assert (found.programs, found.plan_bytes) == (1, len(plan(TEXT)))
    assert found.regions[0] == Region("devmem_topdown_0", 12582912, "user", "accelerator", constant=False)
    assert [r.place for r in found.regions] == ["accelerator", "accelerator", "host", "accelerator"]
    assert found.kernels == (
        Kernel(0, "shape_call", "s_0", "", ()),
        Kernel(0, "function", "_gemm_mha_v2", "_gemm_mha_v2_0x97", (VALUES, SOFTMAX)),
        Kernel(0, "function", "__myl_Tran", "__myl_Tran_0x90", ()),
        Kernel(0, "fully_connected", "node_linear", "", ("[ONNX Layer: node_linear]",)),
    )


def test_scratch_is_what_is_on_the_device_and_not_constant() -> None:
    found = facts(TEXT)
    assert found.scratch_bytes == 12582912 + 3145728
    assert [r.name for r in found.largest_regions(1)] == ["devmem_topdown_0"]


def test_programs_of_several_profiles_add_up() -> None:
    found = read_plan(plan(TEXT, TEXT))
    assert (found.programs, found.understood) == (2, True)
    assert found.scratch_bytes == 2 * facts(TEXT).scratch_bytes
    assert {k.program for k in found.kernels} == {0, 1}


def test_pieces_that_are_compiled_at_first_load_own_constants_only() -> None:
    """Their steps have another form and no name of a compiled function; the main program names them."""
    piece = """header {
  version = 4
  region = { name=runtime-fusion-consts size=132 alignment=128 instance=0 type=system place=accelerator unified=false constant=true }
}
descriptors {
}
main {
 label bb1:
  pointwise={ name="p" layers="[ONNX Layer: node_silu]" }
}
"""  # noqa: E501
    found = read_plan(plan(TEXT, piece, piece))
    assert (found.programs, found.understood) == (3, True)
    assert found.scratch_bytes == facts(TEXT).scratch_bytes


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("region = {", "memory = {", "tensors lie in the memory region 'devmem_topdown_0'"),
        (
            "  region = { name=devmem_topdown_1",
            "  region = { label=devmem_topdown_1",
            "4 lines look like memory regions, 3",
        ),
        ("size=3145728", "size=3MiB", "4 lines look like memory regions, 3"),
        ('region="devmem_topdown_0"', 'region="devmem_9"', "tensors lie in the memory region 'devmem_9'"),
        ("function={ name=_gemm", "function={ label=_gemm", "2 lines look like compiled functions, 1"),
        ("fqn=__myl_Tran_0x90 ", "", "2 lines look like compiled functions, 1"),
        ("  function={", "  kernel={", "none with a compiled function"),
        ("main {\n label", "body {\n label", "no main section"),
        ("header {", "preface {", "no program text"),
        ("}\n", "]\n", "does not end"),
    ],
)
def test_another_form_of_text_is_a_problem(old: str, new: str, problem: str) -> None:
    changed = TEXT.replace(old, new)
    assert changed != TEXT
    found = facts(changed)
    assert not found.understood
    assert problem in found.problem


def test_a_text_without_regions_is_a_problem() -> None:
    lines = [line for line in TEXT.splitlines(keepends=True) if "region" not in line]
    assert "none with a memory region" in facts("".join(lines)).problem


@pytest.mark.parametrize("data", [b"", b"\0" * 100_000, b"NLYM", b"ftrt" + b"\xff" * 5000], ids=range(4))
def test_bytes_without_text_are_a_problem(data: bytes) -> None:
    found = read_plan(data)
    assert found.problem == "no program text was found"
    assert (found.regions, found.kernels) == ((), ())


def test_a_length_that_cannot_be_is_a_problem() -> None:
    data = plan(TEXT)
    at = data.index(b"NLYM") + 8
    for length, problem in ((2**63, "ends after the plan"), (len(TEXT) - 3, "does not end")):
        found = read_plan(data[:at] + length.to_bytes(8, "little") + data[at + 8 :])
        assert problem in found.problem


@settings(max_examples=200, deadline=None)
@given(cut=st.integers(0, len(plan(TEXT)) - 1))
def test_a_truncated_plan_is_understood_only_if_the_text_is_whole(cut: int) -> None:
    data = plan(TEXT)
    found = read_plan(data[:cut])
    assert found.understood == (cut >= data.index(b"NLYM") + 16 + len(TEXT.encode()))


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, len(plan(TEXT)) - 1), value=st.integers(0, 255))
def test_no_byte_makes_the_reader_raise(at: int, value: int) -> None:
    data = bytearray(plan(TEXT))
    data[at] = value
    assert read_plan(data).plan_bytes == len(data)


def test_a_large_plan_is_searched_in_place(tmp_path: Path) -> None:
    path = tmp_path / "plan"
    with path.open("wb") as stream:
        stream.truncate(128 << 20)  # sparse
        stream.seek(64 << 20)
        stream.write(plan(TEXT))
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        tracemalloc.start()
        found = read_plan(mapped)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert found.scratch_bytes == facts(TEXT).scratch_bytes
    assert peak < 1 << 20


def test_every_kind_of_buffer() -> None:
    data = plan(TEXT)
    data += b"\0" * (-len(data) % 4)
    assert read_plan(data).understood
    assert read_plan(bytearray(data)) == read_plan(memoryview(data)) == read_plan(data)
    assert read_plan(memoryview(data).cast("f")) == read_plan(data)
