"""/tokenize and /detokenize over a small tokenizer."""

import pytest
from fake_server import HELLO, error_of


def post(server, route, **body):
    response = server.http.post(f"/{route}", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_text_and_back(server):
    ids = server.codec.encode("hello wörld")
    told = {"count": len(ids), "max_model_len": 64, "tokens": ids, "token_strs": None}
    assert post(server, "tokenize", prompt="hello wörld") == told
    assert post(server, "tokenize", prompt="hello wörld", model="fake", add_special_tokens=False) == told
    assert post(server, "detokenize", tokens=ids, model="fake") == {"prompt": "hello wörld"}
    assert post(server, "tokenize", prompt="")["count"] == 0
    assert post(server, "detokenize", tokens=[]) == {"prompt": ""}
    assert server.engine.requests == []


def test_token_strings_are_the_vocabularys(server):
    told = post(server, "tokenize", prompt="hello world", return_token_strs=True)
    assert "".join(told["token_strs"]) == "helloĠworld" and len(told["token_strs"]) == told["count"]


def test_a_chat_is_what_chat_completions_sends(server):
    fields = {"chat_template_kwargs": {"mood": "glad"}}
    told = post(server, "tokenize", messages=HELLO, **fields)
    server.chat(extra_body=fields)
    assert told["tokens"] == server.engine.requests[0].prompt_token_ids
    text = post(server, "detokenize", tokens=told["tokens"])["prompt"]
    assert text == "<s>user:hello</s>gladassistant:"
    closed = post(server, "tokenize", messages=HELLO, add_generation_prompt=False, add_special_tokens=False)
    assert post(server, "detokenize", tokens=closed["tokens"])["prompt"] == "<s>user:hello</s>"
    going_on = [*HELLO, {"role": "assistant", "content": "wor"}]
    open_turn = post(server, "tokenize", messages=going_on, continue_final_message=True)
    assert post(server, "detokenize", tokens=open_turn["tokens"])["prompt"].endswith("assistant:wor")


def test_a_text_longer_than_the_context_is_counted(server):
    told = post(server, "tokenize", prompt="hello " * 5000, return_token_strs=True)
    assert told["count"] > 5000 and len(told["token_strs"]) == told["count"] > told["max_model_len"]
    assert post(server, "detokenize", tokens=told["tokens"])["prompt"] == "hello " * 5000


@pytest.mark.parametrize(
    "route, body, param, words",
    [
        ("tokenize", {}, "prompt", "required"),
        ("tokenize", {"prompt": "x", "messages": HELLO}, "prompt", "not supported"),
        ("tokenize", {"prompt": ["x"]}, "prompt", "string"),
        ("tokenize", {"prompt": "x", "n": 2}, "n", "not supported"),
        ("tokenize", {"messages": []}, "messages", "at least 1"),
        ("tokenize", {"messages": HELLO, "add_special_tokens": True}, "add_special_tokens", "False"),
        (
            "tokenize",
            {"messages": HELLO, "add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
            "excludes",
        ),
        ("detokenize", {}, "tokens", "required"),
        ("detokenize", {"tokens": ["5"]}, "tokens", "integer"),
        ("detokenize", {"tokens": [5, 399]}, "tokens", "id 399"),
        ("detokenize", {"tokens": [-1]}, "tokens", "id -1"),
        ("detokenize", {"tokens": [2**32]}, "tokens", "id 4294967296"),
    ],
)
def test_refusals_name_the_field(server, route, body, param, words):
    status, error = error_of(server.http.post(f"/{route}", json=body))
    assert (status, error.param) == (400, param) and words in error.message


def test_another_model_is_a_404(server):
    for route, body in (("tokenize", {"prompt": "x"}), ("detokenize", {"tokens": [5]})):
        assert error_of(server.http.post(f"/{route}", json=body | {"model": "other"}))[0] == 404


def test_a_body_that_is_no_object_is_a_400(server):
    for route in ("tokenize", "detokenize"):
        status, error = error_of(server.http.post(f"/{route}", json=[1]))
        assert status == 400 and "JSON object" in error.message


def test_the_openapi_document_has_both_forms(server):
    document = server.http.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    assert schemas["TokenizeText"]["required"] == ["prompt"]
    assert schemas["TokenizeChat"]["required"] == ["messages"]
    reply = document["paths"]["/tokenize"]["post"]["responses"]["200"]["content"]["application/json"][
        "schema"
    ]
    assert reply["$ref"].endswith("/TokenizeReply")
