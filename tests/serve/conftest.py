import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def codec(tmp_path_factory):
    from fake_server import make_codec

    return make_codec(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def running(codec, tmp_path_factory):
    from fake_server import Server

    server = Server(codec, tmp_path_factory.mktemp("ipc"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def server(running):
    """The HTTP front over a fake engine that answers ANSWER, and has seen nothing yet."""
    running.reset()
    return running
