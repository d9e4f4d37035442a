"""The scheduler's rules for copies between device and host, one by one, with simulated ranks."""

from __future__ import annotations

import pytest
from simulated import Tiers, expected_output, make_request

from ds_serve.engine.copies import CopyBook
from ds_serve.messages import CopyResult

A = [1] * 5 + [11] * 16  # five full blocks, and a token that must be computed


def test_an_evicted_prefix_comes_back_and_rows_wait_for_it():
    tiers = Tiers()
    tiers.wash(A)
    request = make_request("a", A, 3)
    tiers.add(request)
    plan = tiers.plan()
    assert (len(plan.loads), plan.rows, plan.new) == (5, [], [])
    assert tiers.scheduler.num_in_flight == 0 and tiers.scheduler.num_copying == 1
    assert tiers.plan() is None
    tiers.copy("load")
    plan = tiers.plan()
    assert [(row.start, row.count, len(row.new_block_ids)) for row in plan.rows] == [(20, 1, 6)]
    assert plan.new[0].token_ids == A
    tiers.run()
    assert tiers.tokens("a") == expected_output(request)
    last = tiers.outputs["a"][-1]
    assert (last.num_cached_tokens, last.num_host_tokens) == (20, 20)
    stats = tiers.scheduler.stats()
    assert (stats.loaded_blocks, stats.cached_tokens_host, stats.num_loads, stats.load_s) == (5, 20, 1, 0.5)
    assert stats.stored_blocks and stats.evictions and not stats.lost_blocks


def test_half_from_the_device_and_half_from_the_host():
    tiers = Tiers()
    tiers.wash(A)
    tiers.add(make_request("half", A[:9], 1))  # brings two blocks back
    tiers.run()
    tiers.add(make_request("a", A, 2))
    assert len(tiers.plan().loads) == 3
    tiers.run()
    last = tiers.outputs["a"][-1]
    assert (last.num_cached_tokens, last.num_host_tokens) == (20, 12)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_nothing_is_there_before_every_rank_has_it(order):
    tiers = Tiers(num_ranks=3)
    tiers.wash(A)
    tiers.add(make_request("a", A, 1))
    tiers.plan()
    for rank in order:
        assert tiers.plan() is None
        tiers.copy("load", [rank])
    assert [row.start for row in tiers.plan().rows] == [20]


def test_a_stored_block_is_found_only_when_every_rank_has_stored_it():
    tiers = Tiers(num_ranks=2)
    tiers.add(make_request("first", A, 1))
    tiers.plan()
    tiers.land()
    assert tiers.plan().stores
    tiers.copy("store", [0])
    table = tiers.cache.new_table()
    assert not tiers.cache.match(table, A).host and tiers.scheduler.stats().num_host_used == 5
    assert tiers.scheduler.stats().stored_blocks == 0
    tiers.copy("store", [1])
    assert tiers.scheduler.stats().stored_blocks == 5


def test_others_run_while_a_prefix_is_loaded():
    tiers = Tiers()
    tiers.wash(A)
    tiers.add(make_request("a", A, 2), make_request("b", [5, 6, 7], 3))
    plan = tiers.plan()
    assert plan.loads and [row.count for row in plan.rows] == [3]
    for _ in range(2):
        tiers.land()
        assert len(tiers.plan().rows) == 1
    tiers.copy()
    tiers.run()
    assert tiers.tokens("b") == expected_output(make_request("b", [5, 6, 7], 3))
    assert tiers.tokens("a") == expected_output(make_request("a", A, 2))


def test_a_failed_load_is_computed_from_the_first_lost_block_on():
    tiers = Tiers(num_ranks=2)
    tiers.wash(A)
    used = tiers.scheduler.stats().num_host_used
    request = make_request("a", A, 3)
    tiers.add(request)
    tiers.plan()
    tiers.copy("load", [0])
    tiers.copy("load", [1], failed=[2])
    assert tiers.scheduler.stats().num_host_used == used - 1
    assert [(row.start, row.count) for row in tiers.plan().rows] == [(8, 13)]
    tiers.run()
    assert tiers.tokens("a") == expected_output(request)
    last, stats = tiers.outputs["a"][-1], tiers.scheduler.stats()
    assert (last.num_cached_tokens, last.num_host_tokens) == (8, 8)
    assert (stats.cached_tokens_host, stats.failed_copies) == (8, 1)


@pytest.mark.parametrize("failed", [[], [0]])
def test_abort_while_loading_keeps_slot_and_blocks_until_every_rank_is_done(failed):
    tiers = Tiers(num_ranks=2)
    tiers.wash(A)
    tiers.add(make_request("a", A, 3))
    tiers.plan()
    free = tiers.cache.pool.num_free
    assert tiers.scheduler.abort("a").finish_reason == "abort"
    assert tiers.scheduler.abort("a") is None and not tiers.scheduler.num_open
    tiers.copy("load", [1], failed)
    assert tiers.cache.pool.num_free == free and tiers.scheduler.num_copying == 1
    tiers.copy("load", [0])
    tiers.run()
    assert tiers.cache.pool.num_free == tiers.cache.num_blocks
    assert tiers.scheduler.stats().cached_tokens == 0, "it got on not one token"


def test_a_loading_victim_is_drained_and_loads_again_later():
    tiers = Tiers()
    tiers.wash(A)
    first, second = make_request("first", [7] * 17, 24), make_request("a", A, 2)
    tiers.add(first)
    tiers.plan()
    tiers.land()
    tiers.add(second)
    assert tiers.plan().loads
    victim = tiers.scheduler.books.sequences["a"]
    while not victim.draining:  # its ranks take their time
        tiers.land()
        tiers.plan()
    assert tiers.plan() is None and tiers.scheduler.stats().num_preemptions == 0
    tiers.copy("load")
    assert len(tiers.plan().rows) == 1 and tiers.scheduler.stats().num_preemptions == 1
    assert tiers.slots() == {"first"}
    tiers.run()
    assert tiers.tokens("first") == expected_output(first) and tiers.tokens("a") == expected_output(second)
    assert tiers.outputs["a"][-1].num_cached_tokens == 20


def test_one_that_needs_what_is_being_loaded_waits_and_those_behind_it_do_not():
    tiers = Tiers()
    tiers.wash(A)
    tiers.add(
        *(make_request(name, prompt, 2) for name, prompt in (("a", A), ("same", A), ("other", [5] * 3)))
    )
    plan = tiers.plan()
    assert len(plan.loads) == 5 and [row.count for row in plan.rows] == [3]
    assert tiers.slots() == {"a", "other"}
    tiers.land()
    tiers.plan()
    assert tiers.slots() == {"a", "other"}
    tiers.copy("load")
    tiers.plan()
    assert "same" in tiers.slots()
    tiers.run()
    assert tiers.outputs["same"][-1].num_cached_tokens == 20
    assert tiers.outputs["same"][-1].num_host_tokens == 0, "it shares the blocks on the device"
    assert tiers.scheduler.stats().loaded_blocks == 5


@pytest.mark.parametrize(
    ("copy_s", "prefill_s", "is_loaded"),
    [(0.0, 0.1, True), (0.1, 0.0, True), (0.39, 0.1, True), (0.41, 0.1, False)],
)
def test_what_is_faster_computed_is_not_loaded(copy_s, prefill_s, is_loaded):
    tiers = Tiers(copy_s_per_block=copy_s, prefill_s_per_token=prefill_s)
    tiers.wash(A)
    tiers.add(make_request("a", A, 1))
    assert bool(tiers.plan().loads) == is_loaded
    tiers.run()
    assert tiers.outputs["a"][-1].num_host_tokens == 20 * is_loaded


def test_loading_requests_do_not_lock_out_running_prefills():
    """Loads hold blocks without progress: they are admitted only beside what a running prompt still lacks."""
    tiers = Tiers(num_blocks=14, max_num_batched_tokens=8)
    tiers.wash(A)
    long = make_request("long", [8] * 35, 2)  # nine blocks, two a step
    tiers.add(long)
    tiers.plan()
    tiers.land()
    tiers.add(make_request("a", A, 2))  # six blocks: there are twelve free, but seven of them are promised
    while not tiers.tokens("long"):
        plan = tiers.plan()
        assert plan.rows and not plan.loads
        tiers.land()
    tiers.run()
    assert tiers.scheduler.stats().num_preemptions == 0
    assert tiers.tokens("long") == expected_output(long)
    assert tiers.outputs["a"][-1].num_host_tokens == 20


def test_nobody_is_preempted_while_blocks_come_back_from_stores():
    tiers = Tiers(num_host_blocks=64)
    tiers.add(make_request("old", A, 1))
    tiers.plan()
    tiers.land()
    assert len(tiers.plan().stores) == 5  # under way from here on: seven blocks are left
    one, two = make_request("one", [5] * 11, 9), make_request("two", [6] * 11, 9)
    tiers.add(one, two)
    while tiers.plan() is not None:
        tiers.land()
    assert tiers.slots() == {"one", "two"}
    tiers.run()
    assert tiers.scheduler.stats().num_preemptions == 0
    assert tiers.tokens("one") == expected_output(one) and tiers.tokens("two") == expected_output(two)


def test_while_somebody_lacks_blocks_no_more_of_them_go_into_stores():
    tiers = Tiers()
    tiers.add(make_request("old", A, 1), make_request("short", [5] * 9, 2))
    tiers.plan()
    tiers.land()
    tiers.add(make_request("all", [6] * 40, 1))
    assert len(tiers.plan().stores) == 5
    tiers.land()  # gives two full blocks back
    assert tiers.plan() is None
    tiers.copy("store")
    assert tiers.plan().rows and "all" in tiers.slots()


def test_step_numbers_are_unique_and_ordered_and_only_steps_count():
    tiers = Tiers()
    tiers.add(make_request("old", A, 2))
    steps = []
    while (plan := tiers.plan()) is not None:
        steps.append((plan.step, len(plan.rows)))
        if tiers.results:
            tiers.land()
    assert steps == [(0, 1), (1, 1), (2, 0)]
    assert tiers.scheduler.stats().num_steps == 2


# -- the book of copies --------------------------------------------------------------------------


def test_a_batch_is_done_when_every_rank_has_said_so_and_failed_where_it_failed_on_any():
    book = CopyBook(3)
    book.start(4, "load", [("x", [(0, 1), (2, 3)]), ("y", [(4, 5)])])
    book.start(4, "store", [(None, [(6, 7)])])
    book.start(5, "load", [])
    assert len(book) == 2 and book.owners("load") == ["x", "y"]
    assert book.land(CopyResult(rank=2, step=4, kind="load", failed=[1], seconds=0.5)) is None
    assert book.land(CopyResult(rank=0, step=4, kind="load", seconds=2.0)) is None
    batch = book.land(CopyResult(rank=1, step=4, kind="load", failed=[1, 2], seconds=1.0))
    assert list(batch.landed()) == [("x", [(0, 1), (2, 3)], {1}), ("y", [(4, 5)], {0})]
    assert (batch.seconds, batch.num_pairs, len(book)) == (2.0, 3, 1)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (CopyResult(rank=0, step=9, kind="load"), "rank 0 .*loads of step 9"),
        (CopyResult(rank=0, step=4, kind="store"), "stores of step 4"),
        (CopyResult(rank=2, step=4, kind="load"), "rank 2.* of 2 ranks"),
        (CopyResult(rank=1, step=4, kind="load"), r"rank 1, after \[1\]"),
        (CopyResult(rank=0, step=4, kind="load", failed=[3]), r"\[3\] failed, of 1"),
    ],
)
def test_reports_of_what_is_not_under_way_are_errors(result, words):
    book = CopyBook(2)
    book.start(4, "load", [("x", [(0, 1)])])
    book.land(CopyResult(rank=1, step=4, kind="load"))
    with pytest.raises(ValueError, match=words):
        book.land(result)
