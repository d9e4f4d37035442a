"""One real server on the demo model for all clients, and no way out of this machine.

Two requests run at a time and two wait, so that a client can meet a full queue.
"""

import os
import socket
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "ranks")]


# Read when the clients are imported: they report nothing anywhere, and take no key or address of the user.
for name in [name for name in os.environ if name.startswith(("OPENAI_", "LANGCHAIN_", "LANGSMITH_"))]:
    del os.environ[name]
os.environ |= {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_MODE": "PRODUCTION",
    "LANGSMITH_TRACING": "false",
    "DO_NOT_TRACK": "1",
    "NO_PROXY": "127.0.0.1",
}


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A started.Server whose key is KEY; its end is clean."""
    from asked import KEY, MAX_RUNNING, MAX_WAITING
    from started import DS_SERVE, Server

    folder = tmp_path_factory.mktemp("clients")
    keys = folder / "keys"
    keys.write_text(f"# of the tests\n{KEY}\n")
    command = (
        *DS_SERVE, "serve", "demo", "--dtype", "float32", "--num-blocks", 512, "--api-key-file", keys,
        "--max-num-seqs", MAX_RUNNING, "--max-queue", MAX_WAITING,
    )  # fmt: skip
    with Server(folder / "server", *command) as running:
        yield running
        running.terminate()


@pytest.fixture(scope="session")
def base_url(server):
    return f"{server.url}/v1"


@pytest.fixture(autouse=True)
def only_this_machine(monkeypatch):
    """Fails whatever connects to another machine."""
    connect = socket.socket.connect

    def connect_here(self, address):
        here = self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "localhost", "::1")
        assert here, f"a client wants to talk to {address}"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_here)
