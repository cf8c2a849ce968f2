"""What happens when somebody uses the page. Knows the fields, but nothing of their looks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..errors import MagicFaceError
from ..request import Progress
from ..serve.problems import Problem
from ..serve.schemas import PictureOrder
from ..serve.service import Accepted, Service
from ..tokenizer import Tokenizer
from . import saying
from .event import Parcel
from .examples import Example, bridged
from .facts import Facts
from .form import Form, FormConcept, Photograph, photographs
from .result import NOTHING_YET, result_html, timings_html
from .runs import Runs
from .snippets import curl_call, python_call
from .words import words_of

__all__ = ["Fields", "Handlers", "Slot", "Views"]

logger = logging.getLogger("magicface_rt.ui")

FORGET_SECONDS = 1.0
"""How long a stopped request needs to end. The tab is forgotten only after that, since the last messages of the request
would make the framework remember it again.
"""

Updates = dict[Any, Any]
"""New values or properties, by component."""


@dataclass(frozen=True)
class Slot:
    """The fields of one concept, and the block that holds them."""

    number: int
    block: gr.Column
    word: gr.Dropdown
    weight: gr.Slider
    prompt: gr.Textbox


@dataclass(frozen=True)
class Fields:
    """The page's inputs. `bridge` carries what only the page's script has: the photographs and masks."""

    bridge: gr.Textbox
    prompt: gr.Textbox
    slots: tuple[Slot, ...]
    settings: Mapping[str, Any]
    """The fields by the names of the order's settings."""

    @property
    def all(self) -> set[Any]:
        of_slots = {field for slot in self.slots for field in (slot.word, slot.weight, slot.prompt)}
        return {self.bridge, self.prompt, *self.settings.values(), *of_slots}


@dataclass(frozen=True)
class Views:
    """The page's outputs."""

    status: gr.HTML
    result: gr.HTML
    timings: gr.HTML
    python: gr.Code
    curl: gr.Code

    @property
    def all(self) -> list[Any]:
        return [self.status, self.result, self.timings, self.python, self.curl]


class Handlers:
    """The page's event handlers, over any `Service`. `fields` and `views` are set when the page is laid out."""

    fields: Fields
    views: Views

    def __init__(self, service: Service, tokenizer: Tokenizer, facts: Facts) -> None:
        self.tokenizer = tokenizer
        self.facts = facts
        self.runs = Runs(service)

    # ------------------------------------------------------------------------------------------------------ pictures

    async def generate(self, given: dict[Any, Any], request: gr.Request) -> AsyncIterator[Updates]:
        """Make the picture, and report the progress after every step. A request that is refused is reported on the
        page, which stays usable.

        The photographs are released once they are decoded; the page has them, and sends them again.
        """
        tab, form = str(request.session_hash), None
        status = self.views.status
        yield {status: saying.started(), self.fields.bridge: ""}
        last: Progress | None = None
        run = None
        try:
            order, form, shown = await self._read(given, request.state.parcel)
            run = self.runs.start(tab, order, _owner(request))
            del order
            while (news := await run.next()) is not None:
                if isinstance(news, Accepted):
                    yield {status: saying.waiting(news.waiting)}
                else:
                    last = news
                    yield {status: saying.progressing(news)}
            outcome = run.outcome
            files = form.files()
            yield {
                status: saying.done(outcome, form),
                self.views.result: result_html(outcome, shown),
                self.views.timings: timings_html(outcome),
                self.views.python: python_call(shown, files, self.facts),
                self.views.curl: curl_call(shown, files, self.facts, _address(request)),
            }
        except asyncio.CancelledError:
            if run is None or not run.stopped:
                raise  # the tab was closed
            yield {status: saying.cancelled(last)}
        except Exception as error:
            if not isinstance(error, MagicFaceError) or Problem.of(error).status == 500:
                logger.error("a request of the page failed", exc_info=error)
            yield {status: saying.refusal_text(error, form)}
        finally:
            if run is not None:
                self.runs.over(tab, run)

    async def cancel(self, request: gr.Request) -> Any:
        """Stop the tab's request; `generate` then reports that."""
        if self.runs.stop(str(request.session_hash)):
            return gr.skip()
        return saying.note("There is nothing to cancel.")

    def left(self, tab: str) -> None:
        """Handle a closed tab: stop its request, and drop what the framework holds of it."""
        self.runs.stop(tab)
        asyncio.get_running_loop().call_later(FORGET_SECONDS, lambda: self.forget(tab))

    def forget(self, tab: str) -> None:
        """Drop what the framework holds of a tab. Does nothing until `mount_page` replaces it."""

    # ------------------------------------------------------------------------------------------------------ the form

    async def words(self, prompt: str) -> list[Any]:
        """Offer the words of the prompt to every concept. What was chosen stays chosen."""
        found = await asyncio.to_thread(words_of, self.tokenizer, prompt or "")
        labels = [word.label for word in found]
        return [gr.update(choices=labels) for _ in self.fields.slots]

    async def add(self, slot: str) -> list[Any]:
        """Show the concept with this number; nothing changes if all are shown."""
        return [gr.update(visible=True) if str(one.number) == slot else gr.skip() for one in self.fields.slots]

    async def remove(self) -> tuple[Any, ...]:
        """Hide a concept, and empty its fields."""
        return gr.update(visible=False), gr.update(value=None), 3.0, ""

    async def load(self, example: Example) -> Updates:
        """Fill the page with an example; the script takes its photographs and masks from the bridge."""
        labels = [word.label for word in words_of(self.tokenizer, example.prompt)]
        updates: Updates = {
            self.fields.bridge: bridged(example),
            self.fields.prompt: example.prompt,
            self.fields.settings["alpha"]: example.alpha,
            self.fields.settings["seed"]: example.seed,
            self.views.status: saying.note(f"Loaded the example {example.title!r}. Generate makes its picture."),
            self.views.result: NOTHING_YET,
            self.views.timings: "",
        }
        for slot in self.fields.slots:
            used = slot.number <= len(example.concepts)
            one = example.concepts[slot.number - 1] if used else None
            updates[slot.block] = gr.update(visible=used)
            updates[slot.word] = gr.update(choices=labels, value=one.word if one else None)
            updates[slot.weight] = one.weight if one else 3.0
            updates[slot.prompt] = one.prompt if one else ""
        return updates

    async def _read(self, given: Mapping[Any, Any], parcel: Parcel) -> tuple[PictureOrder, Form, PictureOrder]:
        """Return the order, then the form and the order once more, both without the photographs."""

        def read() -> tuple[PictureOrder, Form, PictureOrder]:
            form = self._form(given, photographs(parcel.take()))
            order, form = form.order(self.tokenizer), form.without_files()
            return order, form, form.order(self.tokenizer)

        share = parcel.share.handed_on()
        try:
            order, form, shown = await asyncio.to_thread(read)  # a large form would block all other requests
        except BaseException:
            share.give_back()
            raise
        share.lasts_as_long_as(order)
        return order, form, shown

    def _form(self, given: Mapping[Any, Any], sent: Sequence[Photograph]) -> Form:
        fields = self.fields
        slots = {slot.number: slot for slot in fields.slots}
        concepts = [
            FormConcept(
                one,
                str(given[slots[one.slot].word] or ""),
                float(given[slots[one.slot].weight]),
                str(given[slots[one.slot].prompt] or ""),
            )
            for one in sent
            if one.slot in slots
        ]
        settings = {name: _number(given[field]) for name, field in fields.settings.items()}
        settings["negative_prompt"] = settings["negative_prompt"] or ""  # an empty field may have no value
        return Form(str(given[fields.prompt] or ""), concepts, settings)


def _number(value: Any) -> Any:
    """Turn 20.0 into 20: a slider gives floats, where an order may require an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _owner(request: gr.Request) -> str:
    """Return who the request belongs to in the queue, as determined by `AccessMiddleware`."""
    return str(getattr(request.state, "owner", ""))


def _address(request: gr.Request) -> str:
    """Return the service's address as the browser sees it."""
    url = request.request.url  # type: ignore[union-attr]
    return f"{url.scheme}://{url.netloc}"
