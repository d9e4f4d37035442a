"""Tool calls on the real server and the demo model, which calls only because a grammar holds it to that."""

import json

import jsonschema
import pytest

from ds_serve.text.tools import MAX_CALLS

WEATHER = {
    "type": "object",
    "properties": {
        "places": {"type": "array", "items": {"$ref": "#/$defs/place"}, "minItems": 1, "maxItems": 2},
        "unit": {"enum": ["C", "F"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
    },
    "required": ["places", "unit"],
    "$defs": {"place": {"type": "string", "minLength": 1, "maxLength": 8}},
}
TIME = {"properties": {"zone": {"enum": ["UTC", "CET"]}}, "required": ["zone"]}
SCHEMAS = {"get_weather": WEATHER, "get_time": TIME, "stop": {"type": "object", "maxProperties": 0}}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "Tells", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "get_time", "parameters": TIME}},
    {"type": "function", "function": {"name": "stop"}},
]
ASKED = {"messages": [{"role": "user", "content": "How is it in Rome?"}], "tools": TOOLS, "max_tokens": 400}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
END = 1  # <|end|>


def validated(calls):
    for call in calls:
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
    return [(call.function.name, call.function.arguments) for call in calls]


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_calls_are_valid_streamed_or_not(real, choice, temperature):
    why = "tool_calls" if choice == "required" else "stop"
    body = ASKED | {"tool_choice": choice, "parallel_tool_calls": False}
    body |= {"temperature": temperature, "seed": 3}
    told = []
    for each in real.chat(n=4, **body).choices:
        assert each.message.content is None and each.finish_reason == why
        told.append(validated(each.message.tool_calls))
        assert len(told[-1]) == 1 and (choice == "required" or told[-1][0][0] == "get_weather")
    with real.openai.chat.completions.stream(model="demo", n=4, **body) as stream:
        streamed = stream.get_final_completion().choices
    assert [validated(each.message.tool_calls) for each in sorted(streamed, key=lambda c: c.index)] == told
    assert {each.finish_reason for each in streamed} == {why}


def test_a_model_that_may_not_end_calls_in_parallel(real):
    body = ASKED | {"tool_choice": "required", "logit_bias": {str(END): -100}}
    choice = real.chat(**body).choices[0]
    *calls, last = choice.message.tool_calls
    assert choice.finish_reason == "length" and validated(calls)
    assert len({call.id for call in [*calls, last]}) == len(calls) + 1
    many = real.chat(**(body | {"max_tokens": 1600})).choices[0]
    assert many.finish_reason == "tool_calls" and len(validated(many.message.tool_calls)) == MAX_CALLS
    one = real.chat(**body, parallel_tool_calls=False).choices[0]
    assert one.finish_reason == "tool_calls" and len(validated(one.message.tool_calls)) == 1


def test_a_result_goes_back_and_words_come(real):
    first = real.chat(**ASKED, tool_choice="required")
    calls = first.choices[0].message.tool_calls
    results = [{"role": "tool", "tool_call_id": call.id, "content": "22 degrees"} for call in calls]
    messages = [*ASKED["messages"], first.choices[0].message, *results]
    second = real.chat(**(ASKED | {"messages": messages}), tool_choice="none")
    assert second.choices[0].message.content and second.choices[0].message.tool_calls is None
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 16
    auto = real.chat(**(ASKED | {"messages": messages})).choices[0]
    validated(auto.message.tool_calls or [])
    assert auto.message.content or auto.message.tool_calls
