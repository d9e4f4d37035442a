"""The FastAPI application: which route does what, and which error becomes which status.

Knows the Front it is given; starts no process and opens no port (run.py does).
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import msgspec
from fastapi import FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.exceptions import HTTPException

from ds_serve.config import Settings
from ds_serve.server import responses_reply
from ds_serve.server.accesslog import CLIENT_CLOSED
from ds_serve.server.chat import chat_completions
from ds_serve.server.chat_protocol import ChatBody
from ds_serve.server.client import EngineDeadError
from ds_serve.server.completions import completions
from ds_serve.server.engine_metrics import EngineScrape
from ds_serve.server.errors import ApiError, from_validation
from ds_serve.server.front import Front
from ds_serve.server.gate import add_gate
from ds_serve.server.keys import KeyRing
from ds_serve.server.observe import Observe, telemetry
from ds_serve.server.openai_reply import (
    CHAT,
    COMPLETION,
    METRICS,
    HealthReply,
    ModelCard,
    ModelList,
    ReadyReply,
    VersionReply,
)
from ds_serve.server.openapi import document
from ds_serve.server.protocol import MAX_CACHE_KEY_CHARS, CompletionBody
from ds_serve.server.ready import Readiness
from ds_serve.server.replies import ClientGone, json_reply
from ds_serve.server.responses import responses
from ds_serve.server.responses_protocol import ResponsesBody
from ds_serve.server.tokens import (
    DetokenizeBody,
    DetokenizeReply,
    TokenizeBody,
    TokenizeReply,
    detokenize,
    tokenize,
)

_STATS_TIMEOUT_S = 1.0


class _Rest(PathConvertor):
    """The rest of a path as it is: starlette's own "path" ends at a line's end, and keys may hold one."""

    regex = r"[\s\S]*"


register_url_convertor("rest", _Rest())


def create_app(front: Front, settings: Settings | None = None, keys: KeyRing | None = None) -> FastAPI:
    """The routes; with settings behind the gate, which asks for one of the keys, if there are any."""
    app = FastAPI(title="ds_serve", version=package_version(), telemetry=telemetry(front.tracing))
    _add_service_routes(app, front)
    _add_openai_routes(app, front)
    _add_error_handlers(app, front)
    document(app, gated=settings is not None, asks_for_key=keys is not None and not keys.is_open)
    if settings is not None:
        add_gate(app, front.door, settings, keys or KeyRing())
    app.add_middleware(Observe, routes=app.routes, metrics=front.metrics, tracing=front.tracing)
    return app


def _add_openai_routes(app: FastAPI, front: Front) -> None:
    def card(name: str) -> dict:
        info = front.client.info
        return {
            "id": name,
            "object": "model",
            "created": front.created,
            "owned_by": "ds_serve",
            "max_model_len": info.max_model_len,
            "parent": front.model_name if front.adapter_of(name) else None,
        }

    @app.get("/v1/models", response_model=ModelList)
    async def list_models() -> Response:
        """The model that is served, and its LoRA adapters."""
        return json_reply({"object": "list", "data": [card(name) for name in front.model_names]})

    @app.get("/v1/models/{name:rest}", response_model=ModelCard)
    async def retrieve_model(name: str) -> Response:
        """The model or adapter of this name, if it is served."""
        front.adapter_of(name)
        return json_reply(card(name))

    @app.post("/v1/completions", responses=COMPLETION)
    async def create_completion(body: CompletionBody, http: Request) -> Response:
        """Continues a prompt, or each of several."""
        return await completions(front, body, http)

    @app.post("/v1/chat/completions", responses=CHAT)
    async def create_chat_completion(body: ChatBody, http: Request) -> Response:
        """Answers a chat, with text or with calls of tools."""
        return await chat_completions(front, body, http)

    @app.post("/v1/responses", responses=responses_reply.DOCUMENTED)
    async def create_response(body: ResponsesBody, http: Request) -> Response:
        """One answer, as OpenAI's newer API words it. Nothing is stored: send the whole conversation."""
        return await responses(front, body, http)

    @app.delete("/v1/cache/{prompt_cache_key:rest}", status_code=204)
    async def release_cache_key(
        prompt_cache_key: Annotated[str, Path(min_length=1, max_length=MAX_CACHE_KEY_CHARS)],
        cache_salt: Annotated[str, Query(description="the salt that the key was used with")] = "",
    ) -> Response:
        """Lets go what is kept under this prompt_cache_key and cache_salt; 204 also where that is nothing.

        The blocks stay cached until their memory is needed.
        """
        front.client.unpin(prompt_cache_key, cache_salt)
        return Response(status_code=204)


def _add_service_routes(app: FastAPI, front: Front) -> None:
    @app.get("/health", response_model=HealthReply)
    async def health() -> Response:
        """503 while there is no engine; stats is null where the engine is busy for a second."""
        client = front.client
        stats = None
        with suppress(TimeoutError):
            stats = await asyncio.wait_for(client.stats(), _STATS_TIMEOUT_S)
        payload = {"status": "ok", "engine": msgspec.structs.asdict(client.info)}
        return json_reply(payload | {"stats": None if stats is None else msgspec.structs.asdict(stats)})

    @app.post("/tokenize", response_model=TokenizeReply)
    async def tokenize_prompt(body: TokenizeBody) -> Response:
        """A prompt's or a chat's token ids."""
        return await tokenize(front, body)

    @app.post("/detokenize", response_model=DetokenizeReply)
    async def detokenize_ids(body: DetokenizeBody) -> Response:
        """The text of token ids."""
        return await detokenize(front, body)

    engine = EngineScrape(app.version)

    @app.get("/metrics", response_class=Response, responses=METRICS)
    async def metrics(http: Request) -> Response:
        """Prometheus' text, or OpenMetrics where asked for; 200 also while there is no engine."""
        families = await engine.families(front.backend)
        text, content_type = front.metrics.exposition(http.headers.get("accept", ""), families)
        return Response(text, headers={"Content-Type": content_type})

    readiness = app.state.readiness = Readiness(front)

    @app.get("/ready", response_model=ReadyReply)
    async def ready() -> Response:
        """200 where a token has just been produced, or is for a probe; 503 with the reason anywhere else."""
        await readiness.check()
        return json_reply({"status": "ready"})

    @app.get("/version", response_model=VersionReply)
    async def show_version() -> Response:
        """The version of ds_serve."""
        return json_reply({"version": app.version})


def _add_error_handlers(app: FastAPI, front: Front) -> None:
    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def bad_body(_: Request, error: RequestValidationError) -> Response:
        return from_validation(error.errors()).response()

    @app.exception_handler(EngineDeadError)
    async def no_engine(_: Request, error: EngineDeadError) -> Response:
        retry_after_s = front.backend.retry_after_s
        return ApiError(503, error.reason, code="engine_dead", retry_after_s=retry_after_s).response()

    @app.exception_handler(ClientGone)
    async def client_gone(_: Request, error: ClientGone) -> Response:
        return Response(status_code=CLIENT_CLOSED)

    @app.exception_handler(HTTPException)
    async def no_route(http: Request, error: HTTPException) -> Response:
        message = f"{http.method} {http.url.path}: {error.detail}"
        return ApiError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return ApiError(500, f"the server failed: {type(error).__name__}: {error}").response()


def package_version() -> str:
    """The version of ds_serve that is installed."""
    try:
        return version("ds_serve")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"
