"""What output must look like, over HTTP: the fields that ask for it, what an engine gets, what is refused."""

import json

import pytest
from fake_server import HELLO, error_of

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
IN_OPENAIS_WORDS = {"name": "thing", "schema": SCHEMA, "strict": True, "description": "a thing"}


def grammar_of(server, **body):
    """The grammar that the engine got with a chat of this body."""
    server.engine.requests.clear()
    response = server.post("chat/completions", messages=HELLO, **body)
    assert response.status_code == 200, response.text
    return server.engine.requests[0].params.grammar


def test_all_ways_to_ask_for_a_schema_are_one(server):
    wanted = grammar_of(server, guided_json=SCHEMA)
    assert json.dumps(SCHEMA["properties"])[1:-1].replace(" ", "") in wanted.replace(" ", "")
    json_schema = {"type": "json_schema", "json_schema": IN_OPENAIS_WORDS}
    assert grammar_of(server, response_format=json_schema) == wanted
    assert grammar_of(server, guided_json=json.dumps(SCHEMA)) == wanted
    assert grammar_of(server, structured_outputs={"json": SCHEMA}) == wanted
    assert grammar_of(server, response_format={"type": "text"}, guided_json=SCHEMA) == wanted


@pytest.mark.parametrize(
    "kind, value",
    [("regex", "[0-9]+"), ("choice", ["a", "b"]), ("grammar", 'start: "a"'), ("grammar", 'root ::= "a"')],
)
def test_guided_fields_and_structured_outputs_are_one(server, kind, value):
    wanted = grammar_of(server, **{f"guided_{kind}": value})
    assert wanted and grammar_of(server, structured_outputs={kind: value}) == wanted


def test_without_any_of_them_output_is_free(server):
    assert grammar_of(server) == grammar_of(server, response_format={"type": "text"}) == ""
    assert grammar_of(server, guided_json=None, guided_choice=None) == ""


def test_json_object_is_any_object(server):
    wanted = grammar_of(server, guided_json={"type": "object"})
    assert grammar_of(server, response_format={"type": "json_object"}) == wanted


def test_every_prompt_and_choice_of_a_completion_follows_it(server):
    answer = server.post("completions", prompt=["hello", "world"], n=2, guided_choice=["x"])
    assert answer.status_code == 200
    grammars = {request.params.grammar for request in server.engine.requests}
    assert len(server.engine.requests) == 4 and len(grammars) == 1 and "" not in grammars


REFUSED = [
    ({"guided_json": SCHEMA, "guided_regex": "a"}, "guided_regex", "guided_json"),
    (
        {"guided_choice": ["a"], "response_format": {"type": "json_object"}},
        "guided_choice",
        "response_format",
    ),
    ({"guided_regex": "(a"}, "guided_regex", "unclosed"),
    ({"guided_choice": []}, "guided_choice", "at least 1"),
    ({"guided_choice": "a"}, "guided_choice", "list"),
    ({"guided_grammar": "start: UNKNOWN"}, "guided_grammar", "UNKNOWN"),
    ({"guided_grammar": "root ::= missing"}, "guided_grammar", "missing"),
    ({"guided_json": {"not": {}}}, "guided_json", "'not'"),
    ({"guided_json": "{"}, "guided_json", "JSON text"),
    ({"guided_json": False}, "guided_json", "false"),
    ({"guided_json": 7}, "guided_json", "dict"),
    ({"guided_json": {"properties": {"\ud800": {"not": {}}}}}, "guided_json", "'not'"),
    ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
    ({"response_format": {"type": "text", "json_schema": IN_OPENAIS_WORDS}}, "response_format", "only there"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema.schema",
        "required",
    ),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "tree"}},
            }
        },
        "response_format",
        "tree",
    ),
    ({"structured_outputs": {}}, "structured_outputs", "one of"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "one of"),
    ({"structured_outputs": {"regex": "(a"}}, "structured_outputs", "unclosed"),
    ({"structured_outputs": {"color": 1}}, "structured_outputs.color", "not supported"),
    ({"guided_regex": "a", "min_tokens": 2}, "min_tokens", "grammar"),
    ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "grammar"),
]


@pytest.mark.parametrize("body, param, words", REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_followed_is_a_400_that_names_the_field(server, body, param, words):
    for stream in (False, True):
        response = server.http.post(
            "/v1/chat/completions",
            content=json.dumps({"model": "fake", "messages": HELLO, "stream": stream} | body),
            headers={"Content-Type": "application/json"},
        )
        status, error = error_of(response)
        assert (status, error.type, error.param) == (400, "invalid_request_error", param)
        assert words in error.message and error.message.startswith(param)
    assert server.engine.requests == []


def test_a_grammar_that_the_engine_could_not_follow_is_the_requests_own_fault(server):
    server.refusal = lambda request: "no token fits the grammar that its output must follow"
    status, error = error_of(server.post("completions", prompt="hello", guided_choice=["x"]))
    assert (status, error.code) == (400, "grammar_failed")


def test_a_real_server_follows_schemas_and_choices(real):
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "size": {"enum": ["small", "large"]}},
        "required": ["city", "size"],
        "additionalProperties": False,
    }
    response_format = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    whole = real.chat(response_format=response_format, max_tokens=60, temperature=1.5, seed=7)
    assert whole.choices[0].finish_reason == "stop"
    value = json.loads(whole.choices[0].message.content)
    assert set(value) == {"city", "size"} and value["size"] in ("small", "large") and len(value["city"]) <= 12
    stream = real.chat(response_format=response_format, max_tokens=60, temperature=1.5, seed=7, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == whole.choices[0].message.content
    choice = real.chat(extra_body={"guided_choice": ["left", "right"]}, n=3, temperature=2.0)
    assert {each.message.content for each in choice.choices} <= {"left", "right"}
