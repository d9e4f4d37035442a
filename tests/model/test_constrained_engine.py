"""The engine under grammars, on the demo model: output conforms, and pressure changes no token."""

from __future__ import annotations

import json
import queue

import jsonschema
import pytest
from random_schemas import random_schemas

from ds_serve import demo
from ds_serve.config import Settings
from ds_serve.messages import Request, SamplingParams
from ds_serve.rank import build_local_engine
from ds_serve.text.codec import TextCodec
from ds_serve.text.grammar import Grammars

END = 1
QUESTIONS = ["Hello, who are you?", "What is the capital of France?", "What is 3 plus 4?"]


@pytest.fixture(scope="module")
def codec():
    return TextCodec(demo.model_path())


@pytest.fixture(scope="module")
def grammars(codec):
    return Grammars(codec.tokenizer)


@pytest.fixture(scope="module")
def roomy():
    engine = start()
    yield engine
    stop(engine)


def start(**settings):
    fixed = {"model": demo.model_path(), "dtype": "float32", "num_blocks": 1500, "max_num_seqs": 100}
    return build_local_engine(Settings(**fixed | settings))


def stop(engine):
    stats = engine.stats()
    engine.close()
    engine.scheduler.check_integrity()
    assert stats.num_free_blocks == stats.num_blocks


def submit(engine, codec, index, grammar, temperature=0.0, max_tokens=500):
    """A queue of the outputs of one request; its question and its seed are the index's."""
    prompt = codec.encode_chat([{"role": "user", "content": QUESTIONS[index % len(QUESTIONS)]}])
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, seed=index, eos_token_ids=(END,), grammar=grammar
    )
    outputs = queue.SimpleQueue()
    engine.submit(Request(id=str(index), prompt_token_ids=prompt, params=params), outputs.put)
    return outputs


def end(outputs):
    """(tokens without the end token, the last output) of one request."""
    tokens = []
    while True:
        output = outputs.get(timeout=120)
        tokens += output.token_ids
        if output.finish_reason is not None:
            return tokens[:-1] if output.stop_token_id is not None else tokens, output


def run(engine, codec, wanted, **params):
    return [end(each) for each in [submit(engine, codec, i, one, **params) for i, one in enumerate(wanted)]]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 2.0])
def test_200_random_schemas_are_all_followed_to_their_end(roomy, codec, grammars, temperature):
    schemas = random_schemas(200, seed=5)
    wanted = [grammars.json_schema(schema) for schema in schemas]
    for schema, (tokens, last) in zip(
        schemas, run(roomy, codec, wanted, temperature=temperature), strict=True
    ):
        assert last.finish_reason == "stop" and last.stop_token_id == END, (schema, last)
        text = codec.decode(tokens, skip_special_tokens=False)
        checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
        jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(text))


def test_regex_choice_and_grammar_are_followed(roomy, codec, grammars):
    wanted = [
        grammars.regex("[a-f]{3}-[0-9]{2}"),
        grammars.choice(["maybe 🙂"]),
        grammars.grammar('root ::= "<" inner ">"\ninner ::= "x" | "<" inner ">"'),
        grammars.lark('start: "a" <|end|>'),
        grammars.regex(""),
        "",
    ]
    code, maybe, nested, spelled, empty, free = (
        codec.decode(tokens, skip_special_tokens=False)
        for tokens, _ in run(roomy, codec, wanted, temperature=1.0, max_tokens=100)
    )
    assert len(code) == 6 and set(code[:3]) <= set("abcdef") and code[3] == "-" and code[4:].isdigit()
    assert maybe == "maybe 🙂" and spelled == "a" and empty == ""
    depth = nested.index("x")
    assert nested == "<" * depth + "x" + ">" * depth
    assert "." in free


def test_a_request_that_no_token_fits_ends_alone(roomy, codec, grammars):
    endless = 'start: "x" a\na: "x" a'  # no text ends, and so none is begun
    wanted = [endless, grammars.choice(["yes"]), "start: nonsense", ""]
    stuck, yes, nonsense, free = run(roomy, codec, wanted, max_tokens=30)
    for _, last in (stuck, nonsense):
        assert last.finish_reason == "error" and "no token fits the grammar" in last.error
    assert codec.decode(yes[0]) == "yes" and yes[1].finish_reason == "stop"
    assert free[1].finish_reason == "stop"


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "minLength": 20, "maxLength": 30}, "age": {"minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}
PRESSURE = {
    "chunked prefill, one step in flight": {
        "max_num_batched_tokens": 7,
        "max_num_seqs": 5,
        "steps_in_flight": 1,
    },
    "preemption": {"num_blocks": 14, "max_num_seqs": 8, "max_num_batched_tokens": 64},
}


@pytest.fixture(scope="module")
def under_grammars(grammars):
    """Grammars of twelve requests that take some forty tokens each; every fourth has none."""
    return [
        grammars.json_schema(PERSON),
        grammars.regex("([a-z]{3} ){9}"),
        "",
        grammars.regex("[0-9]{20}"),
    ] * 3


@pytest.fixture(scope="module")
def calm(roomy, codec, under_grammars):
    """Their tokens where nothing presses."""
    return [tokens for tokens, _ in run(roomy, codec, under_grammars, max_tokens=48)]


@pytest.mark.parametrize("settings", PRESSURE.values(), ids=PRESSURE)
def test_pressure_changes_no_token(codec, under_grammars, calm, settings):
    engine = start(block_size=8, **settings)
    for _ in range(2):  # the second time prompts are prefix hits
        assert [tokens for tokens, _ in run(engine, codec, under_grammars, max_tokens=48)] == calm
    stats = engine.stats()
    stop(engine)
    assert ("num_blocks" in settings) == (stats.num_preemptions > 0) and stats.cached_tokens > 0


def test_an_aborted_requests_slot_serves_another_grammar(codec, grammars):
    engine = start(max_num_seqs=1)
    first = submit(engine, codec, 0, grammars.regex("a{400}"))
    second = submit(engine, codec, 1, grammars.choice(["bird"]))
    assert first.get(timeout=60).finish_reason is None
    engine.abort("0")
    assert end(first)[1].finish_reason == "abort"
    assert codec.decode(end(second)[0]) == "bird"
    stop(engine)
