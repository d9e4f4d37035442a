"""POST /tokenize and /detokenize: what the model's tokenizer makes of a text, a chat, or of token ids.

Knows no engine but for its longest context; the shapes are those that users of such servers know.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Response
from pydantic import BaseModel, Discriminator, Field, Tag

from ds_serve.server.chat_protocol import Turns
from ds_serve.server.errors import refusing
from ds_serve.server.front import Front
from ds_serve.server.protocol import Body, Text
from ds_serve.server.replies import json_reply

_CHARS_A_TOKEN = 4  # about; it decides whether ids are decoded on the event loop


class _TokenizeBody(Body):
    model: Text | None = Field(None, description="a served model's name, if any")
    return_token_strs: bool = Field(False, description="also tell how the vocabulary spells each token")


class TokenizeText(_TokenizeBody):
    """A text, as /v1/completions would encode it."""

    prompt: Text
    add_special_tokens: bool = Field(True, description="with those that the tokenizer adds on its own")


class TokenizeChat(Turns, _TokenizeBody):
    """A chat, as /v1/chat/completions would render and encode it."""

    add_special_tokens: Literal[False] = Field(False, description="the template writes them itself")


def _form(body: Any) -> str:
    return "<chat>" if isinstance(body, dict) and "messages" in body else "<text>"


TokenizeBody = Annotated[
    Annotated[TokenizeText, Tag("<text>")] | Annotated[TokenizeChat, Tag("<chat>")], Discriminator(_form)
]


class TokenizeReply(BaseModel):
    """count is the number of tokens; token_strs is null where it was not asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeBody(Body):
    model: Text | None = Field(None, description="a served model's name, if any")
    tokens: list[int]


class DetokenizeReply(BaseModel):
    """The text of the tokens, special ones included."""

    prompt: str


async def tokenize(front: Front, body: TokenizeText | TokenizeChat) -> Response:
    """Raises ApiError, EngineDeadError (a 503)."""
    info = _info(front, body.model)
    if isinstance(body, TokenizeChat):
        token_ids = await front.encode_chat(body)
    else:
        token_ids = await front.encode(
            lambda: front.codec.encode(body.prompt, add_special_tokens=body.add_special_tokens),
            len(body.prompt),
        )
    strings = None
    if body.return_token_strs:
        strings = await front.encode(lambda: front.codec.pieces(token_ids), _CHARS_A_TOKEN * len(token_ids))
    return json_reply(
        {
            "count": len(token_ids),
            "max_model_len": info.max_model_len,
            "tokens": token_ids,
            "token_strs": strings,
        }
    )


async def detokenize(front: Front, body: DetokenizeBody) -> Response:
    """Raises ApiError (400 for an id that is none of the tokenizer's), EngineDeadError (a 503)."""
    _info(front, body.model)

    def decode() -> str:
        front.codec.pieces(body.tokens)
        return front.codec.decode(body.tokens, skip_special_tokens=False)

    with refusing():
        text = await front.encode(decode, _CHARS_A_TOKEN * len(body.tokens))
    return json_reply({"prompt": text})


def _info(front: Front, model: str | None):
    client = front.client
    if model is not None:
        front.adapter_of(model)
    return client.info
