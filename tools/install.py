"""`make venv`: install everything that the demo and the tests need into the Python that runs this.

If there is a lock for this Python and build of PyTorch, on Linux x86-64, every archive must have the SHA-256 of the
lock, or nothing of it is installed. Otherwise the versions of constraints.txt are installed, without hashes, and a
message says so. The build of PyTorch depends on what pip is configured to see: it is the CPU build if that is offered,
else that of the default index.

    python -m tools.install
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tools import lockfile
from tools.wanted import BUILD_TOOLS, EXTRAS, NATIVE_TOOLS

HASHED = ("install", "-qq", "--no-deps", "--require-hashes")


def pip(*arguments: str) -> None:
    """Run pip in this Python.

    Raises:
        SystemExit: pip failed, and has printed why.
    """
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], cwd=lockfile.ROOT, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def torch_on_offer() -> str:
    """The version of torch that pip would find: the CPU build if an index or folder that it is set up for has one."""
    version = lockfile.torch_version()
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "index", "versions", "torch"], capture_output=True, text=True, check=False
    ).stdout
    # Another line names what is installed, which says nothing about what is offered.
    offered = re.search(r"^Available versions: (.*)$", listed, re.MULTILINE)
    cpu = f"{version}+cpu"
    return cpu if offered is not None and cpu in offered[1].split(", ") else version


def usable_lock(torch: str) -> Path | None:
    """The lock for this machine and this build of torch; None if there is none."""
    machine = (sys.implementation.name, sys.platform, platform.machine(), platform.libc_ver()[0])
    path = lockfile.path_of(sys.version_info[:2], torch)
    return path if machine == ("cpython", "linux", "x86_64", "glibc") and path.is_file() else None


def install_locked(path: Path) -> None:
    """Install the packages of a lock, and nothing else.

    Raises:
        SystemExit: an archive has another hash, or pip failed otherwise.
        ValueError: the file is no lock.
    """
    first = [pin for pin in lockfile.read(path) if pin.name in BUILD_TOOLS]
    if first:
        with tempfile.TemporaryDirectory() as folder:
            tools = Path(folder) / "build-tools.txt"
            tools.write_text(lockfile.text_of(first), encoding="utf-8")
            pip(*HASHED, "-r", str(tools))
    pip(*HASHED, "--no-build-isolation", "-r", str(path))


def main() -> None:
    torch = torch_on_offer()
    lock = usable_lock(torch)
    if lock is not None:
        print(f"installing by {lock.relative_to(lockfile.ROOT)}: every archive's SHA-256 is checked", flush=True)
        install_locked(lock)
        # What builds the wheel is in the lock, so nothing is fetched for this.
        pip("install", "-qq", "--no-deps", "--no-build-isolation", "-e", ".")
        return
    here = f"Python {platform.python_version()} on {sys.platform} {platform.machine()} with torch {torch}"
    print(f"there is no lock for {here}: installing the versions of constraints.txt, without hashes", flush=True)
    constrained = ("install", "-qq", "-c", str(lockfile.CONSTRAINTS))
    pip(*constrained, *BUILD_TOOLS)
    # torch first and exactly: a looser requirement may bring another build with gigabytes of packages.
    pip(*constrained, f"torch=={lockfile.torch_version()}", "scikit-build-core", *NATIVE_TOOLS)
    pip(*constrained, "--no-build-isolation", "-e", f".[{','.join(EXTRAS)}]")


if __name__ == "__main__":
    main()
