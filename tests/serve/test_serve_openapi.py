"""The OpenAPI document: what it says is so, and nothing that it allows makes the service fail."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from loopback import Gated, Running, concept, running

from magicface_rt.serve import ServeSettings
from magicface_rt.serve.auth import Tokens
from magicface_rt.serve.schemas import ConceptInfo, ConceptPut, PictureOrder, Pictures, ProblemBody


@pytest.fixture(scope="module")
def server(session: Gated) -> Iterator[Running]:
    settings = ServeSettings(default_steps=1, steps=2, batch_wait=0, body_seconds=5)
    with running(session, settings=settings) as started:
        yield started


@pytest.fixture
def document(server: Running) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{server.url}/openapi.json", trust_env=False).json()
    return found


def test_every_reference_and_every_path_is_there(document: dict[str, Any]) -> None:
    assert {(path, method) for path, methods in document["paths"].items() for method in methods} == {
        ("/v1/concepts", "put"),
        ("/v1/concepts", "get"),
        ("/v1/concepts/{id}", "get"),
        ("/v1/concepts/{id}", "delete"),
        ("/v1/images", "post"),
        ("/v1/bundle", "get"),
        ("/healthz", "get"),
        ("/readyz", "get"),
        ("/metrics", "get"),
    }
    schemas = document["components"]["schemas"]
    assert {"PictureOrder", "ConceptUse", "ConceptInfo", "Pictures", "ProblemBody"} <= schemas.keys()
    assert "HTTPValidationError" not in schemas

    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            if isinstance(value.get("$ref"), str):
                yield value["$ref"]
            for entry in value.values():
                yield from references(entry)
        elif isinstance(value, list):
            for entry in value:
                yield from references(entry)

    for reference in references(document):
        assert reference.removeprefix("#/components/schemas/") in schemas


def test_answers_are_of_the_form_that_is_documented(server: Running) -> None:
    with server.client() as client, httpx.Client(base_url=server.url, trust_env=False, verify=False) as http:
        kept = client.put_concept(concept("man", 1))
        assert set(kept.info) == set(ConceptPut.model_fields)
        assert set(client.concept(kept.id).info) == set(ConceptInfo.model_fields)
        made = http.post("/v1/images", json={"prompt": "a man", "concepts": [{"id": kept.id}]})
        Pictures.model_validate(made.json())
        ProblemBody.model_validate(http.post("/v1/images", json={"prompt": 3}).json())
        client.erase(kept)
    for example in PictureOrder.model_json_schema()["examples"]:
        PictureOrder.model_validate(example)


def test_tokens_are_in_the_document_where_there_are_any(session: Gated) -> None:
    with running(session, tokens=Tokens(["t" * 20])) as server:
        headers = {"Authorization": "Bearer " + "t" * 20}
        document = httpx.get(f"{server.url}/openapi.json", headers=headers, trust_env=False).json()
    assert document["security"] == [{"token": []}]
    assert document["components"]["securitySchemes"]["token"]["scheme"] == "bearer"


@pytest.mark.parametrize("examples", [20, pytest.param(300, marks=pytest.mark.slow)])
def test_nothing_that_the_document_allows_makes_the_service_fail(server: Running, examples: int) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    import hypothesis

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    wanted = ("status_code_conformance", "content_type_conformance", "response_schema_conformance")
    checks = [check for check in schemathesis.checks.CHECKS.get_all() if check.__name__ in wanted]
    assert len(checks) == len(wanted)

    def no_failure(context: Any, response: Any, case: Any) -> None:
        assert response.status_code not in (500, 503), response.text

    tried = []
    for result in schema.get_all_operations():
        operation = result.ok()

        @hypothesis.settings(
            max_examples=examples, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
        )
        @hypothesis.given(case=operation.as_strategy())
        def fuzz(case: Any) -> None:
            case.call_and_validate(checks=[no_failure, *checks], timeout=30)

        fuzz()
        tried.append(operation.label)
    assert len(tried) == 9
    with server.client() as client:
        client.generate("a man", steps=1)
