"""The body of /v1/responses, and the chat that it is: its turns, its limits and its format by chat's names.

Knows shapes and types; responses.py words the reply. What chat.py's body checks is checked there, and told
with the names of this one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from ds_serve.server.chat_protocol import ChatBody
from ds_serve.server.errors import ApiError, from_validation
from ds_serve.server.protocol import Body, GenerationBody, Text

LOGPROBS = "message.output_text.logprobs"

_CHAT_NAMES = {
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
}
_TEXT_PARTS = ("input_text", "output_text")


class TextPart(Body):
    """Text of a message. What a reply's part has beside its text may come back with it."""

    type: Literal["input_text", "output_text"]
    text: Text
    annotations: list[Any] = Field([], max_length=0)
    logprobs: list[Any] = Field([], description="of an earlier reply; not read")


class MessageItem(Body):
    """One turn. Parts are joined by newlines; id and status of an earlier reply's message are not read."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    id: Text | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _content_is_text(cls, value: Any) -> Any:
        if isinstance(value, list):
            kinds = [part.get("type") if isinstance(part, dict) else part for part in value]
            if any(kind not in _TEXT_PARTS for kind in kinds):
                raise ValueError(f"parts must be of type 'input_text' or 'output_text', got {kinds}")
        elif not isinstance(value, str):
            raise ValueError("must be a string or a list of text parts")
        return value

    def as_message(self) -> dict:
        content = self.content
        return {
            "role": self.role,
            "content": content if isinstance(content, str) else "\n".join(part.text for part in content),
        }


Item = MessageItem
Input = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[list[Item], Tag("<items>"), Field(min_length=1)],
    Discriminator(lambda value: "<items>" if isinstance(value, list) else "<text>"),
]


class PlainFormat(Body):
    type: Literal["text"] = "text"


class TextOptions(Body):
    format: PlainFormat = PlainFormat()


class ResponseStreamOptions(Body):
    include_obfuscation: Literal[False] = False


class ResponsesBody(GenerationBody):
    """POST /v1/responses. Nothing is stored: each call brings the whole conversation."""

    input: Input
    instructions: Text | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    text: TextOptions = TextOptions()
    include: list[Literal["message.output_text.logprobs"]] = []
    top_logprobs: int | None = Field(None, ge=0, le=20)
    stream_options: ResponseStreamOptions | None = None
    metadata: Annotated[
        dict[Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=512)]],
        Field(max_length=16, description="comes back with the reply, and goes nowhere else"),
    ] = {}
    safety_identifier: Text | None = Field(None, max_length=128, description="informational only")
    store: Literal[False] = Field(False, description="nothing is stored")
    background: Literal[False] = False
    truncation: Literal["disabled"] = "disabled"
    service_tier: Literal["auto", "default"] = Field("auto", description="there is one: default")
    chat_template_kwargs: dict[str, Any] = {}

    @model_validator(mode="after")
    def _response_fields_agree(self) -> ResponsesBody:
        if self.top_logprobs is not None and LOGPROBS not in self.include:
            raise ValueError(f"top_logprobs: only where include has {LOGPROBS!r}")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only where stream is true")
        return self

    def as_chat(self) -> ChatBody:
        """The same call of /v1/chat/completions. Raises ApiError where chat's own checks refuse it."""
        given = {
            name: getattr(self, name) for name in GenerationBody.model_fields if name in self.model_fields_set
        }
        with in_our_words():
            try:
                return ChatBody(
                    **given,
                    messages=self._messages(),
                    max_completion_tokens=self.max_output_tokens,
                    logprobs=LOGPROBS in self.include,
                    top_logprobs=self.top_logprobs,
                    chat_template_kwargs=self.chat_template_kwargs,
                )
            except ValidationError as error:
                raise from_validation(
                    [entry | {"loc": ("body", *entry["loc"])} for entry in error.errors()]
                ) from error

    def _messages(self) -> list[dict]:
        items = [MessageItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        first = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        return first + [item.as_message() for item in items]


@contextmanager
def in_our_words() -> Iterator[None]:
    """Tells a refusal of the chat's fields with the names that they have here."""
    try:
        yield
    except ApiError as error:
        raise _renamed(error) from error


def _renamed(error: ApiError) -> ApiError:
    body = error.body["error"]
    param, _, rest = (body["param"] or "").partition(".")
    if param not in _CHAT_NAMES:
        return error
    name = _CHAT_NAMES[param]
    message = body["message"].replace(param, name, 1)
    return ApiError(error.status, message, param=name + rest and f".{rest}", code=body["code"])
