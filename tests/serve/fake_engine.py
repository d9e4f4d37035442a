"""An engine process without a model: speaks the front's protocol and answers from a script.

Runs as a thread beside the tests (FakeEngine), or as a process of its own
(`python fake_engine.py FOLDER`), whose behaviour settings.json in FOLDER describes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import zmq

from ds_serve.messages import (
    Abort,
    EngineFailure,
    EngineInfo,
    FrontMessage,
    Output,
    Request,
    Shutdown,
    Stats,
    TokenLogprob,
    Unpin,
)

INFO = EngineInfo(
    model="fake", max_model_len=64, vocab_size=400, block_size=4, num_blocks=9, device="cpu", dtype="float32"
)


class FakeEngine(threading.Thread):
    """Gives each request the tokens of reply(request), one a step, then EOS (id 1) if max_tokens leaves room.

    refusal(request) may return an error text. step_s is the time of a step; hold stops all steps.
    """

    def __init__(self, folder, reply, *, refusal=lambda request: None, step_s=0.0, info=INFO):
        super().__init__(daemon=True)
        self.folder, self.reply, self.refusal, self.step_s, self.info = (
            Path(folder),
            reply,
            refusal,
            step_s,
            info,
        )
        self.requests: list[Request] = []
        self.aborted: list[str] = []
        self.unpinned: list[Unpin] = []
        self.hold = threading.Event()
        self._leaving: str | None = None
        self._open: dict[str, list[Output]] = {}

    def leave(self, reason: str) -> None:
        self._leaving = reason
        self.join(10)

    def run(self) -> None:
        context = zmq.Context()
        inbox, self._out = context.socket(zmq.PULL), context.socket(zmq.PUSH)
        inbox.connect(f"ipc://{self.folder / 'front.out'}")
        self._out.connect(f"ipc://{self.folder / 'front.in'}")
        self._send(self.info)
        decoder = msgspec.msgpack.Decoder(list[FrontMessage])
        while self._leaving is None:
            while inbox.poll(0 if self._open and not self.hold.is_set() else 5):
                for message in decoder.decode(inbox.recv()):
                    if isinstance(message, Shutdown):
                        return
                    self._take(message)
            if not self.hold.is_set():
                self._step()
        self._send(EngineFailure(reason=self._leaving))
        context.destroy(linger=1000)

    def _send(self, *messages) -> None:
        self._out.send(msgspec.msgpack.encode(messages))

    def _take(self, message) -> None:
        if isinstance(message, Request):
            self.requests.append(message)
            error = self.refusal(message)
            if error is None:
                self._open[message.id] = outputs(message, self.reply(message))
            else:
                self._send(Output(id=message.id, finish_reason="error", error=error))
        elif isinstance(message, Abort):
            self.aborted.append(message.id)
            if self._open.pop(message.id, None) is not None:
                self._send(Output(id=message.id, finish_reason="abort"))
        elif isinstance(message, Unpin):
            self.unpinned.append(message)
        else:
            self._send(self.stats())

    def stats(self) -> Stats:
        return Stats(
            num_running=len(self._open),
            num_finished=len(self.requests),
            num_pinned_blocks=3,
            cached_tokens=8,
            cached_tokens_host=5,
            load_s=0.25,
            stage_busy_s=[0.5],
        )

    def _step(self) -> None:
        if not self._open:
            return
        time.sleep(self.step_s)
        self._send(*[waiting.pop(0) for waiting in self._open.values()])
        self._open = {name: waiting for name, waiting in self._open.items() if waiting}


def outputs(request: Request, token_ids: list[int]) -> list[Output]:
    """One output a token; the last says why."""
    params = request.params
    tokens = [*token_ids, 1][: params.max_tokens]
    ended = tokens[-1] in params.end_token_ids
    result = []
    for index, token in enumerate(tokens):
        last = index == len(tokens) - 1
        logprobs = None
        if params.logprobs is not None:
            top = [token, 5][: params.logprobs]
            logprobs = [
                TokenLogprob(logprob=-0.5, top_ids=top, top_logprobs=[-0.5, float("-inf")][: len(top)])
            ]
        result.append(
            Output(
                id=request.id,
                token_ids=[token],
                logprobs=logprobs,
                finish_reason=None if not last else "stop" if ended else "length",
                stop_token_id=token if last and ended else None,
                prompt_logprobs=_prompt_logprobs(request) if index == 0 else None,
                num_prompt_tokens=len(request.prompt_token_ids),
                num_cached_tokens=2,
                num_host_tokens=1,
            )
        )
    return result


def _prompt_logprobs(request: Request) -> list[TokenLogprob] | None:
    """The n-th token's is -n, and the likeliest other is token 5."""
    count = request.params.prompt_logprobs
    if count is None:
        return None
    return [
        TokenLogprob(logprob=-float(n), top_ids=[5][:count], top_logprobs=[-0.25][:count])
        for n in range(1, len(request.prompt_token_ids))
    ]


def main(folder: Path) -> None:
    """Settings: journal (.left beside it: it left when asked to), life_s (None: until Shutdown), exit_code,
    reason, stubborn (deaf to SIGTERM and Shutdown), children, die_early, load_s."""
    settings = json.loads((folder / "settings.json").read_text())
    with open(settings["journal"], "a") as journal:
        print(os.getpid(), file=journal)
    if settings.get("die_early"):
        sys.exit(settings.get("exit_code", 1))
    for _ in range(settings.get("children", 0)):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        with open(settings["journal"], "a") as journal:
            print(child.pid, file=journal)
    if settings.get("stubborn"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(settings.get("load_s", 0))
    engine = FakeEngine(folder, lambda request: [30, 31, 32], step_s=settings.get("step_s", 0.0))
    engine.start()
    life_s = settings.get("life_s")
    if life_s is None:
        engine.join()
        if not settings.get("stubborn"):
            Path(settings["journal"]).with_suffix(".left").touch()
            return
        life_s = 600
    time.sleep(life_s)
    if settings.get("reason"):
        engine.leave(settings["reason"])
    os._exit(settings.get("exit_code", 1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
