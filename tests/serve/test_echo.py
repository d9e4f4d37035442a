"""Prompts in the answer (echo) and their log-probabilities; n choices of one prompt; the time of a call."""

import pytest
from fake_server import ANSWER, error_of

PROMPT = "hello there"


def complete(server, **body):
    response = server.post("completions", **({"prompt": PROMPT, "max_tokens": 3} | body))
    assert response.status_code == 200, response.text
    return response.json()


def answer(server, count=3):
    return server.codec.decode(server.codec.encode(ANSWER)[:count])


def test_echo_begins_with_the_prompt_as_it_was_sent(server):
    ids = server.codec.encode(PROMPT)
    for prompt in (PROMPT, ids, [ids, ids]):
        found = complete(server, prompt=prompt, echo=True, n=2)["choices"]
        assert [choice["text"] for choice in found] == [PROMPT + answer(server)] * len(found)
        assert all(choice["logprobs"] is None for choice in found)
    assert all(request.params.prompt_logprobs is None for request in server.engine.requests)


@pytest.mark.parametrize("n", [1, 2])
def test_echo_with_logprobs_has_those_of_the_prompt(server, n):
    ids = server.codec.encode(PROMPT)
    body = complete(server, echo=True, logprobs=1, n=n)
    for choice in body["choices"]:
        found = choice["logprobs"]
        assert found["token_logprobs"] == [None, *(-float(i) for i in range(1, len(ids))), *[-0.5] * 3]
        assert "".join(found["tokens"]) == choice["text"] == PROMPT + answer(server)
        assert found["top_logprobs"][0] is None and found["top_logprobs"][1] != found["top_logprobs"][-1]
        assert found["text_offset"] == [len("".join(found["tokens"][:i])) for i in range(len(ids) + 3)]
    assert [r.params.prompt_logprobs for r in server.engine.requests] == [1] + [None] * (n - 1)
    assert body["usage"]["prompt_tokens"] == len(ids)


def test_a_stream_echoes_once_a_choice(server):
    chunks = list(
        server.openai.completions.create(
            model="fake", prompt=PROMPT, echo=True, logprobs=0, n=2, max_tokens=3, stream=True
        )
    )
    for index in range(2):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(choice.text for choice in mine) == PROMPT + answer(server)
        scores = [value for c in mine if c.logprobs for value in c.logprobs.token_logprobs]
        assert scores[0] is None and len(scores) == len(server.codec.encode(PROMPT)) + 3


@pytest.mark.parametrize("stream", [False, True])
def test_max_tokens_0_with_echo_gives_the_prompt_alone(server, stream):
    body = {"prompt": PROMPT, "echo": True, "logprobs": 0, "max_tokens": 0}
    if stream:
        [choice] = [c.choices[0] for c in server.openai.completions.create(model="fake", stream=True, **body)]
        text, scores, reason = choice.text, choice.logprobs.token_logprobs, choice.finish_reason
    else:
        found = complete(server, **body)
        assert found["usage"]["completion_tokens"] == 0
        [choice] = found["choices"]
        text, scores, reason = choice["text"], choice["logprobs"]["token_logprobs"], choice["finish_reason"]
    assert text == PROMPT and len(scores) == len(server.codec.encode(PROMPT)) and reason == "length"
    assert server.engine.requests[0].params.max_tokens == 1


def test_what_does_not_go_with_echo_is_refused(server):
    for body, param in [
        ({"max_tokens": 0}, "max_tokens"),
        ({"echo": True, "logprobs": 1, "prompt_cache_key": "k"}, "prompt_cache_key"),
        ({"echo": True, "logprobs": 101}, "logprobs"),
        ({"echo": 1}, "echo"),
    ]:
        status, error = error_of(server.post("completions", **({"prompt": PROMPT} | body)))
        assert (status, error.param) == (400, param)
    assert server.engine.requests == []


def test_choices_of_a_long_prompt_wait_for_the_first_ones_first_token(server):
    """So that they find the prompt in the cache."""
    complete(server, prompt=[[5] * 12, [6]], n=3)
    order = [request.id.rsplit("-", 1)[1] for request in server.engine.requests]
    assert order[:2] == ["0", "3"] and sorted(order) == list("012345")
    server.engine.requests.clear()
    complete(server, prompt=[6], n=3)
    assert [request.id.rsplit("-", 1)[1] for request in server.engine.requests] == ["0", "1", "2"]
