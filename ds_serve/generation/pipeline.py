"""transformers' text-generation pipeline, run by the engine in the caller's own process.

    pipe = ds_serve.pipeline("text-generation", model=folder, max_num_seqs=32)
    pipe("Once", max_new_tokens=20, do_sample=False)          # [{"generated_text": "Once upon ..."}]
    for delta in pipe("Once", stream=True): ...               # text as it comes
    await pipe.agenerate(prompts), async for delta in pipe.astream("Once"): ...
    with pipe.prefill(system_prompt): pipe(...)               # a prefix that stays cached

Inputs, arguments, defaults and the shape of results are transformers'; what is not offered is
refused by name (args.py). It is a front: it knows text and requests, neither blocks nor tensors.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ds_serve.config import Settings
from ds_serve.generation.args import ENCODE, RETURN, check_names, config_fields, resolve_generate, return_type
from ds_serve.generation.handles import Prefill, PrefixHandle
from ds_serve.generation.run import Call, Event, GenerationError, Run, Sequence
from ds_serve.generation.text import Input, Texts
from ds_serve.launch import check_world, ranks
from ds_serve.messages import Output
from ds_serve.text.codec import TextCodec

__all__ = ["GenerationError", "PrefixHandle", "TextGenerationPipeline", "pipeline"]

MAX_INPUTS_IN_FLIGHT = 512  # keeps a long list from filling the engine's queue
PROGRESS_FROM = 8  # prompts, on a terminal


def pipeline(
    task: str = "text-generation", model: str | Path | None = None, **arguments: Any
) -> TextGenerationPipeline:
    """A TextGenerationPipeline for the model in a local folder.

    arguments are engine settings (ds_serve.config.Settings) and defaults for the calls
    (max_new_tokens=20, say). With tensor_parallel or pipeline_parallel the script runs under the deepspeed
    launcher: rank 0 gets the pipeline, the other ranks work for it in here and never return.
    Raises ValueError for another task, TypeError for an unknown name, and what loading the model raises.
    """
    if task != "text-generation":
        raise ValueError(f"task: only 'text-generation' is served, got {task!r}")
    if model is None:
        raise ValueError("model: must be the folder of a Hugging Face model")
    settings = {name: arguments.pop(name) for name in arguments.keys() & Settings.model_fields.keys()}
    check_names(arguments)
    if "dtype" in settings:
        settings["dtype"] = str(settings["dtype"]).removeprefix("torch.")
    settings = Settings.load(model=str(model), **settings)
    _follow_rank_0(settings)
    codec = TextCodec(settings.model, trust_remote_code=settings.trust_remote_code)
    generation = _model_generation(settings)

    from ds_serve.rank import build_local_engine  # torch and DeepSpeed: only where an engine is built

    engine = build_local_engine(settings)
    limit = min(MAX_INPUTS_IN_FLIGHT, settings.max_queue)
    return TextGenerationPipeline(engine, codec.tokenizer, generation, arguments, max_inputs=limit)


class TextGenerationPipeline:
    """Calls like transformers' own. engine is a LocalEngine (or anything with its methods).

    generation is the model's generation config as plain fields, defaults the arguments of every
    call. Several threads and event loops may call at once. close() ends the engine.
    """

    def __init__(
        self,
        engine: Any,
        tokenizer: Any,
        generation: Mapping[str, Any],
        defaults: Mapping[str, Any] | None = None,
        max_inputs: int = MAX_INPUTS_IN_FLIGHT,
    ):
        self.engine = engine
        self.tokenizer = tokenizer
        self._model_fields = config_fields(generation)
        self._defaults = dict(defaults or {})
        self._max_inputs = max_inputs
        self._texts = Texts(tokenizer)
        self._closed = False
        check_names(self._defaults)
        self._plain = self._resolve({})

    def __call__(self, text_inputs: Any, **arguments: Any) -> Any:
        """Continues a string, a list of strings, a chat (a list of dicts) or a list of chats.

        Returns a list of records for one input, a list of such lists for several, and a lazy
        iterator of them for a generator. A record is {"generated_text": str or chat}, or
        {"generated_token_ids": list} with return_tensors=True; logprobs=N adds "logprobs".
        With stream=True, an iterator of text deltas for one input, of (index, delta) for several;
        joined, the deltas are the generated_text of return_full_text=False.
        Raises ValueError or TypeError naming a bad argument, GenerationError if the engine fails.
        """
        call = self._resolve(arguments)
        inputs, single = self._texts.inputs(text_inputs)
        if call.stream:
            return self._stream(inputs, call, single)
        records = self._records(inputs, call)
        if single:
            [result] = records
            return result
        if isinstance(inputs, list):
            return list(_with_progress(records, len(inputs), call.progress))
        return records

    async def agenerate(self, text_inputs: Any, **arguments: Any) -> Any:
        """As a call, without blocking the event loop; a generator's results come as a list too."""
        call = self._resolve(arguments)
        if call.stream:
            raise ValueError("stream: use astream for an asynchronous stream")
        inputs, single = self._texts.inputs(text_inputs)
        done: dict[int, list] = {}
        async with contextlib.aclosing(self._run_async(inputs, call)) as events:
            async for index, _, records in events:
                if records is not None:
                    done[index] = records
        results = [done[index] for index in sorted(done)]
        return results[0] if single else results

    async def astream(self, text_inputs: Any, **arguments: Any) -> AsyncIterator[Any]:
        """The deltas of a call with stream=True, asynchronously."""
        call = self._resolve({**arguments, "stream": True})
        inputs, single = self._texts.inputs(text_inputs)
        async with contextlib.aclosing(self._run_async(inputs, call)) as events:
            async for index, delta, _ in events:
                if delta:
                    yield delta if single else (index, delta)

    def prefill(
        self,
        prompt: Any,
        *,
        ttl: float = 300.0,
        pin: bool = True,
        salt: str | None = None,
        adapter: str | None = None,
        **arguments: Any,
    ) -> PrefixHandle:
        """Computes a prompt's KV before the calls that begin with it, and keeps it on the device.

        prompt is a string, or a chat's first messages (a system prompt, a document): a call with these and
        more messages after them is then computed from there on. Only full KV blocks are kept, so of n tokens
        the last n % block_size are not; and of a string that goes on in the middle of a word the last tokens
        may differ. With pin=True they stay for ttl seconds or until the handle is released, unless a request
        fits only without them; with pin=False they are cached like any prompt. salt stands for the calls'
        cache_salt and adapter for theirs: calls with others do not find them. arguments are those of a call
        that change its prompt (tools, prefix, ...).
        Raises ValueError or TypeError naming a bad argument, ValueError for a prompt that leaves the model's
        context no room, GenerationError, in the engine's words, where pins would exceed max_pinned_share.
        """
        prefill = self._prefill(prompt, ttl, pin, salt, adapter, arguments)
        arrived: queue.SimpleQueue[Output] = queue.SimpleQueue()
        with prefill.running(arrived.put):
            return prefill.handle(arrived.get())

    async def aprefill(
        self,
        prompt: Any,
        *,
        ttl: float = 300.0,
        pin: bool = True,
        salt: str | None = None,
        adapter: str | None = None,
        **arguments: Any,
    ) -> PrefixHandle:
        """As prefill, without blocking the event loop. Cancelled, it leaves nothing pinned."""
        prefill = self._prefill(prompt, ttl, pin, salt, adapter, arguments)
        arrived: asyncio.Queue[Output] = asyncio.Queue()
        with prefill.running(_onto_loop(arrived.put_nowait)):
            return prefill.handle(await arrived.get())

    def close(self) -> None:
        """Ends the engine; open calls end with an error. May be called again."""
        if not self._closed:
            self._closed = True
            self.engine.close()

    def __enter__(self) -> TextGenerationPipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # __init__ may have failed; the interpreter may be ending; or this is the engine's own thread.
        if not getattr(self, "_closed", True) and not sys.is_finalizing():
            with contextlib.suppress(RuntimeError):
                self.close()

    # -- one call ------------------------------------------------------------------------------

    def _resolve(self, arguments: Mapping[str, Any]) -> Call:
        check_names(arguments)
        generate = resolve_generate(
            arguments, self._defaults, self._model_fields, self.tokenizer.pad_token_id
        )
        merged = {**self._defaults, **arguments}
        output = {name: merged[name] for name in RETURN & merged.keys()}
        call = Call(
            generate=generate,
            encode=self._encoding(merged),
            returns=return_type(output),
            skip_special_tokens=output.get("skip_special_tokens") is not False,
            clean_up=output.get("clean_up_tokenization_spaces"),
            stream=bool(merged.get("stream")),
            streamer=merged.get("streamer"),
            progress=merged.get("progress"),
            max_inputs=_max_inputs(merged, self._max_inputs),
        )
        call.check()
        vocabulary = self.engine.info.vocab_size
        beyond = [token for token in generate.own.get("logit_bias") or {} if not 0 <= int(token) < vocabulary]
        if beyond:
            raise ValueError(f"logit_bias: token ids {beyond} are outside the vocabulary of {vocabulary}")
        self._check_adapter(generate.own.get("adapter") or "")
        return call

    def _encoding(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        encode = {name: arguments[name] for name in ENCODE & arguments.keys() if arguments[name] is not None}
        self._texts.check(encode)
        return encode

    def _prefill(
        self,
        prompt: Any,
        ttl: float,
        pin: bool,
        salt: str | None,
        adapter: str | None,
        arguments: Mapping[str, Any],
    ) -> Prefill:
        unknown = sorted(arguments.keys() - ENCODE)
        if unknown:
            raise TypeError(
                f"prefill: {unknown[0]} is no argument; ttl, pin, salt, adapter and what changes a prompt are"
            )
        inputs, single = self._texts.inputs(prompt)
        if not single:
            raise ValueError("prompt: prefill takes one prompt or one chat; call it for each")
        [value] = inputs
        generate = self._plain.generate
        encoded = self._texts.encode(
            value, self._encoding({**self._defaults, **arguments}), generate, answer=False
        )
        if salt is None:
            salt = generate.own.get("cache_salt") or ""
        if adapter is None:
            adapter = generate.own.get("adapter") or ""
        self._check_adapter(adapter)
        return Prefill.of(
            self.engine,
            encoded.token_ids,
            ttl=ttl,
            pin=pin,
            salt=salt,
            priority=generate.own.get("priority") or 0,
            adapter=adapter,
        )

    def _check_adapter(self, name: str) -> None:
        known = self.engine.info.adapters
        if name and name not in known:
            raise ValueError(f"adapter: {name!r} is not loaded; loaded: {', '.join(known) or 'none'}")

    def _records(self, inputs: Iterable[Input], call: Call) -> Iterator[list[dict[str, Any]]]:
        """Each input's records, in the order of the inputs."""
        done: dict[int, list] = {}
        following = 0
        # closing: who stops listening ends what is open, now and not when the collector comes by.
        with contextlib.closing(self._run(inputs, call)) as events:
            for index, _, records in events:
                if records is not None:
                    done[index] = records
                while following in done:
                    yield done.pop(following)
                    following += 1

    def _stream(self, inputs: Iterable[Input], call: Call, single: bool) -> Iterator[Any]:
        with contextlib.closing(self._run(inputs, call)) as events:
            for index, delta, _ in events:
                if delta:
                    yield delta if single else (index, delta)

    def _run(self, inputs: Iterable[Input], call: Call) -> Iterator[Event]:
        arrived: queue.SimpleQueue[tuple[Sequence, Output]] = queue.SimpleQueue()
        run = Run(self.engine, self._texts, call, inputs, lambda *item: arrived.put(item))
        try:
            while run.fill():
                yield run.take(*arrived.get())
        finally:
            run.abort()

    async def _run_async(self, inputs: Iterable[Input], call: Call) -> AsyncIterator[Event]:
        arrived: asyncio.Queue[tuple[Sequence, Output]] = asyncio.Queue()
        emit = _onto_loop(arrived.put_nowait)
        run = Run(self.engine, self._texts, call, inputs, lambda *item: emit(item))
        try:
            while run.fill():
                yield run.take(*(await arrived.get()))
        finally:
            run.abort()


def _onto_loop(put: Callable[[Any], None]) -> Callable[[Any], None]:
    """put, to be called from another thread: it runs on the event loop, or not at all once that is closed."""
    loop = asyncio.get_running_loop()

    def emit(item: Any) -> None:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(put, item)

    return emit


def _follow_rank_0(settings: Settings) -> None:
    """On other ranks of a launch than the first: works for rank 0 until its process is done, then exits."""
    rank_env = ranks()
    check_world(settings, rank_env)
    if rank_env is not None and rank_env.rank > 0:
        from ds_serve.rank import follow

        sys.exit(follow())


def _max_inputs(arguments: Mapping[str, Any], limit: int) -> int:
    """Inputs in the engine at a time: batch_size where given, one where a streamer must not be mixed up."""
    if arguments.get("num_workers"):
        raise ValueError("num_workers: must be 0, encoding has no workers of its own")
    size = arguments.get("batch_size")
    if size is not None and (not isinstance(size, int) or size < 1):
        raise ValueError(f"batch_size: must be at least 1, got {size!r}")
    return 1 if arguments.get("streamer") is not None else min(size or limit, limit)


def _with_progress(records: Iterable[Any], total: int, progress: bool | None) -> Iterable[Any]:
    if progress or (progress is None and total > PROGRESS_FROM and sys.stderr.isatty()):
        from tqdm.auto import tqdm

        return tqdm(records, total=total, unit="prompt")
    return records


def _model_generation(settings: Settings) -> dict[str, Any]:
    """The model's generation config as transformers would load it, as plain fields."""
    from transformers import AutoConfig, GenerationConfig

    if (Path(settings.model) / "generation_config.json").is_file():
        config = GenerationConfig.from_pretrained(settings.model, local_files_only=True)
    else:
        config = GenerationConfig.from_model_config(
            AutoConfig.from_pretrained(
                settings.model, local_files_only=True, trust_remote_code=settings.trust_remote_code
            )
        )
    return config.to_diff_dict()
