"""/v1/responses over a fake engine, judged by the OpenAI client and its types."""

from fake_server import ANSWER
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

EVENT = TypeAdapter(ResponseStreamEvent)


def create(server, **body):
    return server.openai.responses.create(**({"model": "fake", "input": "hello"} | body))


def prompts(server):
    return [server.codec.decode(request.prompt_token_ids, False) for request in server.engine.requests]


def test_answer(server):
    answer = create(server, temperature=0.5, metadata={"a": "b"}, user="u")
    Response.model_validate(answer.to_dict())
    assert answer.output_text == ANSWER and answer.status == "completed" and answer.id.startswith("resp_")
    assert (answer.model, answer.temperature, answer.metadata, answer.store) == (
        "fake",
        0.5,
        {"a": "b"},
        False,
    )
    assert prompts(server) == ["<s>user:hello</s>assistant:"]
    tokens = len(server.codec.encode(ANSWER)) + 1
    sent = len(server.engine.requests[0].prompt_token_ids)
    usage = answer.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (sent, tokens, sent + tokens)
    details = usage.input_tokens_details
    assert (details.cached_tokens, details.host_cached_tokens) == (2, 1)
    assert usage.output_tokens_details.reasoning_tokens == 0


def test_stream(server):
    events = list(create(server, stream=True))
    for event in events:
        EVENT.validate_python(event.to_dict())
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * deltas,
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == ANSWER
    assert events[-4].text == ANSWER and deltas >= 1
    last = events[-1].response
    assert last.output_text == ANSWER and last.usage.output_tokens > 5 and last.output[0] == events[-2].item
    assert {event.item_id for event in events if hasattr(event, "item_id")} == {last.output[0].id}


def test_events_have_names_and_no_end_mark(server):
    text = server.post("responses", input="hello", stream=True).text
    events = [event.split("\n") for event in text.removesuffix("\n\n").split("\n\n")]
    assert events[0][0] == "event: response.created" and events[-1][0] == "event: response.completed"
    assert all(len(event) == 2 and event[1].startswith('data: {"type":') for event in events)
