from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """PyTorch computes on one thread: tests run beside each other, and sums come out the same every time."""
    try:
        import torch
    except ImportError:  # then there is nothing of it to test
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
