from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.jobs import write_images, write_job


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job for two steps, and its images beside it."""
    write_images(tmp_path)
    return write_job(tmp_path)
