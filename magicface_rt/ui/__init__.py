"""The page: a `Service` in a browser. Photographs go in and masks are painted; pictures and their regions come out.

    magicface-rt ui bundles/sd15-512            the page and the HTTP interface, on this machine
    magicface-rt serve bundles/sd15-512 --ui    the same, with all other options of `serve`

`mounting.mount_page` adds the page to the application of `magicface_rt.serve`, so its requests wait in the same queue,
under the same limits. Gradio lays the page out and carries its events; it is given no file. Needs the extra `ui`. What
the page promises: docs/ui.md.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from ..errors import BackendMissingError

__all__ = ["module"]


def module(name: str) -> Any:
    """Import a module of this package.

    Raises:
        BackendMissingError: the extra is not installed.
    """
    # Gradio reads these on import; without them it checks for its newest version and sends usage statistics.
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
