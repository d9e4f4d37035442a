"""The supervisor with fake engine processes that die, ignore signals, or leave children."""

import asyncio
import json
import os
import signal
import stat
import sys
import time
from pathlib import Path

import fake_engine
import pytest

from ds_serve import launch
from ds_serve.messages import Request, SamplingParams
from ds_serve.server.client import EngineDeadError
from ds_serve.server.supervisor import RestartPolicy, Supervisor

QUICK = RestartPolicy(max_restarts=2, window_s=60, first_delay_s=0.05, max_delay_s=0.1)


@pytest.fixture
def supervised(tmp_path, monkeypatch):
    """supervised(test, **settings) runs test(supervisor) with an engine of these settings."""
    monkeypatch.setenv("PYTHONPATH", str(Path(fake_engine.__file__).parents[2]))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    journal = tmp_path / "journal"

    def run(test, policy=QUICK, grace_s=5.0, ranks=1, **settings):
        async def main():
            supervisor = Supervisor(
                json.dumps(settings | {"journal": str(journal)}),
                start=fake,
                ranks=ranks,
                policy=policy,
                grace_s=grace_s,
            )
            with pytest.raises(EngineDeadError, match="starting"):
                _ = supervisor.client
            await supervisor.start()
            try:
                await test(supervisor)
            finally:
                await supervisor.stop()

        asyncio.run(asyncio.wait_for(main(), 60))
        pids = [int(line) for line in journal.read_text().split()]
        until_gone(pids)
        assert list(tmp_path.glob("ds-serve-*")) == []
        return pids

    return run


def fake(arguments):
    return launch.Launch([sys.executable, fake_engine.__file__, *arguments], dict(os.environ))


def until_gone(pids):
    deadline = time.monotonic() + 5
    while any(running(pid) for pid in pids):
        assert time.monotonic() < deadline, f"left behind: {pids}"
        time.sleep(0.02)


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_policy_doubles_up_to_its_limit():
    policy = RestartPolicy(first_delay_s=1, max_delay_s=5)
    assert [policy.delay_s(n) for n in range(4)] == [1, 2, 4, 5]


def test_engine_and_its_children_go_on_stop(supervised, tmp_path):
    async def test(supervisor):
        assert await supervisor.wait_ready() == fake_engine.INFO
        (folder,) = tmp_path.glob("ds-serve-*")
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE((folder / "settings.json").stat().st_mode) == 0o600
        request = Request(id="a", prompt_token_ids=[5], params=SamplingParams(max_tokens=2))
        outputs = [output async for output in supervisor.client.generate(request)]
        assert outputs[-1].finish_reason == "length"

    assert len(supervised(test, children=2)) == 3


def test_an_engine_deaf_to_sigterm_is_killed(supervised):
    async def test(supervisor):
        await supervisor.wait_ready()

    supervised(test, stubborn=True, grace_s=0.3)


def test_stop_while_the_engine_loads(supervised, tmp_path):
    async def test(supervisor):
        while not (tmp_path / "journal").exists():
            await asyncio.sleep(0.01)

    supervised(test)


def test_dead_engine_is_started_again_until_the_limit(supervised):
    async def test(supervisor):
        await supervisor.wait_ready()
        client = supervisor.client
        assert await client.wait_dead() == "lost its device"
        with pytest.raises(EngineDeadError, match="lost its device"):
            _ = supervisor.client
        while not (supervisor._client is not None and supervisor._client.alive):
            await asyncio.sleep(0.01)
        assert supervisor.client is not client
        await supervisor.given_up.wait()
        assert supervisor.num_restarts == 2

    assert len(supervised(test, life_s=0.5, reason="lost its device")) == 3


def test_killed_engine_fails_open_requests_with_its_code(supervised):
    async def test(supervisor):
        await supervisor.wait_ready()
        request = Request(id="a", prompt_token_ids=[5], params=SamplingParams(max_tokens=9))
        with pytest.raises(EngineDeadError, match="code 7"):
            async for _ in supervisor.client.generate(request):
                pass

    supervised(test, life_s=0.6, exit_code=7, step_s=0.5)


def test_a_launcher_that_ends_without_a_word_means_rank_0(supervised):
    async def test(supervisor):
        await supervisor.wait_ready()
        assert await supervisor.client.wait_dead() == "rank 0 was killed by SIGKILL"

    supervised(test, ranks=2, life_s=0.3, exit_code=256 - signal.SIGKILL)


def test_ranks_that_end_while_they_load_are_not_called_rank_0(supervised):
    async def test(supervisor):
        with pytest.raises(EngineDeadError, match="^a rank ended with code 3$"):
            await supervisor.wait_ready()

    supervised(test, ranks=2, die_early=True, exit_code=3)


def test_an_engine_is_asked_to_end_before_it_is_told_by_signal(supervised, tmp_path):
    async def test(supervisor):
        await supervisor.wait_ready()

    supervised(test)
    assert (tmp_path / "journal.left").exists()


def test_an_engine_that_never_was_ready_is_not_started_again(supervised):
    async def test(supervisor):
        with pytest.raises(EngineDeadError, match="code 3"):
            await supervisor.wait_ready()
        assert supervisor.given_up.is_set()

    assert len(supervised(test, die_early=True, exit_code=3)) == 1


def test_a_command_that_cannot_start_is_given_up():
    async def main():
        supervisor = Supervisor("{}", start=lambda _: launch.Launch(["/nonexistent/python"], {}))
        await supervisor.start()
        with pytest.raises(EngineDeadError, match="nonexistent"):
            await supervisor.wait_ready()
        await supervisor.stop()

    asyncio.run(asyncio.wait_for(main(), 20))
