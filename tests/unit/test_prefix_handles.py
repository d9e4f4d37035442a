"""Handles of prefixes over a scripted engine: what prefill asks for, what release sends, what is refused."""

from __future__ import annotations

import asyncio

import pytest
from scripted_engine import CHAT, ScriptedEngine, ids_of, make_pipe

from ds_serve.generation.pipeline import GenerationError

PROMPT = "p" * 40  # two full blocks of 16 tokens, and 8 tokens


@pytest.fixture
def engine():
    return ScriptedEngine()


def test_prefill_computes_one_greedy_token_and_pins(engine):
    handle = make_pipe(engine, cache_salt="b", priority=2).prefill(PROMPT, ttl=60, salt="a")
    [request] = engine.requests
    assert request.prompt_token_ids == ids_of(PROMPT)
    assert request.params.greedy and request.params.max_tokens == 1
    assert (request.pin, request.cache_ttl, request.salt, request.priority) == ("must", 60, "a", 2)
    assert request.cache_key
    assert (handle.num_tokens, handle.num_cached_tokens, handle.ttl) == (32, 7, 60)


def test_each_prefill_has_a_key_of_its_own_and_the_pipelines_salt(engine):
    pipe = make_pipe(engine, cache_salt="b")
    pipe.prefill(PROMPT)
    pipe.prefill(PROMPT)
    first, second = engine.requests
    assert first.cache_key != second.cache_key
    assert (first.salt, first.cache_ttl) == ("b", 300)


def test_a_handle_is_released_once(engine):
    pipe = make_pipe(engine)
    handle = pipe.prefill(PROMPT, salt="a")
    assert engine.unpinned == [] and "ttl=300" in repr(handle)
    handle.release()
    handle.release()
    key = engine.requests[0].cache_key
    assert engine.unpinned == [(key, "a")] and "not pinned" in repr(handle)
    with pytest.raises(ZeroDivisionError), pipe.prefill(PROMPT):
        raise ZeroDivisionError
    assert engine.unpinned == [(key, "a"), (engine.requests[1].cache_key, "")]
    assert engine.aborted == []


def test_without_a_pin_there_is_no_key_and_nothing_to_release(engine):
    with make_pipe(engine).prefill(PROMPT, pin=False) as handle:
        assert (handle.num_tokens, handle.ttl) == (32, 0.0)
    assert engine.requests[0].cache_key == "" and engine.unpinned == []


def test_a_chat_is_rendered_as_it_begins_longer_ones(engine):
    pipe = make_pipe(engine)
    answer = {"role": "assistant", "content": "oh"}
    pipe.prefill(CHAT)
    pipe.prefill([*CHAT, answer])
    pipe.prefill([*CHAT, answer], continue_final_message=True)
    pipe.prefill("b", prefix="a")
    prompts = [request.prompt_token_ids for request in engine.requests]
    assert prompts == [ids_of("u:hi"), ids_of("u:hi;a:oh"), ids_of("u:hi;a:oh"), ids_of("ab")]
    pipe([*CHAT, answer, *CHAT], do_sample=False)
    assert engine.requests[4].prompt_token_ids == ids_of("u:hi;a:oh;u:hi;a:")


def test_prefill_on_an_event_loop():
    engine = ScriptedEngine()

    async def prefills(pipe):
        return await asyncio.gather(pipe.aprefill(PROMPT, salt="a"), pipe.aprefill(CHAT, ttl=5))

    first, second = asyncio.run(prefills(make_pipe(engine)))
    assert (first.num_tokens, second.num_tokens, second.ttl) == (32, 0, 5)
    first.release()
    assert [salt for _, salt in engine.unpinned] == ["a"]


def test_a_cancelled_prefill_leaves_nothing_pinned():
    engine = ScriptedEngine(hold=True)

    async def cancelled():
        task = asyncio.create_task(make_pipe(engine).aprefill(PROMPT, salt="a"))
        while not engine.requests:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    [request] = engine.requests
    assert engine.aborted == [request.id] and engine.unpinned == [(request.cache_key, "a")]
    engine.released.set()  # the answer to a closed event loop must not raise on the engine's thread


def test_the_engines_refusal_is_in_its_words():
    engine = ScriptedEngine(lambda request: RuntimeError("12 blocks to pin, but 3 of 8 are left"))
    with pytest.raises(GenerationError, match="12 blocks to pin, but 3 of 8"):
        make_pipe(engine).prefill(PROMPT)


@pytest.mark.parametrize(
    ("prompt", "arguments", "error", "words"),
    [
        ("p" * 100, {}, ValueError, "prompt: 100 tokens leave no room in the model's 100"),
        (PROMPT, {"ttl": 0}, ValueError, "ttl: .* got 0"),
        (PROMPT, {"ttl": float("nan")}, ValueError, "ttl: .* got nan"),
        (PROMPT, {"ttl": float("inf")}, ValueError, "ttl: .* got inf"),
        (PROMPT, {"ttl": "5m"}, ValueError, "ttl: .* got '5m'"),
        (PROMPT, {"ttl": True}, ValueError, "ttl: .* got True"),
        (PROMPT, {"max_new_tokens": 5}, TypeError, "prefill: max_new_tokens"),
        (PROMPT, {"cache_salt": "a"}, TypeError, "prefill: cache_salt .*salt"),
        (PROMPT, {"padding": "max_length"}, ValueError, "padding"),
        ([PROMPT], {}, ValueError, "one prompt or one chat"),
        ([], {}, ValueError, "one prompt or one chat"),
        (7, {}, TypeError, "text_inputs"),
        ([*CHAT, {"role": "user"}], {}, ValueError, "content"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_what_cannot_be_kept_is_refused_by_name(engine, prompt, arguments, error, words):
    with pytest.raises(error, match=words):
        make_pipe(engine).prefill(prompt, **arguments)
    assert engine.requests == []
