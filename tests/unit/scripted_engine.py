"""A stand-in for LocalEngine that answers from a script, and a pipeline over it: no model, no torch."""

from __future__ import annotations

import threading

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ds_serve.generation.pipeline import TextGenerationPipeline
from ds_serve.messages import EngineInfo, Output, Request, TokenLogprob

EOS = 2
ANSWER = "hello big world"
CHAT = [{"role": "user", "content": "hi"}]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, id 3 + its code point below 128; <s> 0, <pad> 1, </s> 2."""
    vocab = {"<s>": 0, "<pad>": 1, "</s>": EOS} | {chr(c): 3 + c for c in range(128)}
    core = Tokenizer(models.BPE(vocab, []))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", pad_token="<pad>", eos_token="</s>", model_max_length=64
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}{% if not loop.last %};{% endif %}"
        "{% endfor %}{% if add_generation_prompt %};a:{% endif %}"
    )
    return tokenizer


def ids_of(text: str) -> list[int]:
    return [3 + ord(character) for character in text]


class ScriptedEngine:
    """Answers every request on a thread, `size` tokens an Output, with a text chosen by script(request)."""

    def __init__(self, script=lambda request: ANSWER, size: int = 2, hold: bool = False):
        self.info = EngineInfo(
            model="m",
            max_model_len=100,
            vocab_size=131,
            block_size=16,
            num_blocks=9,
            device="cpu",
            dtype="float32",
        )
        self.script, self.size = script, size
        self.requests: list[Request] = []
        self.aborted: list[str] = []
        self.unpinned: list[tuple[str, str]] = []
        self.closed = 0
        self.released = threading.Event()
        if not hold:
            self.released.set()

    def submit(self, request, on_output):
        self.requests.append(request)
        threading.Thread(target=self._answer, args=(request, on_output), daemon=True).start()

    def _answer(self, request, on_output):
        self.released.wait(5)
        text = self.script(request)
        if isinstance(text, Exception):
            on_output(Output(id=request.id, finish_reason="error", error=str(text)))
            return
        ids = (ids_of(text) + list(request.params.eos_token_ids))[: request.params.max_tokens]
        for start in range(0, len(ids), self.size):
            part = ids[start : start + self.size]
            last = start + self.size >= len(ids)
            logprobs = [TokenLogprob(logprob=-0.5, top_ids=[token], top_logprobs=[-0.5]) for token in part]
            on_output(
                Output(
                    id=request.id,
                    token_ids=part,
                    logprobs=logprobs if request.params.logprobs is not None else None,
                    num_cached_tokens=7,
                    finish_reason=("stop" if part[-1] == EOS else "length") if last else None,
                )
            )

    def abort(self, request_id):
        self.aborted.append(request_id)

    def unpin(self, cache_key, salt=""):
        self.unpinned.append((cache_key, salt))

    def close(self):
        self.closed += 1


def make_pipe(engine=None, generation=None, **defaults) -> TextGenerationPipeline:
    config = {"eos_token_id": EOS, "bos_token_id": 0} if generation is None else generation
    return TextGenerationPipeline(engine or ScriptedEngine(), make_tokenizer(), config, defaults)
