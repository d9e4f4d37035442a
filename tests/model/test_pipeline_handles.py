"""Handles of prefixes on the demo model, in a pool so small that a few prompts wash everything else out."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from transformers import AutoTokenizer

import ds_serve
from ds_serve.demo import model_path
from ds_serve.generation.args import resolve_generate
from ds_serve.generation.pipeline import GenerationError
from ds_serve.generation.text import Texts

NUM_BLOCKS, BLOCK_SIZE, MAX_PINNED = 32, 16, 16
SYSTEM = {"role": "system", "content": "You answer the guests of a small hotel by the sea. " * 8}
QUESTION = {"role": "user", "content": "What is the capital of France?"}
ANSWER = {"role": "assistant", "content": "Paris."}
SALTS = map("tenant-{}".format, itertools.count())


@pytest.fixture(scope="module")
def pipe():
    with ds_serve.pipeline(
        model=model_path(), dtype="float32", num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE,
        max_pinned_share=MAX_PINNED / NUM_BLOCKS, do_sample=False, max_new_tokens=12,
    ) as pipe:  # fmt: skip
        yield pipe


@pytest.fixture
def salt():
    """A tenant of one test: nothing of the other tests' is found under it."""
    return next(SALTS)


def ask(pipe, chat, salt):
    """(text of the answer, prompt tokens that came from the cache)."""
    before = pipe.engine.stats().cached_tokens
    [record] = pipe(chat, cache_salt=salt, return_full_text=False)
    return record["generated_text"], pipe.engine.stats().cached_tokens - before


def wash(pipe):
    """Fills the pool several times over, with prompts that come again: no policy keeps others instead."""
    for _ in range(8):
        salt = next(SALTS)
        for _ in range(2):
            pipe("sea " * 150, cache_salt=salt, max_new_tokens=1)


# -- token prefixes ------------------------------------------------------------------------------


@pytest.mark.parametrize("begin", [[SYSTEM], [SYSTEM, QUESTION], [QUESTION], [SYSTEM, QUESTION, ANSWER]])
def test_the_demos_template_begins_longer_chats_with_what_prefill_computes(begin):
    texts = Texts(AutoTokenizer.from_pretrained(model_path(), local_files_only=True))
    plain = resolve_generate({}, {}, {})
    kept = texts.encode(begin, {}, plain, answer=False).token_ids
    for more in ([QUESTION], [QUESTION, ANSWER, QUESTION], [ANSWER, QUESTION]):
        whole = texts.encode(begin + more, {}, plain).token_ids
        assert whole[: len(kept)] == kept and len(whole) > len(kept)


# -- handles -------------------------------------------------------------------------------------


def test_a_chat_finds_its_prefilled_system_prompt_also_after_others_washed_the_pool(pipe, salt):
    chat = [SYSTEM, QUESTION]
    alone, cached = ask(pipe, chat, next(SALTS))
    assert cached == 0
    with pipe.prefill([SYSTEM], salt=salt) as handle:
        assert handle.num_cached_tokens == 0 and handle.num_tokens >= 5 * BLOCK_SIZE
        assert pipe.engine.stats().num_pinned_blocks == handle.num_tokens // BLOCK_SIZE
        text, cached = ask(pipe, chat, salt)
        assert (text, cached) == (alone, handle.num_tokens)
        wash(pipe)
        text, cached = ask(pipe, chat, salt)
        assert (text, cached) == (alone, handle.num_tokens)
        longer = [*chat, {"role": "assistant", "content": text}, QUESTION]
        assert ask(pipe, longer, salt)[1] >= handle.num_tokens
    assert pipe.engine.stats().num_pinned_blocks == 0


def test_a_released_prefix_is_washed_out(pipe, salt):
    handle = pipe.prefill([SYSTEM], salt=salt)
    handle.release()
    handle.release()
    assert pipe.engine.stats().num_pinned_blocks == 0
    assert pipe.prefill([SYSTEM], salt=salt, pin=False).num_cached_tokens == handle.num_tokens
    wash(pipe)
    assert ask(pipe, [SYSTEM, QUESTION], salt)[1] == 0


def test_a_prefix_that_is_only_computed_can_be_washed_out(pipe, salt):
    handle = pipe.prefill([SYSTEM], salt=salt, pin=False)
    assert pipe.engine.stats().num_pinned_blocks == 0
    assert ask(pipe, [SYSTEM, QUESTION], salt)[1] == handle.num_tokens
    wash(pipe)
    assert ask(pipe, [SYSTEM, QUESTION], salt)[1] == 0


def test_a_pin_ends_with_its_ttl(pipe, salt):
    pipe.prefill([SYSTEM], salt=salt, ttl=1e-6)
    wash(pipe)
    assert ask(pipe, [SYSTEM, QUESTION], salt)[1] == 0
    assert pipe.engine.stats().num_pinned_blocks == 0


def test_tenants_do_not_share(pipe, salt):
    other = next(SALTS)
    with pipe.prefill([SYSTEM], salt=salt) as handle:
        assert ask(pipe, [SYSTEM, QUESTION], other)[1] == 0
        assert ask(pipe, [SYSTEM, QUESTION], "")[1] == 0
        with pipe.prefill([SYSTEM], salt=other):
            assert pipe.engine.stats().num_pinned_blocks == 2 * handle.num_tokens // BLOCK_SIZE
        assert ask(pipe, [SYSTEM, QUESTION], salt)[1] == handle.num_tokens


def test_a_pin_beyond_the_bound_is_refused_in_numbers_and_leaves_nothing(pipe, salt):
    too_much = "sea " * 20 * BLOCK_SIZE
    blocks = len(pipe.tokenizer(too_much)["input_ids"]) // BLOCK_SIZE
    assert MAX_PINNED < blocks < NUM_BLOCKS
    with pytest.raises(GenerationError, match=rf"{blocks} .*blocks.* {MAX_PINNED} "):
        pipe.prefill(too_much, salt=salt)
    assert pipe.engine.stats().num_pinned_blocks == 0
    assert pipe.prefill(too_much, salt=salt, pin=False).num_tokens == blocks * BLOCK_SIZE


def test_handles_share_the_bound_and_the_first_ones_stay(pipe, salt):
    with pipe.prefill([SYSTEM], salt=salt) as first, pipe.prefill([SYSTEM], salt=next(SALTS)) as second:
        pinned = (first.num_tokens + second.num_tokens) // BLOCK_SIZE
        assert pinned == MAX_PINNED
        with pytest.raises(GenerationError, match=f"{pinned // 2} .*blocks.* {MAX_PINNED} "):
            pipe.prefill([SYSTEM], salt=next(SALTS))
        assert pipe.engine.stats().num_pinned_blocks == pinned
        wash(pipe)
        assert ask(pipe, [SYSTEM, QUESTION], salt)[1] == first.num_tokens


def test_a_request_that_fits_only_without_the_pins_runs(pipe, salt):
    with pipe.prefill([SYSTEM], salt=salt) as handle:
        long = "sea " * (BLOCK_SIZE * (NUM_BLOCKS - handle.num_tokens // BLOCK_SIZE + 2))
        pipe(long, cache_salt=next(SALTS), max_new_tokens=1)
        assert pipe.engine.stats().num_pinned_blocks == 0


def test_a_prompt_beyond_the_context_is_refused(pipe):
    limit = pipe.engine.info.max_model_len
    with pytest.raises(ValueError, match=f"prompt: .* no room in the model's {limit}"):
        pipe.prefill("sea " * limit)


def test_on_an_event_loop(pipe, salt):
    handle = asyncio.run(pipe.aprefill([SYSTEM], salt=salt))
    assert ask(pipe, [SYSTEM, QUESTION], salt)[1] == handle.num_tokens
    handle.release()
    assert pipe.engine.stats().num_pinned_blocks == 0


def test_a_handle_may_outlive_its_pipeline(pipe, salt):  # the last test: it closes the pipeline
    handle = pipe.prefill([SYSTEM], salt=salt)
    pipe.close()
    handle.release()
    handle.release()
