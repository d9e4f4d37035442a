"""The engine client against a fake engine: outputs, aborts, slow readers, death."""

import asyncio
from contextlib import aclosing

import pytest
from fake_engine import INFO, FakeEngine

from ds_serve.messages import Request, SamplingParams
from ds_serve.server.client import EngineClient, EngineDeadError, RequestTimeout

TOKENS = [10, 11, 12, 13]


def request(name, **params):
    params = {"max_tokens": 16, "eos_token_ids": (1,)} | params
    return Request(id=name, prompt_token_ids=[7, 8], params=SamplingParams(**params))


def with_engine(test, tmp_path, **options):
    """Runs test(client, engine) on a loop of its own."""

    async def main():
        client = EngineClient(tmp_path)
        await client.start()
        engine = FakeEngine(tmp_path, options.pop("reply", lambda request: TOKENS), **options)
        engine.start()
        try:
            assert not client.alive
            assert await client.wait_ready() == INFO
            await test(client, engine)
        finally:
            engine.leave("test over")
            await client.close()

    asyncio.run(asyncio.wait_for(main(), 30))


async def until(condition):
    while not condition():
        await asyncio.sleep(0.005)


def test_outputs_come_in_order_and_end_once(tmp_path):
    async def test(client, engine):
        async def run(name):
            return [output async for output in client.generate(request(name))]

        for outputs in await asyncio.gather(*(run(f"r{i}") for i in range(20))):
            assert [t for output in outputs for t in output.token_ids] == [*TOKENS, 1]
            assert [output.finish_reason for output in outputs if output.finish_reason] == ["stop"]
        assert engine.aborted == []
        assert (await client.stats()).num_finished == 20

    with_engine(test, tmp_path)


def test_leaving_early_aborts(tmp_path):
    async def test(client, engine):
        async with aclosing(client.generate(request("left"))) as outputs:
            async for _ in outputs:
                break
        task = asyncio.create_task(anext(client.generate(request("cancelled", min_tokens=1))))
        engine.hold.set()
        await until(lambda: len(engine.requests) == 2)
        task.cancel()
        await until(lambda: engine.aborted == ["left", "cancelled"])

    with_engine(test, tmp_path, step_s=0.05)


def test_abort_of_one_of_several_ends_only_that_one(tmp_path):
    async def test(client, engine):
        engine.hold.set()
        ended = []

        async def run():
            async for index, output in client.generate_all([request("a"), request("b")]):
                if output.finish_reason:
                    ended.append((index, output.finish_reason))

        task = asyncio.create_task(run())
        await until(lambda: len(engine.requests) == 2)
        await client.abort("a")
        await client.abort("nobody")
        engine.hold.clear()
        await task
        assert ended == [(1, "stop")] and engine.aborted == ["a"]

    with_engine(test, tmp_path)


def test_unread_outputs_are_merged_and_hold_up_nobody(tmp_path):
    async def test(client, engine):
        slow = client.generate(request("slow", logprobs=1))
        first = await anext(slow)
        quick = [output async for output in client.generate(request("quick"))]
        assert quick[-1].finish_reason == "stop"
        rest = [output async for output in slow]
        assert first.token_ids + [t for output in rest for t in output.token_ids] == [*TOKENS, 1]
        assert len(rest) == 1 and len(rest[0].logprobs) == len(rest[0].token_ids)
        assert rest[0].num_cached_tokens == 2 and rest[0].stop_token_id == 1

    with_engine(test, tmp_path, step_s=0.01)


def test_an_id_in_use_is_refused(tmp_path):
    async def test(client, engine):
        engine.hold.set()
        task = asyncio.create_task(anext(client.generate(request("same"))))
        await until(lambda: engine.requests)
        with pytest.raises(ValueError, match="open already"):
            await anext(client.generate(request("same")))
        task.cancel()

    with_engine(test, tmp_path)


def test_death_reaches_every_waiter(tmp_path):
    async def test(client, engine):
        engine.hold.set()
        tasks = [asyncio.create_task(anext(client.generate(request(f"r{i}")))) for i in range(3)]
        await until(lambda: len(engine.requests) == 3)
        engine._leaving = "out of memory"
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, EngineDeadError) and result.reason == "out of memory"
        assert not client.alive and await client.wait_dead() == "out of memory"
        with pytest.raises(EngineDeadError, match="out of memory"):
            await client.stats()
        with pytest.raises(EngineDeadError, match="out of memory"):
            await anext(client.generate(request("late")))

    with_engine(test, tmp_path)


def test_stats_in_flight_end_with_the_engine(tmp_path):
    async def main():
        client = EngineClient(tmp_path)
        await client.start()
        waiting = asyncio.create_task(client.stats())
        await asyncio.sleep(0)
        client.fail("gone")
        with pytest.raises(EngineDeadError, match="gone"):
            await waiting
        await client.close()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_others_of_a_group_follow_the_firsts_first_output(tmp_path):
    async def test(client, engine):
        requests = [request(f"r{i}", max_tokens=3) for i in range(6)]
        ends = []
        async for index, output in client.generate_all(requests, group=3):
            if output.finish_reason:
                ends.append(index)
        assert sorted(ends) == list(range(6))
        assert [each.id for each in engine.requests[:2]] == ["r0", "r3"]

    with_engine(test, tmp_path)


def test_who_was_not_sent_yet_is_not_aborted(tmp_path):
    async def test(client, engine):
        engine.hold.set()
        outputs = client.generate_all([request(f"r{i}") for i in range(4)], group=2)
        task = asyncio.ensure_future(anext(outputs))
        await until(lambda: len(engine.requests) == 2)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        engine.hold.clear()
        await until(lambda: len(engine.aborted) == 2)
        assert sorted(engine.aborted) == ["r0", "r2"]

    with_engine(test, tmp_path)


def test_time_over_aborts(tmp_path):
    async def test(client, engine):
        engine.hold.set()
        with pytest.raises(RequestTimeout):
            async for _ in client.generate_all([request("slow")], timeout_s=0.05):
                raise AssertionError("an output while the engine holds")
        await until(lambda: engine.aborted == ["slow"])
        engine.hold.clear()
        outputs = [output async for _, output in client.generate_all([request("fast")], timeout_s=30)]
        assert outputs[-1].finish_reason == "stop"

    with_engine(test, tmp_path)
