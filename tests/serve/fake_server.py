"""The HTTP front over a FakeEngine: a real uvicorn and a small tokenizer, without a model.

conftest.py makes a fixture of it; the tests of the routes use that.
"""

import asyncio
import contextlib
import threading
import time
from types import SimpleNamespace

import httpx
import openai
import uvicorn
from fake_engine import FakeEngine
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ds_serve.server.app import create_app
from ds_serve.server.client import EngineClient
from ds_serve.server.front import Front
from ds_serve.server.run import _listen
from ds_serve.text.codec import TextCodec
from ds_serve.text.defaults import GenerationDefaults

ANSWER = "hello there, 🙂 world"
HELLO = [{"role": "user", "content": "hello"}]


def make_codec(path):
    """A byte-level tokenizer of at most 300 ids, saved in the folder path, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["hello world, hello there"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}"
        "{{ mood }}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    fast.save_pretrained(path)
    return TextCodec(path)


class Server:
    """uvicorn, client and fake engine; the first two on a loop in a thread of their own."""

    def __init__(self, codec, folder):
        self.codec, self.folder = codec, folder
        self.defaults = GenerationDefaults(eos_token_ids=(1,), temperature=0.7, top_k=20)
        self.engine = FakeEngine(
            folder, lambda request: self.reply(request), refusal=lambda r: self.refusal(r)
        )
        self._up, self._down = threading.Event(), None
        self.reset()

    def reset(self):
        self.reply = lambda request: self.codec.encode(ANSWER)
        self.refusal = lambda request: None
        self.engine.requests.clear()
        self.engine.aborted.clear()
        self.engine.unpinned.clear()
        self.engine.hold.clear()
        self.engine.step_s = 0.0

    def start(self):
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self._thread.start()
        assert self._up.wait(20)
        self.openai = openai.OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0, timeout=20)
        self.http = httpx.Client(base_url=self.url, timeout=20)

    def stop(self):
        self.engine.leave("test over")
        self._down()
        self._thread.join(10)

    def config(self, front):
        """What uvicorn serves, and how."""
        return uvicorn.Config(create_app(front), log_level="warning", lifespan="off")

    async def _main(self):
        client = EngineClient(self.folder)
        await client.start()
        self.engine.start()
        await client.wait_ready()
        self.front = front = Front("fake", self.defaults, Backend(client), created=1, codec=self.codec)
        socket = _listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{socket.getsockname()[1]}"
        server = uvicorn.Server(self.config(front))
        server.capture_signals = contextlib.nullcontext
        loop = asyncio.get_running_loop()
        self._down = lambda: loop.call_soon_threadsafe(setattr, server, "should_exit", True)
        self._up.set()
        await server.serve(sockets=[socket])
        await client.close()

    def post(self, route, **body):
        return self.http.post(f"/v1/{route}", json={"model": "fake"} | body)

    def chat(self, **body):
        return self.openai.chat.completions.create(**({"model": "fake", "messages": HELLO} | body))


class Backend:
    retry_after_s = 7
    num_restarts = 0

    def __init__(self, client):
        self._client = client

    @property
    def client(self):
        self._client.check()
        return self._client


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def error_of(response):
    return response.status_code, SimpleNamespace(**response.json()["error"])
