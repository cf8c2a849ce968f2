"""The page: a `Service` in a browser. Photographs in, masks painted, pictures and their regions out.

    magicface-rt ui bundles/sd15-512            the page and the HTTP interface, on this machine
    magicface-rt serve bundles/sd15-512 --ui    the same beside everything else that `serve` takes

`mounting.mount_page` puts it into the application of `magicface_rt.serve`, so that its requests stand in the same
queue, under the same limits. Gradio lays the page out and carries its events; it gets no file. Needs the extra `ui`.
What the page promises: docs/ui.md.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from ..errors import BackendMissingError

__all__ = ["module"]


def module(name: str) -> Any:
    """A module of this package.

    Raises:
        BackendMissingError: the extra is not installed.
    """
    # Read when Gradio is imported: without them it asks for its newest version, and reports what is used.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        return importlib.import_module(f".{name}", __name__)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("magicface_rt"):
            raise
        raise BackendMissingError(
            f"the page needs the extra ui, which is not installed or not whole ({error}). "
            "Install it: pip install 'magicface_rt[ui]'"
        ) from error
