"""The page in the application of `magicface_rt.serve`, under /ui."""

from __future__ import annotations

import os

import gradio as gr
from fastapi import FastAPI
from starlette.routing import Mount

from ..serve.gate import PAGE
from ..serve.service import Service
from ..tokenizer import Tokenizer
from .door import Door
from .event import Events, Kind
from .facts import Facts
from .handlers import Handlers
from .layout import lay_out, theme

__all__ = ["Mounted", "mount_page"]

THREADS = 256
"""Events that Gradio carries at a time: requests that wait in the service's queue among them, which holds fewer."""

TABS = 64
"""Tabs whose last fields, picture included, Gradio holds at a time. It forgets a tab when that closes its connection,
and would not forget one that never opened any. What was forgotten is not missed: the browser has what it shows.
"""


class Mounted:
    """A page that is in an application."""

    def __init__(self, page: gr.Blocks) -> None:
        self.page = page

    def end(self) -> None:
        """Let go of open tabs: each holds a connection, which would keep the server from ending."""
        self.page.app.stop_event.set()


def mount_page(app: FastAPI, service: Service, tokenizer: Tokenizer, facts: Facts) -> Mounted:
    """Put the page into an application that `build_app` made of the same service.

    The application's gate and limits of bodies stand before it.
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
    mounted.app = Door(mounted.app, _events(page, handlers), handlers.left)
    holder = page.state_holder

    def forget(tab: str) -> None:
        holder.session_data.pop(tab, None)
        holder.time_last_used.pop(tab, None)

    handlers.forget = forget  # type: ignore[method-assign]
    return Mounted(page)


def _events(page: gr.Blocks, handlers: Handlers) -> Events:
    """Those that reach the service; a script in the browser has the others for itself."""

    def kind(event: str, field: object) -> Kind:
        if field is handlers.fields.bridge and event == handlers.generate.__name__:
            return "photographs"
        return "number" if isinstance(field, (gr.Slider, gr.Number)) else "text"

    return {
        number: [kind(str(event.api_name), field) for field in event.inputs]
        for number, event in page.fns.items()
        if event.fn is not None
    }
