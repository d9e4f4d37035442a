"""The body of /v1/chat/completions: a chat, the tools it may use, and what every generating route takes.

Knows shapes and types; what a template makes of the messages is text/codec.py's, how a model writes calls
text/tools.py's. See protocol.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from ds_serve.server.protocol import AccountFields, Body, ChoicesBody, JsonObject, Text, shallow

MAX_TOOLS = 128

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class TextPart(Body):
    type: Literal["text"]
    text: Text


class CalledFunction(Body):
    """arguments is a JSON object as text, as the model wrote it."""

    name: FunctionName
    arguments: Text
    parsed_arguments: Any = Field(None, description="what OpenAI's client read in arguments; not used")

    @field_validator("arguments")
    @classmethod
    def _are_an_object(cls, value: str) -> str:
        _object(value)
        return value


class ToolCall(Body):
    """A call that the assistant made."""

    id: Text
    type: Literal["function"]
    function: CalledFunction
    index: int | None = Field(None, description="the call's place, which streams tell; not used")

    def for_template(self) -> dict[str, Any]:
        function = {"name": self.function.name, "arguments": _object(self.function.arguments)}
        return {"id": self.id, "type": "function", "function": function}


class Message(Body):
    """One turn. Content of several text parts is joined by newlines.

    An assistant's turn has content, tool_calls or both; a tool's turn names the call that it answers.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart] | None = None
    name: Text | None = None
    tool_calls: list[ToolCall] = Field([], min_length=1)
    tool_call_id: Text | None = None
    parsed: Any = Field(None, description="what OpenAI's client read in content; not used")
    provider_specific_fields: dict[Text, None] = Field({}, description="LiteLLM's; must hold nulls alone")

    @field_validator("content", mode="before")
    @classmethod
    def _content_is_text(cls, value: Any) -> Any:
        if isinstance(value, list):
            kinds = [part.get("type") if isinstance(part, dict) else part for part in value]
            if any(kind != "text" for kind in kinds):
                raise ValueError(f"parts must be of type 'text', got {kinds}")
        elif not isinstance(value, str):
            raise ValueError("must be a string or a list of text parts")
        return value

    @model_validator(mode="after")
    def _fields_suit_the_role(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls: only where role is 'assistant'")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("tool_call_id: required where role is 'tool', and only there")
        if self.content is None and not self.tool_calls:
            raise ValueError("content: required where there are no tool_calls")
        return self

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""

    def for_template(self, names: Mapping[str, str]) -> dict[str, Any]:
        """As transformers' templates take it. names are the functions that were called, by the calls' ids."""
        message: dict[str, Any] = {"role": self.role, "content": self.text}
        name = self.name
        if self.role == "tool":
            message["tool_call_id"] = self.tool_call_id
            name = name or names[self.tool_call_id]
        if name is not None:
            message["name"] = name
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        return message


class Function(Body):
    """parameters is the JSON schema of an object; without it there are none."""

    name: FunctionName
    description: Text | None = None
    parameters: JsonObject | None = None
    strict: bool = Field(True, description="calls are valid against parameters in any case")


class Tool(Body):
    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        function = {"name": self.function.name, "description": self.function.description or ""}
        parameters = self.function.parameters
        function["parameters"] = {"type": "object", "properties": {}} if parameters is None else parameters
        return {"type": "function", "function": function}


class FunctionChoice(Body):
    name: FunctionName


class NamedTool(Body):
    """The tool that has to be called."""

    type: Literal["function"]
    function: FunctionChoice


def _choice_form(value: Any) -> str:
    return "<name>" if isinstance(value, dict | NamedTool) else "<word>"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<word>")] | Annotated[NamedTool, Tag("<name>")],
    Discriminator(_choice_form),
]


class Turns(Body):
    """A chat as its template gets it: what makes the prompt, and nothing else."""

    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] = Field([], min_length=1, max_length=MAX_TOOLS)
    chat_template_kwargs: JsonObject = {}
    add_generation_prompt: bool | None = Field(
        None, description="opens the assistant's turn; default: unless continue_final_message"
    )
    continue_final_message: bool = False

    @field_validator("tools")
    @classmethod
    def _names_differ(cls, tools: list[Tool]) -> list[Tool]:
        names = [tool.function.name for tool in tools]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two functions have the name {twice!r}")
        return tools

    @field_validator("messages")
    @classmethod
    def _results_are_of_calls(cls, messages: list[Message]) -> list[Message]:
        called = set()
        for index, message in enumerate(messages):
            called |= {call.id for call in message.tool_calls}
            if message.role == "tool" and message.tool_call_id not in called:
                raise ValueError(f"no call before message {index} has the id {message.tool_call_id!r}")
        return messages

    def messages_for_template(self) -> list[dict[str, Any]]:
        names = {call.id: call.function.name for message in self.messages for call in message.tool_calls}
        return [message.for_template(names) for message in self.messages]

    def tools_for_template(self) -> list[dict[str, Any]] | None:
        return [tool.for_template() for tool in self.tools] or None


class ChatBody(Turns, AccountFields, ChoicesBody):
    """POST /v1/chat/completions."""

    tool_choice: ToolChoice = Field(
        "auto", description="none: tools are shown to the model, and text that looks like a call stays text"
    )
    parallel_tool_calls: bool = Field(True, description="whether an answer may have several calls")
    max_completion_tokens: int | None = Field(None, ge=1)
    modalities: list[Literal["text"]] = Field(["text"], min_length=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _names_a_function(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("type", "function") != "function":
            raise ValueError(f"the type {value['type']!r} is not supported, 'function' is")
        return value

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only where logprobs is true")
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            raise ValueError("max_tokens: differs from max_completion_tokens, its newer name; send one")
        return self

    @model_validator(mode="after")
    def _tool_fields_need_tools(self) -> ChatBody:
        for name in ("tool_choice", "parallel_tool_calls"):
            if name in self.model_fields_set and not self.tools:
                raise ValueError(f"{name}: only where tools are given")
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            if all(tool.function.name != name for tool in self.tools):
                raise ValueError(f"tool_choice: {name!r} is none of tools")
        if self.may_call and self.form is not None:
            raise ValueError(f"{self.form.name}: not beside tools, unless tool_choice is 'none'")
        return self

    @property
    def may_call(self) -> bool:
        """Whether the answer may hold calls of tools."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def max_tokens_asked(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def _object(text: str) -> dict[str, Any]:
    """Raises ValueError where text is no JSON object."""
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"must be JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON object, got {type(value).__name__}")
    return shallow(value)
