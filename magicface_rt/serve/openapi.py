"""The server's OpenAPI document: every answer with its schema, problems as problem details."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from . import problems
from .schemas import (
    FORM_SCHEMA,
    BundleInfo,
    ConceptInfo,
    ConceptList,
    ConceptPut,
    Erasure,
    PictureOrder,
    Pictures,
    ProblemBody,
    Status,
)

__all__ = ["FORM_BODY", "ORDER_BODY", "describe", "documented"]

_REF = "#/components/schemas/{model}"
_ANSWERS = (BundleInfo, ConceptInfo, ConceptPut, ConceptList, Erasure, Pictures, ProblemBody, Status)
ORDER_BODY = {
    "required": True,
    "content": {"application/json": {"schema": {"$ref": _REF.format(model=PictureOrder.__name__)}}},
}
"""The request body of the route that parses its JSON itself."""

FORM_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": FORM_SCHEMA,
            "examples": {
                "a man": {
                    "summary": "One photograph and its mask; the files go in the parts `image` and `mask`",
                    "value": {"image": ["man.jpg"], "mask": ["man-mask.png"], "prompt": ["a man"], "word": "man"},
                }
            },
        }
    },
}
"""The request body of the route that parses its form itself."""

_FRAMEWORKS = ("HTTPValidationError", "ValidationError")
"""Schemas of FastAPI's own refusals, which no route here answers with."""

_EVERYWHERE = (401, 403, 408, 413, 503)
"""Statuses that any route may answer with: no token, another machine's name, a body that is late or too large, or too
many bodies at once.
"""


def documented(
    answers: Mapping[int, tuple[type[BaseModel], str]],
    *refusals: int,
    more: Mapping[int, Mapping[str, Any]] | None = None,
) -> dict[int | str, dict[str, Any]]:
    """Build the `responses` of a route. more: other media types of an answer, with their schemas."""
    found: dict[int | str, dict[str, Any]] = {}
    for status, (model, text) in answers.items():
        content: dict[str, Any] = {"application/json": {"schema": _ref(model)}}
        for media_type, schema in ((more or {}).get(status) or {}).items():
            content[media_type] = {"schema": schema}
        found[status] = {"description": text, "content": content}
    for status in sorted({*refusals, *_EVERYWHERE}):
        found[status] = {
            "description": problems.title(status),
            "content": {problems.MEDIA_TYPE: {"schema": _ref(ProblemBody)}},
        }
        if status in (429, 503):
            found[status]["headers"] = {
                "Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}
            }
    return found


def describe(app: FastAPI, *, protected: bool) -> None:
    """Give the application its OpenAPI document. protected: whether it requires tokens."""

    def openapi() -> dict[str, Any]:
        if not app.openapi_schema:
            document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            _, schemas = models_json_schema(
                [(PictureOrder, "validation"), *((model, "serialization") for model in _ANSWERS)], ref_template=_REF
            )
            components = document.setdefault("components", {})
            found = {**components.get("schemas", {}), **schemas["$defs"]}
            components["schemas"] = {name: schema for name, schema in found.items() if name not in _FRAMEWORKS}
            for operation in (one for path in document["paths"].values() for one in path.values()):
                if "HTTPValidationError" in str(operation["responses"].get("422")):
                    del operation["responses"]["422"]
            if protected:
                components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
                document["security"] = [{"token": []}]
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's documentation does it


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}
