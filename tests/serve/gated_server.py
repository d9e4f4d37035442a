"""The fake server as run.py serves it: behind the gate, with uvicorn's limits, under given settings."""

import json
import logging
from contextlib import contextmanager

from fake_server import Server, until

from ds_serve.config import Settings
from ds_serve.server.accesslog import RequestLog, access_log, prompt_log
from ds_serve.server.app import create_app
from ds_serve.server.keys import KeyRing
from ds_serve.server.run import uvicorn_config


class GatedServer(Server):
    def __init__(self, codec, folder, **settings):
        super().__init__(codec, folder)
        self.settings = Settings(model="fake", **settings)

    def config(self, front):
        self.app = create_app(front, self.settings, KeyRing.load(self.settings))
        return uvicorn_config(RequestLog(self.app), self.settings)


class Lines(logging.Handler):
    """What the access log and the prompts' log have written, parsed."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(json.loads(record.getMessage()))


@contextmanager
def logged():
    """The lines of both logs while it lasts; of prompts only where a test turns that on."""
    handler, loggers = Lines(), (access_log, prompt_log)
    for logger, level in zip(loggers, (logging.INFO, logging.CRITICAL), strict=True):
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    yield handler.lines
    for logger in loggers:
        logger.handlers, logger.propagate = [], True
        logger.setLevel(logging.NOTSET)


@contextmanager
def gated(codec, folder, **settings):
    """A running server under these settings."""
    server = GatedServer(codec, folder, **settings)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def line_of(lines, name):
    """The log's line of the request of this name; it is written when the client has its answer."""
    until(lambda: any(line["request_id"] == name for line in lines))
    return next(line for line in lines if line["request_id"] == name)
