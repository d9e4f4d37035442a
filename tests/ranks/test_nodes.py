"""Two nodes, both of them this machine, serve one model without ssh."""

from __future__ import annotations

import pytest
from launch import free_port
from started import DS_SERVE, MAX_TOKENS, PROMPTS, Server, Started


@pytest.fixture
def node(tmp_path):
    """node(k): the flags of node k."""
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    port = free_port()
    return lambda index: (
        "--hostfile", hosts, "--no_ssh", "--node_rank", index, "--master_addr", "127.0.0.1",
        "--master_port", port,
    )  # fmt: skip


def test_two_nodes_serve_one_model(node, texts, tmp_path):
    command = (*DS_SERVE, "serve", "demo", "--dtype", "float32", "--pp", 2)
    with (
        Started(tmp_path / "second", *command, *node(1)) as second,
        Server(tmp_path / "first", *command, *node(0)) as first,
    ):
        assert [len(started.ranks()) for started in (first, second)] == [1, 1]
        assert [first.chat(prompt, MAX_TOKENS) for prompt in PROMPTS] == texts
        first.terminate()
        second.end(0)


def test_a_lost_node_ends_the_service_with_a_reason(node, tmp_path):
    """The front cannot start ranks of another node again: it ends, for whoever watches all nodes."""
    command = (*DS_SERVE, "serve", "demo", "--pp", 2)
    with (
        Started(tmp_path / "second", *command, *node(1)) as second,
        Server(tmp_path / "first", *command, *node(0)) as first,
    ):
        second.ranks()[1].kill()
        first.end(1)
        assert "rank 1 (stage 1, tensor 0): the process died" in first.err.read_text().splitlines()[-1]
        assert second.end() != 0
