"""The body of /v1/responses, and the chat that it is: its turns, its limits and its format by chat's names.

Knows shapes and types; responses.py words the reply. What chat's own body checks is checked there, and told
with the names of this one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from ds_serve.server.chat_protocol import MAX_TOOLS, ChatBody, Function
from ds_serve.server.errors import ApiError, from_validation
from ds_serve.server.protocol import (
    AccountFields,
    Body,
    Form,
    GenerationBody,
    JsonObject,
    ResponseFormat,
    Text,
)
from ds_serve.server.responses_items import Input, as_messages

LOGPROBS = "message.output_text.logprobs"

_CHAT_NAMES = {
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
    "response_format": "text.format",
}


class TextFormat(Body):
    """response_format, with the schema's fields beside the type."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    schema_: JsonObject | bool | None = Field(None, alias="schema")
    name: Text | None = None
    description: Text | None = None
    strict: bool | None = None

    def as_response_format(self) -> ResponseFormat:
        """Raises ValidationError for a type without its schema, or a schema without its type."""
        schema = self.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)
        return ResponseFormat(type=self.type, json_schema=schema or None)


class TextOptions(Body):
    format: TextFormat = TextFormat()

    @field_validator("format")
    @classmethod
    def _is_one(cls, format: TextFormat) -> TextFormat:
        format.as_response_format()
        return format


class _OfFunction(Body):  # a base of its own, so that a tool of another type is told this and nothing else
    type: Literal["function"]


class FunctionTool(Function, _OfFunction):
    """A function, with its fields beside the type."""

    def as_tool(self) -> dict[str, Any]:
        return {"type": "function", "function": self.model_dump(exclude={"type"}, exclude_none=True)}


class NamedFunction(_OfFunction):
    name: Text


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<word>")] | Annotated[NamedFunction, Tag("<name>")],
    Discriminator(lambda value: "<name>" if isinstance(value, dict | NamedFunction) else "<word>"),
]


class ResponseStreamOptions(Body):
    include_obfuscation: Literal[False] = False


class ResponsesBody(AccountFields, GenerationBody):
    """POST /v1/responses. Nothing is stored: each call brings the whole conversation."""

    input: Input
    instructions: Text | None = Field(None, description="a system message before the input")
    max_output_tokens: int | None = Field(None, ge=1)
    text: TextOptions = TextOptions()
    tools: list[FunctionTool] = Field([], max_length=MAX_TOOLS)
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    include: list[Literal["message.output_text.logprobs"]] = []
    top_logprobs: int | None = Field(None, ge=0, le=20)
    stream_options: ResponseStreamOptions | None = None
    metadata: Annotated[
        dict[Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=512)]],
        Field(max_length=16, description="comes back with the reply, and goes nowhere else"),
    ] = {}
    background: Literal[False] = False
    truncation: Literal["disabled"] = "disabled"
    chat_template_kwargs: JsonObject = {}

    @model_validator(mode="after")
    def _response_fields_agree(self) -> ResponsesBody:
        if self.top_logprobs is not None and LOGPROBS not in self.include:
            raise ValueError(f"top_logprobs: only where include has {LOGPROBS!r}")
        if self.include and self.tools and self.tool_choice != "none":
            raise ValueError("include: no logprobs beside tools, unless tool_choice is 'none'")
        if self.tool_choice not in ("auto", "none") and not self.tools:
            raise ValueError("tool_choice: only where tools are given")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only where stream is true")
        return self

    def _forms(self) -> list[Form]:
        schema = self.text.format.as_response_format().schema_asked
        own = [] if schema is None else [Form("text.format", "json_schema", schema)]
        return own + super()._forms()

    def as_chat(self) -> ChatBody:
        """The same call of /v1/chat/completions. Raises ApiError where chat's own checks refuse it."""
        shared = {
            name: getattr(self, name) for name in GenerationBody.model_fields.keys() & self.model_fields_set
        }
        with in_our_words():
            try:
                return ChatBody(
                    **shared,
                    **self._tools(),
                    messages=as_messages(self.input, self.instructions),
                    max_completion_tokens=self.max_output_tokens,
                    logprobs=LOGPROBS in self.include,
                    top_logprobs=self.top_logprobs,
                    response_format=self.text.format.as_response_format(),
                    chat_template_kwargs=self.chat_template_kwargs,
                )
            except ValidationError as error:
                found = [entry | {"loc": ("body", *entry["loc"])} for entry in error.errors()]
                raise from_validation(found) from error

    def _tools(self) -> dict[str, Any]:
        if not self.tools:
            return {}
        choice = self.tool_choice
        if isinstance(choice, NamedFunction):
            choice = {"type": "function", "function": {"name": choice.name}}
        return {
            "tools": [tool.as_tool() for tool in self.tools],
            "tool_choice": choice,
            "parallel_tool_calls": self.parallel_tool_calls,
        }


@contextmanager
def in_our_words() -> Iterator[None]:
    """Tells a refusal of the chat's fields with the names that they have here."""
    try:
        yield
    except ApiError as error:
        raise _renamed(error) from error


def _renamed(error: ApiError) -> ApiError:
    body = error.body["error"]
    name = (body["param"] or "").partition(".")[0]
    ours = _CHAT_NAMES.get(name, name)
    message = body["message"].replace(name, ours, 1)
    if name == "tools":
        message = re.sub(r"^(tools[\[.]\d+\]?)\.function\b", r"\1", message)
    return ApiError(error.status, message, param=ours or None, code=body["code"])
