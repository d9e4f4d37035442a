"""Items of /v1/responses: those that its input is made of, and the turns of a chat that they are.

Knows shapes and types; responses_protocol.py has the body around them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from ds_serve.server.protocol import Body, Text

_TEXT_PARTS = ("input_text", "output_text")


class TextPart(Body):
    """Text of a message. What a reply's part has beside its text may come back with it."""

    type: Literal["input_text", "output_text"]
    text: Text
    annotations: list[Any] = Field([], max_length=0)
    logprobs: list[Any] = Field([], description="of an earlier reply; not used")
    parsed: Any = Field(None, description="what OpenAI's client read in text; not used")


def _text_or_parts(value: Any) -> Any:
    if isinstance(value, list):
        kinds = [part.get("type") if isinstance(part, dict) else part for part in value]
        if any(kind not in _TEXT_PARTS for kind in kinds):
            raise ValueError(f"parts must be of type 'input_text' or 'output_text', got {kinds}")
    elif not isinstance(value, str):
        raise ValueError("must be a string or a list of text parts")
    return value


def _joined(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


class _Item(Body):
    """What every item of an earlier reply has beside; not used."""

    id: Text | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class MessageItem(_Item):
    """One turn. Parts are joined by newlines."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]

    check_content = field_validator("content", mode="before")(_text_or_parts)


class FunctionCallItem(_Item):
    """A call that the assistant made; arguments is a JSON object as text."""

    type: Literal["function_call"]
    call_id: Text
    name: Text
    arguments: Text
    parsed_arguments: Any = Field(None, description="what OpenAI's client read in arguments; not used")


class FunctionCallOutputItem(_Item):
    """What the call call_id gave."""

    type: Literal["function_call_output"]
    call_id: Text
    output: Text | list[TextPart]

    check_output = field_validator("output", mode="before")(_text_or_parts)


_KINDS = ("message", "function_call", "function_call_output")


def _kind(item: Any) -> str | None:
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)
    return f"<{kind}>" if kind in _KINDS else None


Item = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[FunctionCallItem, Tag("<function_call>")]
    | Annotated[FunctionCallOutputItem, Tag("<function_call_output>")],
    Discriminator(
        _kind,
        custom_error_type="item_type",
        custom_error_message=f"must be an item of one of the types {', '.join(map(repr, _KINDS))}",
    ),
]

Input = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[list[Item], Tag("<items>"), Field(min_length=1)],
    Discriminator(lambda value: "<items>" if isinstance(value, list) else "<text>"),
]


def as_messages(input: str | list[Item], instructions: str | None) -> list[dict[str, Any]]:
    """The chat. Calls belong to the assistant's turn that they follow."""
    messages: list[dict[str, Any]] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    for item in [MessageItem(role="user", content=input)] if isinstance(input, str) else input:
        if isinstance(item, MessageItem):
            messages.append({"role": item.role, "content": _joined(item.content)})
        elif isinstance(item, FunctionCallOutputItem):
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _joined(item.output)})
        else:
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant"})
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            messages[-1].setdefault("tool_calls", []).append(call)
    return messages
