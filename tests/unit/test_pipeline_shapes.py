"""The pipeline over a scripted engine: shapes, streams, stops, errors and aborts, without a model."""

from __future__ import annotations

import asyncio
import threading

import pytest
from scripted_engine import ANSWER, CHAT, EOS, ScriptedEngine, ids_of, make_pipe

import ds_serve
from ds_serve.generation.pipeline import GenerationError

# -- shapes -------------------------------------------------------------------------------------


def test_one_input_gives_records_and_several_give_lists_of_them():
    pipe = make_pipe()
    record = {"generated_text": "say " + ANSWER}
    assert pipe("say ") == [record]
    assert pipe(["say ", "say "]) == [[record], [record]]
    assert pipe([]) == []
    assert pipe("say ", return_full_text=False) == [{"generated_text": ANSWER}]
    assert pipe("say ", num_return_sequences=2) == [record, record]
    answer = {"role": "assistant", "content": ANSWER}
    assert pipe(CHAT) == [{"generated_text": [*CHAT, answer]}]
    assert pipe([CHAT, CHAT]) == [[{"generated_text": [*CHAT, answer]}]] * 2
    assert pipe("ab", return_tensors=True) == [{"generated_token_ids": [*ids_of("ab" + ANSWER), EOS]}]


def test_an_open_assistant_message_is_continued():
    engine = ScriptedEngine()
    chat = [*CHAT, {"role": "assistant", "content": "oh "}]
    [record] = make_pipe(engine)(chat)
    assert record["generated_text"] == [*CHAT, {"role": "assistant", "content": "oh " + ANSWER}]
    assert engine.requests[0].prompt_token_ids == ids_of("u:hi;a:oh ")
    [record] = make_pipe(engine)(chat, continue_final_message=False)
    assert record["generated_text"] == [*chat, {"role": "assistant", "content": ANSWER}]
    assert engine.requests[1].prompt_token_ids == ids_of("u:hi;a:oh ;a:")


def test_sequences_of_one_prompt_are_padded_to_the_longest():
    engine = ScriptedEngine(lambda request: "abc" if request.params.seed == 5 else "a")
    records = make_pipe(engine)("p", num_return_sequences=2, seed=5, return_tensors=True)
    short, long = records[1]["generated_token_ids"], records[0]["generated_token_ids"]
    assert long == [*ids_of("pabc"), EOS]
    assert short == [*ids_of("pa"), EOS, 1, 1]


def test_results_keep_the_order_of_inputs_and_batch_size_bounds_what_is_open():
    engine = ScriptedEngine(lambda request: "x" * (30 - len(request.prompt_token_ids)), hold=True)
    prompts = ["p" * size for size in range(1, 7)]
    results: list = []
    caller = threading.Thread(target=lambda: results.extend(make_pipe(engine)(prompts, batch_size=2)))
    caller.start()
    while len(engine.requests) < 2:
        pass
    assert len(engine.requests) == 2
    engine.released.set()
    caller.join(10)
    assert [record["generated_text"] for [record] in results] == [p + "x" * (30 - len(p)) for p in prompts]


def test_an_empty_prompt_starts_from_bos():
    engine = ScriptedEngine()
    assert make_pipe(engine)("", skip_special_tokens=False) == [{"generated_text": "<s>" + ANSWER + "</s>"}]
    assert engine.requests[0].prompt_token_ids == [0]
    with pytest.raises(ValueError, match="bos_token_id"):
        make_pipe(generation={"eos_token_id": EOS})("")


def test_logprobs_stand_in_the_record():
    [record] = make_pipe()("p", logprobs=1, max_new_tokens=1)
    token = ids_of("h")[0]
    assert record["logprobs"] == [
        {"token_id": token, "logprob": -0.5, "top_ids": [token], "top_logprobs": [-0.5]}
    ]


# -- streams and stops --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 100])
def test_streams_give_deltas_alone_or_with_their_input(size):
    pipe = make_pipe(ScriptedEngine(size=size))
    assert "".join(pipe("p", stream=True)) == ANSWER
    texts = {0: "", 1: ""}
    for index, delta in pipe(["p", "q"], stream=True):
        assert delta
        texts[index] += delta
    assert texts == {0: ANSWER, 1: ANSWER}


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_stop_cuts_the_text_and_stop_sequence_keeps_it(size):
    engine = ScriptedEngine(size=size)
    pipe = make_pipe(engine, return_full_text=False)
    assert pipe("p", stop="big") == [{"generated_text": "hello "}]
    assert pipe("p", stop_sequence="big") == [{"generated_text": "hello big"}]
    assert pipe("p", stop_strings=["wor"], stop=["zz"]) == [{"generated_text": "hello big wor"}]
    assert pipe("p", stop_strings="</s>", skip_special_tokens=False) == [{"generated_text": ANSWER + "</s>"}]
    assert pipe("p", stop="llo", min_new_tokens=6) == [{"generated_text": ANSWER}]
    assert "".join(pipe("p", stop="big", stream=True)) == "hello "
    ids = pipe("p", stop="big", return_tensors=True, return_full_text=None)[0]["generated_token_ids"]
    assert ids == ids_of("phello big")
    if size < 3:
        assert engine.aborted[:2] == [request.id for request in engine.requests[:2]]


def test_leaving_a_stream_aborts_what_is_open():
    engine = ScriptedEngine(hold=True)
    stream = make_pipe(engine)(["p", "q"], stream=True)
    threading.Timer(0.05, engine.released.set).start()
    next(stream)
    stream.close()
    assert set(engine.aborted) == {request.id for request in engine.requests}


# -- asynchronous -------------------------------------------------------------------------------


def test_asynchronous_calls():
    engine = ScriptedEngine()

    async def calls(pipe):
        several, one = await asyncio.gather(pipe.agenerate(["p", "q"]), pipe.agenerate("p"))
        deltas = [delta async for delta in pipe.astream("p")]
        pairs = [pair async for pair in pipe.astream(["p"])]
        return several, one, "".join(deltas), pairs

    several, one, text, pairs = asyncio.run(calls(make_pipe(engine)))
    assert several == [[{"generated_text": "p" + ANSWER}], [{"generated_text": "q" + ANSWER}]]
    assert one == several[0] and text == ANSWER
    assert "".join(delta for _, delta in pairs) == ANSWER and {index for index, _ in pairs} == {0}


def test_a_cancelled_call_aborts_its_requests():
    engine = ScriptedEngine(hold=True)

    async def cancelled():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(make_pipe(engine).agenerate(["p", "q"]), 0.05)

    asyncio.run(cancelled())
    assert engine.aborted == [request.id for request in engine.requests]
    engine.released.set()  # answers to a closed event loop must not raise on the engine's thread


# -- errors -------------------------------------------------------------------------------------


def test_an_engine_error_is_raised_and_the_rest_aborted():
    engine = ScriptedEngine(
        lambda request: RuntimeError("boom") if request.prompt_token_ids[0] == 3 + ord("q") else "a"
    )
    with pytest.raises(GenerationError, match="boom"):
        make_pipe(engine)(["q"] * 3)
    assert len(engine.aborted) >= 2


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"num_beams": 2}, ValueError, "num_beams"),
        ({"assistant_model": object()}, TypeError, "assistant_model"),
        ({"logits_processor": []}, TypeError, "logits_processor"),
        ({"use_cache": False}, ValueError, "use_cache"),
        ({"no_such_thing": 1}, TypeError, "no_such_thing"),
        ({"typical_p": 0.5}, ValueError, "typical_p"),
        ({"bad_words_ids": [[5]]}, ValueError, "bad_words_ids"),
        ({"handle_long_generation": "window"}, ValueError, "handle_long_generation"),
        ({"padding": "max_length"}, ValueError, "padding"),
        ({"tokenizer_encode_kwargs": {"return_tensors": "pt"}}, ValueError, "return_tensors"),
        ({"num_workers": 2}, ValueError, "num_workers"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
        ({"max_new_tokens": 2.5}, ValueError, "max_new_tokens"),
        ({"max_new_tokens": 100}, ValueError, "max_new_tokens"),
        ({"max_length": 1}, ValueError, "max_length"),
        ({"min_new_tokens": 9, "max_new_tokens": 3}, ValueError, "min_new_tokens"),
        ({"num_return_sequences": 2, "do_sample": False}, ValueError, "num_return_sequences"),
        ({"num_return_sequences": 2, "stream": True}, ValueError, "num_return_sequences"),
        ({"temperature": float("nan")}, ValueError, "temperature"),
        ({"temperature": "hot"}, ValueError, "temperature"),
        ({"top_p": 1.5}, ValueError, "top_p"),
        ({"logprobs": 101}, ValueError, "logprobs"),
        ({"logprobs": 1, "stream": True}, ValueError, "logprobs"),
        ({"logit_bias": {131: 1.0}}, ValueError, "logit_bias"),
        ({"stop": [""]}, ValueError, "stop"),
        ({"stop_strings": [7]}, ValueError, "stop_strings"),
        ({"eos_token_id": [-1]}, ValueError, "eos_token_id"),
        ({"seed": 2**63}, ValueError, "seed"),
        ({"return_text": True, "return_full_text": True}, ValueError, "return_text"),
        ({"return_tensors": True, "return_full_text": True}, ValueError, "return_tensors"),
        ({"return_type": 9}, ValueError, "return_type"),
        ({"generation_config": {"num_beams": 4}}, ValueError, "num_beams"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_offered_is_refused_by_name(arguments, error, name):
    engine = ScriptedEngine()
    with pytest.raises(error, match=name):
        make_pipe(engine)("prompt", **arguments)
    assert engine.requests == []


@pytest.mark.parametrize("inputs", [5, {"role": "user", "content": "x"}, [5], [["a"]], [[]], ["a", None]])
def test_inputs_that_are_no_prompts_are_refused(inputs):
    with pytest.raises(TypeError, match="text_inputs"):
        make_pipe()(inputs)


def test_a_message_without_content_and_a_prompt_too_long_are_refused():
    with pytest.raises(ValueError, match="content"):
        make_pipe()([*CHAT, {"role": "user"}])
    with pytest.raises(ValueError, match="100 tokens leave no room in the model's 100"):
        make_pipe()("p" * 100)


# -- arguments ----------------------------------------------------------------------------------


def params_of(generation=None, defaults=None, **arguments):
    engine = ScriptedEngine()
    make_pipe(engine, generation, **(defaults or {}))("abc", **arguments)
    return engine.requests[0].params


def test_defaults_are_the_pipelines_then_the_models_then_the_callers():
    params = params_of()
    assert (params.max_tokens, params.temperature, params.top_k, params.top_p) == (97, 0.7, 50, 1.0)
    assert params.eos_token_ids == (EOS,) and params.min_tokens == 0
    model = {"eos_token_id": [EOS, 9], "temperature": 0.4, "top_k": 7, "max_length": 40}
    params = params_of(model)
    assert (params.max_tokens, params.temperature, params.top_k) == (37, 0.4, 7)
    assert params.eos_token_ids == (EOS, 9)
    params = params_of(model, {"temperature": 0.6, "max_new_tokens": 5}, top_k=0)
    assert (params.max_tokens, params.temperature, params.top_k) == (5, 0.6, 0)
    params = params_of(model, {"temperature": 0.6}, generation_config={"max_new_tokens": 9, "top_p": 0.5})
    assert (params.max_tokens, params.temperature, params.top_p) == (9, 0.4, 0.5)
    assert params_of({"do_sample": False}).greedy
    assert params_of(eos_token_id=None).eos_token_ids == ()
    assert params_of(max_new_tokens=None).max_tokens == 20
    assert params_of(temperature=0).greedy


def test_own_arguments_reach_the_request():
    engine = ScriptedEngine()
    make_pipe(engine)(
        "p", seed=3, presence_penalty=0.5, frequency_penalty=-0.5, logit_bias={5: 2}, ignore_eos=True,
        stop_token_ids=[8], priority=-1, cache_salt="tenant", min_new_tokens=2, min_p=0.1,
    )  # fmt: skip
    [request] = engine.requests
    params = request.params
    assert (params.seed, params.presence_penalty, params.frequency_penalty, params.min_p) == (
        3,
        0.5,
        -0.5,
        0.1,
    )
    assert (params.logit_bias, params.ignore_eos, params.stop_token_ids) == ({5: 2.0}, True, (8,))
    assert (request.priority, request.salt, params.min_tokens) == (-1, "tenant", 2)


def test_greedy_calls_warn_of_sampling_arguments_they_do_not_use():
    with pytest.warns(UserWarning, match="temperature"):
        make_pipe()("p", do_sample=False, temperature=0.3)


def test_the_package_is_importable_without_torch_and_its_pipeline_callable():
    assert callable(ds_serve.pipeline)
    with pytest.raises(ValueError, match="task"):
        ds_serve.pipeline("translation", model="x")
    with pytest.raises(TypeError, match="device_map"):
        ds_serve.pipeline(model="x", device_map="auto")
    with pytest.raises(ValueError, match="model"):
        ds_serve.pipeline()


def test_close_happens_once():
    engine = ScriptedEngine()
    with make_pipe(engine) as pipe:
        pipe("p")
    pipe.close()
    del pipe
    assert engine.closed == 1
    other = ScriptedEngine()
    make_pipe(other)
    assert other.closed == 1
