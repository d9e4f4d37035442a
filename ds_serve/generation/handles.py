"""Prefixes that stay: a prompt computed before the calls that begin with it, and the handle that lets it go.

Knows requests and token ids, neither text nor blocks; pipeline.py's prefill is the only caller.
"""

from __future__ import annotations

import contextlib
import math
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from ds_serve.generation.run import GenerationError
from ds_serve.messages import Output, Request, SamplingParams


class PrefixHandle:
    """A prompt's KV in the device's cache. release() lets it go, and so does leaving its `with` block.

    num_tokens         tokens in the prompt's full KV blocks: prompts that begin with them start from there
    num_cached_tokens  tokens of the prompt that were in the cache before
    ttl                seconds for which it stays from its prefill on; 0.0: not pinned, evicted like any other

    A handle that is dropped unreleased costs its blocks until ttl has passed.
    """

    def __init__(
        self, num_tokens: int, num_cached_tokens: int, ttl: float, unpin: Callable[[], None] | None
    ) -> None:
        self.num_tokens = num_tokens
        self.num_cached_tokens = num_cached_tokens
        self.ttl = ttl
        self._unpin = unpin

    def release(self) -> None:
        """The blocks may be evicted from now on. Fine to call again, after ttl, after the pipeline's end."""
        unpin, self._unpin = self._unpin, None
        if unpin is not None:
            unpin()

    def __enter__(self) -> PrefixHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __repr__(self) -> str:
        state = "not pinned" if self._unpin is None else f"ttl={self.ttl:g}"
        return f"PrefixHandle(num_tokens={self.num_tokens}, {state})"


@dataclass(frozen=True)
class Prefill:
    """One prompt's request on its way. engine is a LocalEngine."""

    engine: Any
    request: Request

    @classmethod
    def of(
        cls,
        engine: Any,
        token_ids: list[int],
        *,
        ttl: float,
        pin: bool,
        salt: str,
        priority: int,
        adapter: str,
    ) -> Prefill:
        """Raises ValueError for a ttl that is no time, or a prompt that the model does not hold."""
        if isinstance(ttl, bool) or not isinstance(ttl, (int, float)) or not 0 < ttl < math.inf:
            raise ValueError(f"ttl: must be seconds above 0, got {ttl!r}")
        limit = engine.info.max_model_len
        if len(token_ids) >= limit:
            raise ValueError(f"prompt: {len(token_ids)} tokens leave no room in the model's {limit}")
        name = f"prefill-{uuid.uuid4().hex}"
        request = Request(
            id=name,
            prompt_token_ids=token_ids,
            params=SamplingParams(max_tokens=1, temperature=0.0),  # no request without a token: it is dropped
            salt=salt,
            priority=priority,
            adapter=adapter,
            cache_key=name if pin else "",
            cache_ttl=float(ttl),
            pin="must" if pin else "hint",
        )
        return cls(engine, request)

    @contextlib.contextmanager
    def running(self, emit: Callable[[Output], None]) -> Iterator[None]:
        """emit gets the request's last Output, on the engine's thread. Left by an exception, it is undone."""

        def on_output(output: Output) -> None:
            if output.finish_reason is not None:
                emit(output)

        self.engine.submit(self.request, on_output)
        try:
            yield
        except BaseException:
            self.engine.abort(self.request.id)
            if self.request.cache_key:
                self.engine.unpin(self.request.cache_key, self.request.salt)
            raise

    def handle(self, last: Output) -> PrefixHandle:
        """What the last Output came to. Raises GenerationError where the engine refused or failed."""
        if last.finish_reason in ("error", "abort"):
            raise GenerationError(last.error or "the request was aborted")
        size = self.engine.info.block_size
        num_tokens = len(self.request.prompt_token_ids) // size * size
        if not self.request.cache_key:
            return PrefixHandle(num_tokens, last.num_cached_tokens, 0.0, None)
        unpin = partial(self.engine.unpin, self.request.cache_key, self.request.salt)
        return PrefixHandle(num_tokens, last.num_cached_tokens, self.request.cache_ttl, unpin)
