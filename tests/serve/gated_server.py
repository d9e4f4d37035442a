"""The fake server as run.py serves it: behind the gate, with uvicorn's limits, under given settings."""

from contextlib import contextmanager

from fake_server import Server

from ds_serve.config import Settings
from ds_serve.server.accesslog import RequestLog
from ds_serve.server.app import create_app
from ds_serve.server.keys import KeyRing
from ds_serve.server.run import uvicorn_config


class GatedServer(Server):
    def __init__(self, codec, folder, **settings):
        super().__init__(codec, folder)
        self.settings = Settings(model="fake", **settings)

    def config(self, front):
        app = create_app(front, self.settings, KeyRing.load(self.settings))
        return uvicorn_config(RequestLog(app), self.settings)


@contextmanager
def gated(codec, folder, **settings):
    """A running server under these settings."""
    server = GatedServer(codec, folder, **settings)
    server.start()
    try:
        yield server
    finally:
        server.stop()
