"""Adapters in the engine and the pipeline: cached prefixes are shared within one only."""

from __future__ import annotations

import msgspec
import pytest
from scripted_engine import make_pipe
from simulated import BLOCK, Tiers, make_request

from ds_serve.cache.manager import CacheManager
from ds_serve.generation.pipeline import TextGenerationPipeline

PROMPT = list(range(1, 4 * BLOCK + 2))
NAMES = ("fr", "de")


def cached(tiers, name, **fields):
    """Tokens of PROMPT that one more request finds in the cache."""
    tiers.add(make_request(name, PROMPT, 2, **fields))
    tiers.run()
    return tiers.outputs[name][-1].num_cached_tokens


@pytest.mark.parametrize("num_host_blocks", [0, 32])
def test_prefixes_are_shared_within_an_adapter_and_not_across(num_host_blocks):
    tiers = Tiers(num_blocks=32, num_host_blocks=num_host_blocks, adapters=NAMES)
    for number, adapter in enumerate(["", *NAMES]):
        assert cached(tiers, f"first-{number}", adapter=adapter) == 0
        assert cached(tiers, f"second-{number}", adapter=adapter) == 4 * BLOCK


def test_what_was_evicted_comes_back_from_the_host_for_its_own_adapter_only():
    tiers = Tiers(adapters=NAMES)
    tiers.add(make_request("first", PROMPT, 1, adapter="fr"))
    tiers.run()
    tiers.wash()
    assert cached(tiers, "other", adapter="de") == 0
    assert cached(tiers, "own", adapter="fr") == 4 * BLOCK
    assert tiers.outputs["own"][-1].num_host_tokens == 4 * BLOCK


def test_an_adapter_is_no_salt():
    cache = CacheManager(4, BLOCK)
    roots = [cache.new_table(*each).root for each in [("", ""), ("a", ""), ("", "a"), ("a", "b"), ("ab", "")]]
    assert len(set(roots)) == len(roots)
    assert cache.new_table("a", "b").root == cache.new_table("a", "b").root


def test_plans_tell_the_number_also_after_preemption():
    tiers = Tiers(num_blocks=6, num_host_blocks=0, adapters=NAMES)
    numbers = {}
    for name, adapter in (("plain", ""), ("second", "de"), ("first", "fr")):
        tiers.add(make_request(name, PROMPT[: BLOCK + len(numbers)], 9, adapter=adapter))
        numbers[BLOCK + len(numbers)] = ("", *NAMES).index(adapter)
    seen = []
    while (plan := tiers.plan()) is not None or tiers.results:
        seen += [(new.num_prompt_tokens, new.adapter) for new in (plan.new if plan else [])]
        if tiers.results:
            tiers.land()
    assert set(seen) == set(numbers.items())
    assert len(seen) > 3 and tiers.scheduler.stats().num_preemptions > 0


def test_an_unknown_adapter_is_refused_by_name():
    tiers = Tiers(adapters=NAMES)
    output = tiers.scheduler.add(make_request("r", PROMPT, 1, adapter="it"))
    assert output.finish_reason == "error"
    assert output.error == "adapter 'it' is not loaded here; loaded: fr, de"


def test_a_key_keeps_the_newest_prompt_whatever_its_adapter():
    tiers = Tiers(num_blocks=32, num_host_blocks=0, max_pinned_blocks=8, adapters=NAMES)
    for adapter in NAMES:
        assert cached(tiers, f"first-{adapter}", adapter=adapter, cache_key="k") == 0
        assert tiers.scheduler.stats().num_pinned_blocks == 4
    tiers.add(make_request("others", [7] * (28 * BLOCK), 1))
    tiers.run()
    assert cached(tiers, "gone", adapter="fr") == 0
    assert cached(tiers, "kept", adapter="de") == 4 * BLOCK
    tiers.scheduler.unpin("k", "")
    assert tiers.scheduler.stats().num_pinned_blocks == 0


def test_audits_go_through_the_adapter_of_the_hit():
    tiers = Tiers(num_blocks=32, num_host_blocks=0, audit_share=1.0, adapters=NAMES)
    tiers.add(make_request("a", PROMPT, 1, adapter="de"))
    tiers.run()
    tiers.add(make_request("b", PROMPT, 1, adapter="de"))
    numbers = []
    while (plan := tiers.plan()) is not None or tiers.results:
        numbers += [new.adapter for new in (plan.new if plan else [])]
        if tiers.results:
            tiers.land()
    assert numbers == [2, 2, 2] and tiers.scheduler.stats().audits == 1


# -- the pipeline --------------------------------------------------------------------------------


@pytest.fixture
def pipe():
    pipe = make_pipe()
    pipe.engine.info = msgspec.structs.replace(pipe.engine.info, adapters=NAMES)
    return pipe


def test_a_call_of_the_pipeline_names_its_adapter(pipe):
    pipe(["a b", "c"], adapter="de")
    pipe("a b")
    pipe.prefill("a b", adapter="fr")
    assert [request.adapter for request in pipe.engine.requests] == ["de", "de", "", "fr"]


def test_the_pipelines_own_adapter_is_the_default(pipe):
    pipe = TextGenerationPipeline(pipe.engine, pipe.tokenizer, {}, {"adapter": "fr"})
    pipe("a")
    pipe("a", adapter="")
    pipe.prefill("a b")
    pipe.prefill("a b", adapter="")
    assert [request.adapter for request in pipe.engine.requests] == ["fr", "", "fr", ""]


@pytest.mark.parametrize("call", ["__call__", "prefill"])
def test_the_pipeline_refuses_an_unknown_adapter(pipe, call):
    with pytest.raises(ValueError, match="adapter: 'it' is not loaded; loaded: fr, de"):
        getattr(pipe, call)("a", adapter="it")
    assert not pipe.engine.requests
