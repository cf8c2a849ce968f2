"""`magicface-rt ui`: what it says, how it ends, and what is missing."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from paging import until

from magicface_rt.cli import main


def test_it_serves_the_page_and_the_interface_and_ends(tiny_bundle: Path) -> None:
    arguments = ["ui", str(tiny_bundle), "--port", "0", "--threads", "1", "--backend", "onnxruntime-cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "magicface_rt.cli", *arguments, "--default-steps", "2"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "GRADIO_ANALYTICS_ENABLED": "True"},
    )
    assert process.stderr is not None
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(process.stderr or ()), daemon=True)
    reader.start()
    try:
        until(lambda: "ready\n" in said or process.poll() is not None, f"it did not get ready: {said}", 60)
        url = next(line for line in said if "the page is at" in line).rpartition(" ")[2].strip()
        with httpx.Client(trust_env=False) as http:
            html = http.get(url).raise_for_status().text
            assert '"analytics_enabled":false' in html
            assert http.get(url.replace("/ui/", "/v1/bundle")).json()["default_steps"] == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(30)
    reader.join(10)
    assert said[-1] == "ended\n"


WITHOUT_RAY = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed here")
ON_RAY = pytest.param(["serve", "--ui", "--engine", "ray"], marks=WITHOUT_RAY)


@pytest.mark.parametrize("verb", [["ui"], ["serve", "--ui"], ON_RAY])
def test_without_gradio_it_names_the_extra(
    verb: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("magicface_rt.ui.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main([*verb, str(tmp_path / "no-bundle"), "--json", str(tmp_path / "out.json")]) == 3
    assert "the page needs the extra ui" in capsys.readouterr().err
    found = json.loads((tmp_path / "out.json").read_text())["error"]
    assert found["kind"] == "BackendMissingError"
    assert "pip install 'magicface_rt[ui]'" in found["message"]


def test_without_the_page_gradio_is_not_imported(tiny_bundle: Path) -> None:
    code = (
        "import sys, magicface_rt.cli._verbs, magicface_rt.ui, magicface_rt.serve.server; "
        "sys.exit(' '.join(name for name in sys.modules if name.partition('.')[0] == 'gradio') or 0)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
