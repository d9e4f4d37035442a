"""Adapters over HTTP: each is a model of its own name, on every route."""

from __future__ import annotations

import pytest
from fake_server import HELLO, error_of


@pytest.fixture
def several(server):
    """The server with two adapters."""
    server.front.adapters = ("fr", "de/formal")
    yield server
    server.front.adapters = ()


BODIES = {
    "chat/completions": {"messages": HELLO},
    "completions": {"prompt": "a b"},
    "responses": {"input": "a b"},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", BODIES)
@pytest.mark.parametrize("model", ["fake", "fr", "de/formal"])
def test_the_model_of_a_request_chooses_the_adapter(several, route, model, stream):
    reply = several.post(route, **BODIES[route], model=model, stream=stream)
    assert reply.status_code == 200, reply.text
    assert f'"model":"{model}"' in reply.text
    [request] = several.engine.requests
    assert request.adapter == ("" if model == "fake" else model)


def test_all_choices_of_all_prompts_take_it(several):
    reply = several.post("completions", prompt=["a", "b"], n=2, model="fr")
    assert len(reply.json()["choices"]) == 4
    assert [request.adapter for request in several.engine.requests] == ["fr"] * 4


@pytest.mark.parametrize("route", BODIES)
def test_an_unknown_name_is_told_which_there_are(several, route):
    status, error = error_of(several.post(route, **BODIES[route], model="it"))
    assert (status, error.param, error.code) == (404, "model", "model_not_found")
    assert error.message == "model: 'it' is not served here; 'fake', 'fr', 'de/formal' are"
    assert not several.engine.requests


def test_models_are_listed_with_their_parent(several):
    listed = several.openai.models.list().data
    assert [(card.id, card.parent) for card in listed] == [
        ("fake", None), ("fr", "fake"), ("de/formal", "fake"),
    ]  # fmt: skip
    assert several.openai.models.retrieve("de/formal") == listed[2]
    assert error_of(several.http.get("/v1/models/it"))[0] == 404


def test_tokenize_knows_the_names(several):
    counts = [
        several.http.post("/tokenize", json={"model": name, "prompt": "a b"}).json()["count"]
        for name in ("fake", "fr")
    ]
    assert counts[0] == counts[1]
    assert error_of(several.http.post("/tokenize", json={"model": "it", "prompt": "a"}))[0] == 404
