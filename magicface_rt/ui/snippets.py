"""The calls that do the same as the page: with the SDK, and over HTTP with curl."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from typing import Any

from ..options import Options
from ..serve.schemas import PictureOrder
from .facts import Facts
from .file_names import PICTURE

__all__ = ["curl_call", "python_call"]

_PLAIN = re.compile(r"[A-Za-z0-9._-]+")
_SETTINGS = ("steps", "alpha", "seed", "guidance", "negative_prompt")


def python_call(order: PictureOrder, files: Sequence[tuple[str, str]], facts: Facts) -> str:
    """Return Python code that makes the same picture from photographs and masks with these names."""
    imports = "Concept, Reference, Session" if order.concepts else "Session"
    lines = [f"from magicface_rt import {imports}", "", f"with Session({facts.name!r}) as session:"]
    names = []
    for k, (use, (image, mask)) in enumerate(zip(order.concepts, files, strict=True), 1):
        assert use.references is not None
        reference = use.references[0]
        given = [repr(image), *([f"mask={mask!r}"] if reference.mask is not None else [])]
        given += [f"prompt={reference.prompt!r}"] if reference.prompt else []
        token = f", token_index={use.token_index!r}" if use.token_index is not None else ""
        names.append(f"concept_{k}")
        lines += [
            f"    concept_{k} = Concept(",
            f"        {use.word!r}, Reference({', '.join(given)}), weight={use.weight!r}{token}",
            "    )",
        ]
    lines += [
        "    result = session.generate(",
        f"        {order.prompt!r},",
        *([f"        [{', '.join(names)}],"] if names else []),
        *(f"        {name}={value!r}," for name, value in _settings(order).items()),
        "    )",
        f'result.images[0].save("{PICTURE}")',
    ]
    return "\n".join(lines) + "\n"


def curl_call(order: PictureOrder, files: Sequence[tuple[str, str]], facts: Facts, url: str) -> str:
    """Return commands for a POSIX shell that put each concept once, and then make the picture with their ids."""
    lines = [f"service={shlex.quote(url)}"]
    token = ""
    if facts.protected:
        lines.append("# TOKEN holds one of the service's tokens")
        token = ' -H "Authorization: Bearer $TOKEN"'
    uses = []
    for k, (use, (image, mask)) in enumerate(zip(order.concepts, files, strict=True), 1):
        assert use.references is not None
        reference = use.references[0]
        form = [_file("image", image), *([_file("mask", mask)] if reference.mask is not None else [])]
        form += [f"--form-string {shlex.quote(f'{name}={value}')}" for name, value in _parts(order, k - 1)]
        lines.append(
            f'id_{k}=$(curl -fsS{token} -X PUT "$service/v1/concepts" \\\n'
            f"  {' '.join(form)} \\\n"
            """  | sed -E 's/.*"id": *"([0-9a-f]+)".*/\\1/')"""
        )
        settings = {"word": use.word, "weight": use.weight, "token_index": use.token_index}
        given = json.dumps({name: value for name, value in settings.items() if value is not None})
        uses.append(f'{{"id": "$id_{k}", {_in_here_document(given[1:])}')
    body = _in_here_document(json.dumps({"prompt": order.prompt, **_settings(order)}))
    concepts = f', "concepts": [{", ".join(uses)}]' if uses else ""
    lines += [
        f"curl -fsS{token} \"$service/v1/images\" -H 'Content-Type: application/json' -H 'Accept: image/png' \\",
        f"  -o {PICTURE} --data-binary @- <<END",
        body[:-1] + concepts + "}",
        "END",
    ]
    return "\n".join(lines) + "\n"


def _settings(order: PictureOrder) -> dict[str, Any]:
    """Return the settings that a call must give: steps, alpha and seed, and what differs from the defaults."""
    usual = Options()
    return {
        name: value
        for name in _SETTINGS
        if (value := getattr(order, name)) != getattr(usual, name) or name in ("steps", "alpha", "seed")
    }


def _parts(order: PictureOrder, number: int) -> list[tuple[str, Any]]:
    use = order.concepts[number]
    assert use.references is not None
    prompt = use.references[0].prompt
    return [*([("prompt", prompt)] if prompt else []), ("word", use.word), ("steps", order.steps)]


def _file(part: str, name: str) -> str:
    """Return the option that sends a file. What else than plain letters may mean something to curl, such as `;` and
    `,`, is in quotes to it, and the whole in quotes to the shell.
    """
    if _PLAIN.fullmatch(name) is None:
        escaped = name.replace("\\", "\\\\").replace('"', '\\"')
        name = f'"{escaped}"'
    return f"-F {shlex.quote(f'{part}=@{name}')}"


def _in_here_document(text: str) -> str:
    """Escape text so that the shell, which fills in the ids, leaves it unchanged."""
    return text.replace("\\", "\\\\").replace("$", "\\$").replace("`", "\\`")
