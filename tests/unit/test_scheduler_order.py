"""Who of the waiting requests goes first: cached prefixes before others, within a bound."""

from __future__ import annotations

import pytest
from simulated import Tiers, make_request

from ds_serve.engine import admission

CHAT = [1] * 5 + [11] * 15  # five full blocks


def one_slot(**fields):
    """One request runs at a time; CHAT is on the device."""
    tiers = Tiers(num_blocks=32, max_num_seqs=1, **fields)
    tiers.add(make_request("begin", CHAT, 1))
    tiers.run()
    return tiers


def order(tiers, *requests):
    """The ids in the order in which they get a slot."""
    tiers.add(*requests)
    tiers.run()
    return sorted((each.id for each in requests), key=lambda name: tiers.outputs[name][0].times[1])


def cached(name, **fields):
    return make_request(name, [*CHAT, 7], 1, **fields)


def test_a_longer_cached_prefix_goes_first():
    tiers = one_slot()
    requests = [
        make_request("new", [9] * 6, 1),
        make_request("half", [*CHAT[:8], 9, 9, 9], 1),
        cached("whole"),
    ]
    assert order(tiers, *requests) == ["whole", "half", "new"]


def test_what_counts_is_the_cached_part_beside_what_must_be_computed():
    tiers = one_slot()
    long = make_request("long", [*CHAT, *[8] * 60], 1)  # as many cached tokens, many to compute
    assert order(tiers, long, make_request("short", [*CHAT[:8], 9], 1)) == ["short", "long"]


def test_a_prefix_in_the_host_counts_where_loading_pays():
    for copy_s, expected in ((0.1, ["a", "new"]), (9.0, ["new", "a"])):
        tiers = Tiers(max_num_seqs=1, copy_s_per_block=copy_s, prefill_s_per_token=0.1)
        tiers.wash(CHAT)
        assert order(tiers, make_request("new", [9] * 6, 1), cached("a")) == expected


def test_priority_comes_before_any_prefix():
    tiers = one_slot()
    assert order(tiers, make_request("urgent", [9] * 6, 1, priority=-1), cached("a")) == ["urgent", "a"]


@pytest.mark.parametrize("bound", [0, 1, 4])
def test_nobody_is_overtaken_more_often_than_the_bound(bound):
    tiers = one_slot(max_overtaken=bound)
    requests = [make_request("new", [9] * 6, 1), *(cached(str(index)) for index in range(8))]
    assert order(tiers, *requests).index("new") == bound


def test_the_bound_holds_also_where_cached_ones_never_cease_to_arrive():
    tiers = one_slot()
    tiers.add(make_request("new", [9] * 6, 1))
    for index in range(10):
        tiers.add(cached(str(index)))
        tiers.plan()
        tiers.land()
        if tiers.outputs["new"]:
            break
    assert index == 4


def test_who_is_far_behind_does_not_overtake():
    tiers = one_slot()
    news = [make_request(f"new {index}", [9] * 6 + [index], 1) for index in range(admission.WINDOW)]
    assert order(tiers, *news, cached("a"))[0] == "new 0"


def test_a_preempted_request_that_has_begun_is_not_overtaken():
    tiers = one_slot()
    tiers.add(make_request("begun", [9] * 6, 4))
    tiers.plan()
    tiers.land()
    tiers.scheduler.books.preempt(tiers.scheduler.books.running[0])
    tiers.add(cached("a"))
    tiers.plan()
    assert tiers.slots() == {"begun"}


def test_the_first_goes_where_a_better_cached_one_does_not_fit():
    tiers = Tiers(num_blocks=12, num_host_blocks=0)
    tiers.add(make_request("begin", CHAT, 1))
    tiers.run()
    tiers.add(make_request("running", [5] * 12, 9))  # three blocks, and two to come
    tiers.plan()
    tiers.add(make_request("small", [9] * 3, 1), make_request("big", [*CHAT, *[8] * 12], 1))
    tiers.plan()
    assert tiers.slots() == {"running", "small"}


def test_nothing_is_looked_up_while_no_slot_is_free(monkeypatch):
    tiers = one_slot()
    calls = []
    match = tiers.cache.match
    monkeypatch.setattr(tiers.cache, "match", lambda *args: calls.append(0) or match(*args))
    tiers.add(make_request("runs", [4] * 3, 40))
    tiers.plan()
    tiers.land()
    calls.clear()
    tiers.add(*(cached(str(index)) for index in range(50)))
    for _ in range(30):
        tiers.plan()
        tiers.land()
    assert not calls, "no slot is free: there is nobody to look up"
