"""Adds the page to the application of `magicface_rt.serve`, under /ui."""

from __future__ import annotations

import os

import gradio as gr
from fastapi import FastAPI
from starlette.routing import Mount

from ..serve.access import PAGE
from ..serve.service import Service
from ..tokenizer import Tokenizer
from .event import Kind, PageEvents
from .facts import Facts
from .handlers import Handlers
from .layout import lay_out, theme
from .page_middleware import PageMiddleware
from .tabs import Tabs

__all__ = ["Mounted", "mount_page"]

THREADS = 256
"""Events that Gradio carries at a time. Requests of the page that wait in the service's queue are among them; by
default that queue holds fewer.
"""

TABS = 64
"""Tabs of which Gradio holds the last field values, picture included, and what they have not read. It forgets a tab's
values when the tab closes its connection, and would never forget those of one that opened none, or what was not read.
Nothing is lost by forgetting values: the browser has what it shows.
"""


class Mounted:
    """A page that has been added to an application."""

    def __init__(self, page: gr.Blocks) -> None:
        self.page = page

    def end(self) -> None:
        """Close the connections of open tabs, which would otherwise keep the server from ending."""
        self.page.app.stop_event.set()


def mount_page(app: FastAPI, service: Service, tokenizer: Tokenizer, facts: Facts) -> Mounted:
    """Add the page to an application that `build_app` made of the same service.

    The application's checks of who may ask (`AccessMiddleware`) and its limits on bodies apply to the page as well.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    handlers = Handlers(service, tokenizer, facts)
    page = lay_out(handlers)
    page.max_threads = THREADS
    page.state_session_capacity = TABS
    page.queue(default_concurrency_limit=None)
    gr.mount_gradio_app(
        app,
        page,
        path=PAGE,
        theme=theme(),
        footer_links=[],
        run_history=False,  # it would keep photographs in the browser's storage
        max_file_size=0,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        show_error=True,
    )
    mounted = next(route for route in app.router.routes if isinstance(route, Mount) and route.path == PAGE)
    page.app = mounted.app  # type: ignore[assignment]
    tabs = Tabs(page, TABS)
    handlers.forget = tabs.forget  # type: ignore[method-assign]
    mounted.app = PageMiddleware(mounted.app, _events(page, handlers), tabs, handlers.left)
    return Mounted(page)


def _events(page: gr.Blocks, handlers: Handlers) -> PageEvents:
    """Return the events that reach the service; all others are handled by scripts in the browser."""

    def kind(event: str, field: object) -> Kind:
        if field is handlers.fields.bridge and event == handlers.generate.__name__:
            return "photographs"
        return "number" if isinstance(field, (gr.Slider, gr.Number)) else "text"

    return {
        number: [kind(str(event.api_name), field) for field in event.inputs]
        for number, event in page.fns.items()
        if event.fn is not None
    }
