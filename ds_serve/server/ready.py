"""Whether the server can answer now: it has just produced a token, or a question of its own is answered.

Knows the front's engine client and its door; the route is app.py's.
"""

from __future__ import annotations

import asyncio
import time
import uuid

from ds_serve.messages import Request, SamplingParams
from ds_serve.server.client import EngineClient, EngineDeadError
from ds_serve.server.errors import ApiError
from ds_serve.server.front import Front

_PRIORITY = -(2**62)  # before every request's
_SALT = "ds_serve/ready"


class Readiness:
    """A token within fresh_s seconds is proof enough; else a probe must give one within probe_timeout_s.

    One probe at a time, whoever asks; after one has failed there is none for failed_s, and the answer stays.
    """

    def __init__(
        self,
        front: Front,
        *,
        fresh_s: float = 5.0,
        probe_timeout_s: float = 5.0,
        failed_s: float = 1.0,
    ) -> None:
        self._front = front
        self.fresh_s = fresh_s
        self.probe_timeout_s = probe_timeout_s
        self.failed_s = failed_s
        self._probe: asyncio.Task[None] | None = None
        self._failure = ""
        self._failed_until = 0.0

    async def check(self) -> None:
        """Returns if the server can answer. Raises ApiError 503, EngineDeadError where it has no engine."""
        self._front.door.check()
        client = self._front.client
        now = time.monotonic()
        if now - client.last_token_at < self.fresh_s:
            return
        if now >= self._failed_until:
            if self._probe is None:
                self._probe = asyncio.create_task(self._ask(client))
            await asyncio.shield(self._probe)
            client = self._front.client  # it may have died meanwhile, or be another
        if self._failure:
            raise ApiError(503, self._failure, code="not_ready", retry_after_s=1)

    async def _ask(self, client: EngineClient) -> None:
        try:
            self._failure = await self._failure_of(client)
        finally:
            if self._failure:
                self._failed_until = time.monotonic() + self.failed_s
            self._probe = None

    async def _failure_of(self, client: EngineClient) -> str:
        """Why a request of one token had no answer; empty where it had."""
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        request = Request(
            id=f"ready-{uuid.uuid4().hex}",
            prompt_token_ids=[0],
            params=params,
            salt=_SALT,
            priority=_PRIORITY,
        )
        try:
            async with asyncio.timeout(self.probe_timeout_s):
                async for output in client.generate(request):
                    if output.token_ids:
                        return ""
                    failure = output.error or "the engine gave no token"
                return failure
        except TimeoutError:
            return f"the engine has produced no token for {self.probe_timeout_s:g} s"
        except EngineDeadError as error:
            return error.reason
