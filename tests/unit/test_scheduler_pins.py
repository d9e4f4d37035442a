"""Pins and audits: what a request leaves pinned, when that ends, and what a sampled hit sets going."""

from __future__ import annotations

import pytest
from simulated import Tiers, expected_output, make_request

from ds_serve.messages import StepResult

A = [1] * 5 + [11] * 16  # five full blocks, and a token more
B = [2] * 5 + [12] * 4


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def pinning(**fields):
    clock = Clock()
    tiers = Tiers(**({"max_pinned_blocks": 6, "num_host_blocks": 0, "clock": clock} | fields))
    tiers.clock = clock
    return tiers


def pinned(name, prompt, **fields):
    return make_request(name, prompt, 2, **({"cache_key": "k", "cache_ttl": 60.0} | fields))


def run(tiers, *requests):
    tiers.add(*requests)
    tiers.run()
    return [tiers.outputs[request.id][-1] for request in requests]


def num_pinned(tiers):
    return tiers.scheduler.stats().num_pinned_blocks


def test_a_pinned_prompt_stays_where_others_wash_the_rest_away():
    tiers = pinning()
    run(tiers, pinned("a", A))
    assert num_pinned(tiers) == 5
    run(tiers, make_request("wash", [3] * 27, 1))
    assert run(tiers, make_request("again", A, 1))[0].num_cached_tokens == 20


def test_a_prompt_is_pinned_with_its_first_token_and_no_sooner():
    tiers = pinning(max_num_batched_tokens=12)
    tiers.add(pinned("a", A))
    tiers.plan()
    tiers.land()
    assert num_pinned(tiers) == 0
    tiers.plan()
    tiers.land()
    assert num_pinned(tiers) == 5 and tiers.tokens("a")


def test_a_pin_ends_with_its_time_which_each_use_renews():
    tiers = pinning()
    run(tiers, pinned("a", A))
    tiers.clock.now += 40
    run(tiers, pinned("again", A))
    tiers.clock.now += 59
    tiers.plan()
    assert num_pinned(tiers) == 5
    tiers.clock.now += 1
    tiers.plan()
    assert num_pinned(tiers) == 0 and tiers.cache.pool.num_free == tiers.cache.num_blocks


def test_unpin_releases_what_one_tenant_pinned_and_nothing_else():
    tiers = pinning(max_pinned_blocks=12)
    run(tiers, pinned("a", A), pinned("b", A[:12], salt="t"), pinned("c", A[:4], salt="tk", cache_key=""))
    assert num_pinned(tiers) == 8
    for key, salt in (("k", "other"), ("tk", ""), ("", "tk"), ("nothing", "")):
        tiers.scheduler.unpin(key, salt)
    assert num_pinned(tiers) == 8
    tiers.scheduler.unpin("k", "t")
    assert num_pinned(tiers) == 5
    tiers.scheduler.unpin("k", "")
    assert num_pinned(tiers) == 0


def test_what_must_be_pinned_and_never_can_is_refused_in_numbers():
    tiers = pinning(max_pinned_blocks=4)
    error = tiers.scheduler.add(pinned("a", A, pin="must")).error
    assert "5 KV blocks" in error and " 4 " in error
    assert tiers.scheduler.add(pinned("hint", A)) is None


def test_what_must_be_pinned_and_cannot_now_ends_with_an_error_in_numbers():
    tiers = pinning()
    first, second = pinned("a", A, pin="must"), pinned("b", B, pin="must", cache_key="other")
    run(tiers, first)
    (last,) = run(tiers, second)
    assert last.finish_reason == "error" and "2 blocks" in last.error and " 6 " in last.error
    assert last.token_ids == [] and num_pinned(tiers) == 5
    assert tiers.tokens("a") == expected_output(first)


def test_a_hint_gives_way_and_its_request_does_not_mind():
    tiers = pinning()
    hint, must = pinned("a", A), pinned("b", B, pin="must", cache_key="other")
    run(tiers, hint, must)
    assert num_pinned(tiers) == 2
    assert tiers.tokens("a") == expected_output(hint) and tiers.tokens("b") == expected_output(must)


@pytest.mark.parametrize("pin", ["hint", "must"])
def test_pins_give_way_where_nothing_else_could_get_on(pin):
    tiers = pinning()
    run(tiers, pinned("a", A, pin=pin))
    whole = make_request("whole", [4] * 40, 9)  # twelve blocks: all that there are
    run(tiers, whole)
    assert tiers.tokens("whole") == expected_output(whole) and num_pinned(tiers) == 0


# -- audits --------------------------------------------------------------------------------------


def auditing(share, **fields):
    tiers = Tiers(num_blocks=32, audit_share=share, **fields)
    tiers.add(make_request("begin", A, 1))
    tiers.run()
    return tiers


def hit(index):
    return make_request(f"hit {index}", [*A, index], 2)


@pytest.mark.parametrize(("share", "num_audits"), [(1.0, 6), (0.5, 3), (0.3, 2), (0.0, 0)])
def test_every_so_manieth_hit_is_audited(share, num_audits):
    tiers = auditing(share)
    for index in range(6):
        run(tiers, hit(index))
    stats = tiers.scheduler.stats()
    assert (stats.audits, stats.audit_max_difference) == (num_audits, 0.0)


def test_an_audit_finds_what_a_hit_and_a_fresh_prefill_differ_in():
    tiers = auditing(1.0)
    tiers.worker.cached_error = 0.25
    run(tiers, hit(1))
    tiers.worker.cached_error = 0.0
    run(tiers, hit(2))
    assert tiers.scheduler.stats().audits == 2
    assert tiers.scheduler.stats().audit_max_difference == pytest.approx(0.25)


def test_an_audit_counts_nowhere_else_and_leaves_nothing():
    plain, audited = (auditing(share) for share in (0.0, 1.0))
    for tiers in (plain, audited):
        run(tiers, hit(1))
    a, b = plain.scheduler.stats(), audited.scheduler.stats()
    assert b.audits == 1 and set(plain.outputs) == set(audited.outputs)
    for name in ("num_finished", "prompt_tokens", "cached_tokens", "output_tokens", "num_free_blocks"):
        assert getattr(a, name) == getattr(b, name)
    assert (a.num_running, a.num_waiting) == (b.num_running, b.num_waiting) == (0, 0)
    assert a.num_cached_blocks == b.num_cached_blocks, "what was computed beside the cache is not published"


def test_one_audit_computes_all_and_the_other_only_what_the_cache_lacks():
    tiers = auditing(1.0)
    tiers.add(hit(1))
    tiers.plan()
    tiers.land()
    plan = tiers.plan()
    assert sorted(row.count for row in plan.rows) == [1, 2, 22], "the hit's decode, and both audits"
    assert [(new.params.max_tokens, new.params.logprobs) for new in plan.new] == [(1, 20)] * 2


def test_an_audit_gives_way_to_requests():
    tiers = auditing(1.0, max_num_seqs=2)
    tiers.add(make_request("begun", [*A, 1], 3))
    tiers.plan()
    tiers.land()
    tiers.plan()  # the audit has the slot that is free
    assert len(tiers.slots()) == 2
    tiers.add(make_request("new", [9] * 3, 2))
    tiers.run()
    assert tiers.scheduler.stats().audits == 0
    assert tiers.tokens("new") == expected_output(make_request("new", [9] * 3, 2))


def test_what_a_dropped_audit_would_have_taken_goes_to_who_dropped_it():
    tiers = auditing(1.0, max_num_batched_tokens=4)
    tiers.add(make_request("hit", [*A, 1], 1))
    tiers.plan()
    tiers.land()
    tiers.plan()
    tiers.land()
    assert len(tiers.slots()) == 1, "one audit has ended, the other has a long way to go"
    tiers.add(make_request("new", [9] * 4, 1))
    assert [new.token_ids for new in tiers.plan().new] == [[9] * 4]
    assert tiers.slots() == {"new"}


def test_there_is_one_audit_at_a_time_and_none_while_others_wait():
    tiers = auditing(1.0, max_num_batched_tokens=8)
    run(tiers, hit(1), hit(2), hit(3))
    assert 1 <= tiers.scheduler.stats().audits < 3


def test_the_engines_own_ids_are_refused_to_fronts_and_end_without_a_word():
    tiers = auditing(1.0)
    assert "engine's own" in tiers.scheduler.add(make_request("\0audit", [1], 1)).error
    tiers.add(hit(1))
    tiers.plan()
    tiers.land()
    own = [name for name in tiers.scheduler.books.sequences if name != "hit 1"]
    assert len(own) == 2 and all(tiers.scheduler.abort(name) is None for name in own)
    assert [output.id for output in tiers.scheduler.fail_all("over")] == ["hit 1"]


def test_an_audit_without_a_token_is_no_audit():
    tiers = auditing(1.0)
    tiers.add(make_request("a", [*A, 1], 1))
    tiers.plan()
    tiers.land()
    plan = tiers.plan()
    tiers.results.popleft()
    tiers.results.append(StepResult(step=plan.step, token_ids=[-1, -1]))
    tiers.land()
    tiers.run()
    assert tiers.scheduler.stats().audits == 0 and not tiers.scheduler.num_open
