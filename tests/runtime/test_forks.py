"""What a forked process needs for a Session of its own, whatever its parent's threads held as it was forked."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import textwrap
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from magicface_rt import decoding
from magicface_rt.computed import ComputedOnce

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

SECONDS = 120
"""After so many a child that hangs is ended."""


def in_a_child(before: str, child: str, after: str = "") -> None:
    """Run `child` in a process that is forked after `before`, which makes `let_go`, set before `after`."""
    code = f"""
import os, signal, threading
let_go = threading.Event()
{textwrap.dedent(before)}
forked = os.fork()
if forked == 0:
    signal.alarm({SECONDS})
{textwrap.indent(textwrap.dedent(child), "    ")}
    os._exit(7)
let_go.set()
{textwrap.dedent(after)}
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=3 * SECONDS)
    assert done.returncode == 7, f"it hung, or failed: {done.returncode} {done.stderr[-2000:]}"


def test_an_image_is_read_while_a_thread_of_the_parent_reads_one() -> None:
    in_a_child(
        """
        from PIL import Image
        from magicface_rt.decoding import decode
        from magicface_rt.errors import ImageError

        class Slow(Image.Image):
            def load(self):
                reading.set()
                let_go.wait()
                return super().load()

        slow, reading = Slow(), threading.Event()
        slow.__setstate__(Image.new("RGB", (4, 4)).__getstate__())
        reader = threading.Thread(target=decode, args=(slow, "one", ImageError))
        reader.start()
        reading.wait()
        """,
        'decode(Image.new("RGB", (4, 4)), "other", ImageError)',
        "reader.join()",
    )


KINDS = {"Lock", "RLock", "Condition", "Semaphore", "BoundedSemaphore", "Barrier", "Event", "local", "cached_property"}
"""What may stay locked in a forked process, or belongs to a thread. Python before 3.12 has a lock in the last."""


def shared(tree: ast.Module) -> list[tuple[int, str]]:
    """What of `KINDS` there is one of for a module or class: its line and the name it has; not what calls make."""
    found = []
    bodies: list[ast.Module | ast.ClassDef] = [tree]
    while bodies:
        for statement in bodies.pop().body:
            if isinstance(statement, ast.ClassDef):
                bodies.append(statement)
                continue
            if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
                parts: list[ast.AST] = [*statement.decorator_list, *statement.args.defaults]
            else:
                parts = [node for node in ast.walk(statement) if isinstance(node, ast.Call)]
                parts = [node.func for node in parts if isinstance(node, ast.Call)]
            names = {part.attr if isinstance(part, ast.Attribute) else getattr(part, "id", "") for part in parts}
            if names & KINDS:
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement]
                found.append((statement.lineno, getattr(targets[0], "id", getattr(targets[0], "name", ""))))
    return found


def renewed(tree: ast.Module) -> set[str]:
    """Names that a function gives anew which is called in a forked process."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    called = {
        keyword.value.id
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "register_at_fork"
        for keyword in call.keywords
        if keyword.arg == "after_in_child" and isinstance(keyword.value, ast.Name)
    }
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in called]
    return {name for one in functions for node in ast.walk(one) if isinstance(node, ast.Global) for name in node.names}


def test_every_lock_of_a_module_is_renewed_and_no_class_has_one() -> None:
    package, found = Path(decoding.__file__).parent, {}
    for file in sorted(package.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        found.update({(file.name, name): line for line, name in shared(tree) if name not in renewed(tree)})
    assert not found, "a process that is forked may find it locked for ever"
    assert "_loading" in renewed(ast.parse(Path(decoding.__file__).read_text(encoding="utf-8")))
    told = """
import threading
lock = threading.Lock()
class One:
    here = threading.local()
    @cached_property
    def value(self): ...
    def own(self):
        self.lock = threading.Lock()
"""
    assert [name for _, name in shared(ast.parse(told))] == ["lock", "here", "value"]


def test_what_computes_in_a_thread_of_the_parent_refuses_a_call_and_waits_for_nothing() -> None:
    in_a_child(
        """
        from magicface_rt.backends.single_thread_executor import SingleThreadExecutor
        from magicface_rt.errors import OtherProcessError

        one = SingleThreadExecutor("onnxruntime-cuda")
        one(int)
        """,
        """
        try:
            one(int)
        except OtherProcessError as error:
            assert "onnxruntime-cuda computes in a thread of process" in str(error)
        else:
            raise AssertionError("it was called")
        one.close()
        """,
        "assert one(int) == 0",
    )


def test_graphs_do_without_the_memory_whose_lock_the_parents_threads_may_hold() -> None:
    in_a_child(
        """
        import numpy as np
        from magicface_rt.backends.onnxruntime import OnnxRuntime, import_onnxruntime
        from magicface_rt.backends.ort_arena import use_shared_arena
        from magicface_rt.backends.sum_model import sum_model

        def shares():
            options = import_onnxruntime().SessionOptions()
            use_shared_arena(import_onnxruntime(), options)
            try:
                return options.get_session_config_entry("session.use_env_allocators") == "1"
            except RuntimeError:
                return False

        def run():
            return OnnxRuntime("cpu", threads=1).run_model(sum_model(), {"x": np.ones(1, np.float32)})

        run()
        assert shares()
        """,
        """
        run()
        assert not shares()
        """,
        "assert shares()",
    )


@dataclass(frozen=True)
class Counted:
    calls: list[int] = field(default_factory=list)

    @ComputedOnce
    def value(self) -> int:
        """What it is."""
        self.calls.append(1)
        return len(self.calls)


def test_what_is_computed_once_is_the_objects_own_and_one_for_all_threads() -> None:
    one, other = Counted(), Counted([0])
    assert [one.value, one.value, other.value, other.value] == [1, 1, 2, 2]
    assert len(one.calls) == 1
    assert Counted.value.__doc__ == "What it is."
    both = threading.Barrier(2)

    class Slow:
        @ComputedOnce
        def value(self) -> object:
            both.wait()
            return object()

    slow, found = Slow(), []
    threads = [threading.Thread(target=lambda: found.append(slow.value)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] is found[1] is slow.value
