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


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """A real server on the demo model, for tests that leave it as it was."""
    from real_server import Server

    started = Server(tmp_path_factory.mktemp("real") / "log")
    yield started
    started.stop()
