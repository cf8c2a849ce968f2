"""The layout of the page, and which handler each of its controls calls."""

from __future__ import annotations

from functools import partial
from html import escape
from typing import Any

import gradio as gr

from .editor import editor_html
from .examples import EXAMPLES, thumbnail
from .facts import Facts
from .handlers import Fields, Handlers, Slot, Views
from .result import NOTHING_YET
from .words import words_of

__all__ = ["lay_out", "theme"]

PRIVATE: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": None, "show_progress": "hidden"}
"""Settings of every event: the service has a queue of its own, and the page itself shows the state of a request."""

COLLECT = "(bridge, ...others) => [window.magicface.collect(), ...others]"

FIRST_PROMPT = "a man with a hat"


def theme() -> gr.themes.Base:
    """Return a theme that uses only the system's fonts, so nothing is loaded from elsewhere."""
    base = gr.themes.Base(
        primary_hue="blue",
        neutral_hue="gray",
        radius_size="sm",
        font=("system-ui", "Segoe UI", "Helvetica", "Arial", "sans-serif"),
        font_mono=("ui-monospace", "Consolas", "monospace"),
    )
    untyped: Any = base  # its `set` has no annotations
    untyped.set(  # Gradio's own greys are too faint to be read by everybody
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_800",
        block_label_text_color_dark="*neutral_100",
        block_title_text_color="*neutral_800",
        block_title_text_color_dark="*neutral_100",
        input_background_fill="*neutral_50",
        input_border_color="*neutral_500",
        input_border_width="1px",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_secondary_border_color="*neutral_500",
        button_cancel_border_color="*neutral_500",
        button_border_width="1px",
    )
    return base


def lay_out(handlers: Handlers) -> gr.Blocks:
    """Build the page, and set the handlers' `fields` and `views`."""
    facts = handlers.facts
    page = gr.Blocks(title="MagicFace", analytics_enabled=False, fill_width=True)
    with page:
        # The first field, because values reach COLLECT in the order in which the fields were made.
        bridge = gr.Textbox(label="bridge", visible="hidden", elem_id="mf-bridge")
        _html(_header(facts))
        examples = _gallery(facts)
        with gr.Row(equal_height=False, elem_classes="mf-columns"):
            with gr.Column(min_width=300):
                prompt = gr.Textbox(label="Prompt", info="What the picture shows.", value=FIRST_PROMPT, lines=2)
                slots, removals = [], []
                words = [word.label for word in words_of(handlers.tokenizer, FIRST_PROMPT)]
                for number in range(1, facts.concepts + 1):
                    slot, remove = _concept(number, facts, words)
                    slots.append(slot)
                    removals.append(remove)
                add = gr.Button(f"Add a concept (up to {facts.concepts})", elem_id="mf-add")
                settings = _settings(facts)
            with gr.Column(min_width=300, elem_classes="mf-outcome"):
                with gr.Row(elem_classes="mf-actions"):
                    generate = gr.Button("Generate", variant="primary", elem_id="mf-generate", min_width=120)
                    cancel = gr.Button("Cancel", variant="stop", elem_id="mf-cancel", min_width=120, scale=0)
                views = _views()
        _html(_footer(facts))
        handlers.fields = fields = Fields(bridge, prompt, tuple(slots), settings)
        handlers.views = views
        _connect(page, handlers, fields, views, (generate, cancel, add), removals, examples)
    return page


def _concept(number: int, facts: Facts, words: list[str]) -> tuple[Slot, gr.Button]:
    with gr.Column(visible=number == 1, elem_classes="mf-concept", elem_id=f"mf-concept-{number}") as block:
        with gr.Row(elem_classes="mf-concept-head"):
            _html(f"<h2>Concept {number}</h2>")
            remove = gr.Button(f"Remove concept {number}", size="sm", min_width=150, scale=0, elem_classes="mf-remove")
        gr.HTML(
            editor_html(number, facts.pixels),
            js_on_load="window.magicface.mount(element);",
            apply_default_css=False,
            elem_classes="mf-plain",
        )
        word = gr.Dropdown(
            label="Word of the prompt that it stands for",
            info="Choose one, or type several words that stand together in the prompt.",
            choices=words,
            value=None,
            allow_custom_value=True,
            elem_classes="mf-word",
        )
        with gr.Row():
            weight = gr.Slider(0, 6, 3.0, step=0.1, label="Weight", info="0 hides it; 2 to 4 is usual.", min_width=140)
            shows = gr.Textbox(
                label="What the photograph shows", info="In the prompt's manner; may be empty.", min_width=140
            )
    return Slot(number, block, word, weight, shows), remove


def _settings(facts: Facts) -> dict[str, Any]:
    with gr.Column(elem_classes="mf-settings"):
        _html("<h2>Settings</h2>")
        alpha = gr.Slider(
            0, 1, 0.4, step=0.05, label="Alpha", info="Share of the steps before regions keep the concepts apart."
        )
        with gr.Row():
            steps = gr.Slider(1, facts.steps, facts.default_steps, step=1, label="Steps", min_width=140)
            seed = gr.Number(0, precision=0, label="Seed", min_width=140)
        guidance = gr.Slider(1, 20, 7.5, step=0.5, label="Guidance", info="Strength of the prompt.")
        negative = gr.Textbox(label="Negative prompt", info="What the picture shall not show.")
    return {"alpha": alpha, "steps": steps, "seed": seed, "guidance": guidance, "negative_prompt": negative}


def _views() -> Views:
    status = _html('<div class="mf-status"></div>', elem_id="mf-status")
    result = gr.HTML(
        NOTHING_YET,
        js_on_load="watch('value', () => window.magicface.regions(element));",
        apply_default_css=False,
        elem_id="mf-result",
        elem_classes="mf-plain",
    )
    timings = _html("", elem_id="mf-timings")
    _html("<h2>The calls that do the same</h2>")
    with gr.Tabs():
        with gr.Tab("Python"):
            python = _code("python", "Python, with the SDK", "mf-python")
        with gr.Tab("curl", render_children=True):
            curl = _code("shell", "Shell, over HTTP", "mf-curl")
    return Views(status, result, timings, python, curl)


def _code(language: Any, label: str, name: str) -> gr.Code:
    return gr.Code(
        "# The call stands here when a picture was made.",
        language=language,
        label=label,
        interactive=False,
        wrap_lines=True,
        show_line_numbers=False,
        buttons=["copy"],
        elem_id=name,
    )


def _gallery(facts: Facts) -> list[tuple[Any, gr.Button]]:
    found = []
    _html('<h2 class="mf-section">Examples</h2>')
    with gr.Row(equal_height=True, elem_classes="mf-gallery"):
        for example in EXAMPLES:
            if len(example.concepts) > facts.concepts:
                continue
            with gr.Column(min_width=220, elem_classes="mf-card"):
                _html(
                    f'<img src="{thumbnail(example)}" alt="" height="96">'
                    f"<p><strong>{escape(example.title)}.</strong> {escape(example.shows)}</p>"
                )
                found.append((example, gr.Button(f"Load: {example.title.lower()}", size="sm")))
    return found


def _connect(
    page: gr.Blocks,
    handlers: Handlers,
    fields: Fields,
    views: Views,
    buttons: tuple[gr.Button, gr.Button, gr.Button],
    removals: list[gr.Button],
    examples: list[tuple[Any, gr.Button]],
) -> None:
    generate, cancel, add = buttons
    generate.click(
        handlers.generate, fields.all, [*views.all, fields.bridge], js=COLLECT, trigger_mode="once", **PRIVATE
    )
    cancel.click(handlers.cancel, None, views.status, **PRIVATE)
    words = [slot.word for slot in fields.slots]
    fields.prompt.change(handlers.words, fields.prompt, words, trigger_mode="always_last", **PRIVATE)
    blocks = [slot.block for slot in fields.slots]
    add.click(handlers.add, fields.bridge, blocks, js="() => window.magicface.free()", **PRIVATE)
    for slot, remove in zip(fields.slots, removals, strict=True):
        emptied = [slot.block, slot.word, slot.weight, slot.prompt]
        drop = f"() => {{ window.magicface.drop({slot.number}); }}"
        remove.click(handlers.remove, None, emptied, js=drop, **PRIVATE)
    filled = {field for slot in fields.slots for field in (slot.block, slot.word, slot.weight, slot.prompt)}
    loaded = [
        *(fields.bridge, fields.prompt, fields.settings["alpha"], fields.settings["seed"]),
        *(views.status, views.result, views.timings),
        *filled,
    ]
    for example, button in examples:
        button.click(partial(handlers.load, example), None, loaded, **PRIVATE).then(
            None, fields.bridge, fields.bridge, js="(text) => window.magicface.load(text)"
        )


def _html(content: str, **settings: Any) -> gr.HTML:
    return gr.HTML(content, js_on_load=None, apply_default_css=False, elem_classes="mf-plain", **settings)


def _header(facts: Facts) -> str:
    size = f"{facts.width} x {facts.height}"
    return (
        f'<header class="mf-header" data-most-bytes="{facts.body_bytes}"><h1>MagicFace</h1>'
        "<p>Write a prompt. Give each person or thing a photograph, paint what of it counts, and choose the word that "
        "it stands for. Then generate, and look at which places of the picture belonged to which word at each step.</p>"
        f'<p class="mf-facts">Bundle {escape(facts.name)} ({escape(facts.architecture)}, {escape(facts.dtype)}), '
        f"pictures of {size} pixels, on {escape(facts.backend)}. Photographs are never written to a disk.</p></header>"
    )


def _footer(facts: Facts) -> str:
    return (
        '<footer class="mf-footer"><p>Pictures are made by a generative model and say so in their files. Consent of '
        f"the people shown is yours to have. Bundle {facts.hash[:16]}.</p></footer>"
    )
