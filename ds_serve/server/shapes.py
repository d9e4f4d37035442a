"""What OpenAI's chat and completion objects have in common."""

from __future__ import annotations

import time
import uuid

from ds_serve.server.front import Front

_LOWEST_LOGPROB = -9999.0  # JSON has no infinity


class Envelope:
    """Identity of one call, and the object around its choices."""

    def __init__(self, front: Front, prefix: str, kind: str, chunk_kind: str) -> None:
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self.codec = front.codec
        self._kinds = {False: kind, True: chunk_kind}
        self._rest = {"created": int(time.time()), "model": front.model_name}

    def envelope(self, choices: list[dict], *, chunk: bool) -> dict:
        return {"id": self.id, "object": self._kinds[chunk], **self._rest, "choices": choices}


def token_text(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")


def finite(logprob: float) -> float:
    return max(logprob, _LOWEST_LOGPROB)
