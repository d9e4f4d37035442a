"""The controls of sampling, of output's form and of tools, and what they add to a request's body.

Controls have the names of the API's fields; an empty one is not sent, so that the server's default holds.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import gradio as gr

from ds_serve.chat import tools


class Number(NamedTuple):
    name: str
    info: str
    kind: type[int] | type[float] = float


NUMBERS = (
    Number("temperature", "0: always the likeliest token"),
    Number("top_p", "of the likeliest with this sum"),
    Number("top_k", "of so many likeliest tokens", int),
    Number("min_p", "of those near the likeliest"),
    Number("max_tokens", "length of the answer", int),
    Number("min_tokens", "no end before", int),
    Number("seed", "same seed, same answer", int),
    Number("presence_penalty", "against what was used"),
    Number("frequency_penalty", "the more, the stronger"),
    Number("repetition_penalty", "1: none"),
)

EXAMPLE_SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    indent=2,
)


class Sampling:
    """A box for each of the named fields, or all of them; values are what some of them begin with."""

    def __init__(self, names: Sequence[str] = (), prefix: str = "", **values: str) -> None:
        # No gr.Number: it makes a 0 of an empty box.
        self._numbers = {
            number: gr.Textbox(
                values.get(number.name),
                label=number.name,
                info=number.info,
                placeholder="default",
                max_lines=1,
                min_width=120,
                elem_id=f"{prefix}{number.name}",
            )
            for number in NUMBERS
            if not names or number.name in names
        }
        self._stop = None
        if not names:
            self._stop = gr.Textbox(
                label="stop", info="ends the answer before this; one a line", lines=1, elem_id="stop"
            )
        self.components = {*self._numbers.values()} | ({self._stop} if self._stop else set())

    def fields(self, given: Mapping[Any, Any]) -> dict[str, Any]:
        """The body's fields, of what is not empty. Raises gr.Error; ranges are the server's to check."""
        fields = {
            number.name: _number(number, text)
            for number, box in self._numbers.items()
            if (text := (given[box] or "").strip())
        }
        stop = [line for line in (given.get(self._stop) or "").split("\n") if line]
        return fields | ({"stop": stop} if stop else {})


def _number(number: Number, text: str) -> float:
    try:
        value = number.kind(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        wanted = "a whole number" if number.kind is int else "a number"
        raise failure(f"{number.name} must be {wanted}, not {text!r}. Correct it, or empty the field.")
    return value


def failure(sentence: str) -> gr.Error:
    """What a handler raises to show a sentence on the page, until it is closed."""
    return gr.Error(html.escape(sentence), duration=None, title="", print_exception=False)


class Advanced:
    """What an answer must look like, and tools."""

    def __init__(self) -> None:
        self.schema = gr.Textbox(
            label="response_format: JSON schema",
            info="the answer is JSON of this schema; empty: free text",
            lines=3,
            max_lines=12,
            elem_id="schema",
        )
        example = gr.Button("Example schema", size="sm")
        example.click(lambda: EXAMPLE_SCHEMA, None, self.schema, queue=False, api_visibility="private")
        self.tools = gr.CheckboxGroup(
            tools.NAMES, label="tools", info="run by this page when the model calls them", elem_id="tools"
        )
        self.choice = gr.Radio(
            ["auto", "required", "none"],
            value="auto",
            label="tool_choice",
            info="required: the model has to call one",
            elem_id="tool_choice",
        )
        self.components = [self.schema, self.tools, self.choice]

    def fields(self, values: Mapping[Any, Any]) -> dict[str, Any]:
        """The body's fields. Raises gr.Error where the schema is none."""
        fields: dict[str, Any] = {}
        if (values[self.schema] or "").strip():
            named = {"name": "answer", "schema": _schema(values[self.schema])}
            fields["response_format"] = {"type": "json_schema", "json_schema": named}
        if values[self.tools]:
            fields["tools"] = tools.described(values[self.tools])
            fields["tool_choice"] = values[self.choice]
            fields["parallel_tool_calls"] = False
        return fields


def _schema(text: str) -> Any:
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise failure(f"The JSON schema is no JSON: {error}. Correct it, or empty the field.") from None
    if not isinstance(schema, dict):
        raise failure("The JSON schema must be an object. Correct it, or empty the field.")
    return schema
