"""The incremental detokenizer against the whole decode, for tokenizers of both usual kinds."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from ds_serve.text.codec import SlowTokenizerError
from ds_serve.text.detokenize import Detokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "你好,世界! 🙂 naïve café",
    "stop STOP END of  it\n\n",
] * 4


@cache
def byte_level():
    """Byte-level BPE, as GPT-2 and Llama 3 have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@cache
def byte_fallback():
    """Sentencepiece-like BPE with byte fallback, as Llama 2 and Gemma have it."""
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    pieces += [
        "▁",
        "▁the",
        "▁fox",
        "the",
        "fo",
        "x",
        "é",
        "▁▁",
        "s",
        "t",
        "o",
        "p",
        "▁stop",
        "END",
        "E",
        "N",
        "D",
    ]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={p: i for i, p in enumerate(pieces)}, merges=[], byte_fallback=True, unk_token="<unk>"
        )
    )
    tokenizer.add_special_tokens([AddedToken(p, special=True) for p in pieces[:3]])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def byte_ids(tokenizer, text):
    return [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]


def split(draw, ids):
    """ids in chunks of random sizes, some empty."""
    chunks, at = [], 0
    while at < len(ids):
        size = draw(st.integers(0, 20))
        chunks.append(ids[at : at + size])
        at += size
    return chunks


@st.composite
def streams(draw):
    """(tokenizer, prompt ids, output ids, chunks): any bytes for byte-level, whole characters else."""
    if draw(st.booleans()):
        tokenizer = byte_level()
        token = st.one_of(st.integers(0, tokenizer.get_vocab_size() - 1), st.integers(2, 257))
        ids = draw(st.lists(token, max_size=60))
    else:
        tokenizer = byte_fallback()
        one = st.sampled_from([i for i in range(tokenizer.get_vocab_size()) if not 3 <= i < 259]).map(
            lambda i: [i]
        )
        character = st.sampled_from("é你好🙂a").map(lambda c: byte_ids(tokenizer, c))
        ids = sum(draw(st.lists(st.one_of(one, character), max_size=25)), [])
    prompt = tokenizer.encode(draw(st.sampled_from(["", "the", "the fox 你", " stop"]))).ids
    prompt = [1] * draw(st.integers(0, 12)) + prompt + [1] * draw(st.integers(0, 12))
    return tokenizer, prompt, ids, split(draw, ids)


def expected_text(tokenizer, prompt, ids):
    return tokenizer.decode(prompt + ids)[len(tokenizer.decode(prompt)) :]


def first_complete(text, stops, start=0):
    """The earliest match by reading text character by character: (where it begins, stop) or None."""
    for end in range(start, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if end - len(stop) >= start and text[end - len(stop) : end] == stop:
                return end - len(stop), stop
    return None


@settings(max_examples=400, deadline=None)
@given(streams())
def test_joined_text_is_the_whole_decode(stream):
    tokenizer, prompt, ids, chunks = stream
    detokenizer = Detokenizer(tokenizer, prompt_token_ids=prompt)
    deltas = [detokenizer.push(chunk) for chunk in chunks] + [detokenizer.push([], final=True)]
    assert "".join(deltas) == expected_text(tokenizer, prompt, ids)
    assert detokenizer.num_tokens == len(ids) and detokenizer.stop_hit is None


@settings(max_examples=400, deadline=None)
@given(streams(), st.data())
def test_text_is_cut_at_the_earliest_stop_string(stream, data):
    tokenizer, prompt, ids, chunks = stream
    whole = expected_text(tokenizer, prompt, ids)
    stops = data.draw(st.lists(stop_strings(whole), min_size=1, max_size=3))
    detokenizer = Detokenizer(tokenizer, prompt_token_ids=prompt, stop=stops)
    text = "".join([detokenizer.push(chunk) for chunk in chunks] + [detokenizer.push([], final=True)])
    match = first_complete(whole, stops)
    if match is None:
        assert (text, detokenizer.stop_hit) == (whole, None)
        assert detokenizer.num_tokens == len(ids)
    else:
        assert (text, detokenizer.stop_hit) == (whole[: match[0]], match[1])
        assert detokenizer.push(ids, final=True) == ""
        assert detokenizer.num_tokens == completing_token(tokenizer, prompt, ids, match[0] + len(match[1]))


def stop_strings(whole):
    parts = [
        st.sampled_from(["the", "o", " ", "st", "好", "\ufffd"]),
        st.text("theo 好s", min_size=1, max_size=3),
    ]
    if whole:
        parts.append(
            st.tuples(st.integers(0, len(whole) - 1), st.integers(1, 5)).map(
                lambda p: whole[p[0] : p[0] + p[1]]
            )
        )
    return st.one_of(parts)


def completing_token(tokenizer, prompt, ids, end):
    """How many tokens a detokenizer without stop strings takes to show `end` characters."""
    plain, shown = Detokenizer(tokenizer, prompt_token_ids=prompt), 0
    for count, token in enumerate(ids, 1):
        shown += len(plain.push([token]))
        if shown >= end:
            return count
    return len(ids)


@settings(max_examples=200, deadline=None)
@given(streams(), st.integers(0, 30), st.data())
def test_min_tokens_holds_the_search_back(stream, min_tokens, data):
    tokenizer, prompt, ids, chunks = stream
    stops = data.draw(st.lists(stop_strings(expected_text(tokenizer, prompt, ids)), min_size=1, max_size=2))
    plain = Detokenizer(tokenizer, prompt_token_ids=prompt)
    start = len("".join(plain.push([token]) for token in ids[:min_tokens]))
    whole = expected_text(tokenizer, prompt, ids)
    detokenizer = Detokenizer(tokenizer, prompt_token_ids=prompt, stop=stops, min_tokens=min_tokens)
    text = "".join([detokenizer.push(chunk) for chunk in chunks] + [detokenizer.push([], final=True)])
    match = first_complete(whole, stops, start) if len(ids) > min_tokens else None
    assert text == (whole if match is None else whole[: match[0]])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(3, 258), max_size=80))
def test_invalid_fallback_bytes_neither_fail_nor_stall(ids):
    detokenizer = Detokenizer(byte_fallback(), prompt_token_ids=[259])
    for token in ids:
        detokenizer.push([token])
        assert len(detokenizer._stream._pending) <= 17
    detokenizer.push([], final=True)


def test_characters_of_several_tokens_appear_whole():
    for tokenizer in (byte_level(), byte_fallback()):
        ids = byte_ids(tokenizer, "a你🙂") if tokenizer is byte_fallback() else tokenizer.encode("a世🙂").ids
        detokenizer = Detokenizer(tokenizer)
        deltas = [detokenizer.push([token]) for token in ids]
        assert len(ids) > len("".join(deltas)) == 3 and "\ufffd" not in "".join(deltas)


def test_incomplete_character_is_flushed_at_the_end():
    tokenizer = byte_fallback()
    detokenizer = Detokenizer(tokenizer, stop=["zz"])
    assert detokenizer.push(byte_ids(tokenizer, "é")[:1]) == ""
    assert detokenizer.push([], final=True) == "\ufffd"


def test_continuation_keeps_its_leading_space():
    tokenizer = byte_fallback()
    the, fox = tokenizer.token_to_id("▁the"), tokenizer.token_to_id("▁fox")
    assert Detokenizer(tokenizer).push([fox]) == "fox"
    assert Detokenizer(tokenizer, prompt_token_ids=[the]).push([fox]) == " fox"
    assert Detokenizer(tokenizer, prompt_token_ids=[the] + [1] * 40).push([fox]) == " fox"


def test_special_tokens_show_only_when_asked():
    tokenizer = byte_level()
    ids = tokenizer.encode("fox").ids + [1]
    assert Detokenizer(tokenizer).push(ids) == "fox"
    assert Detokenizer(tokenizer, skip_special_tokens=False).push(ids) == "fox</s>"


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="empty"):
        Detokenizer(byte_level(), stop=["a", ""])
    with pytest.raises(ValueError, match="sequence"):
        Detokenizer(byte_level(), stop="END")
    with pytest.raises(SlowTokenizerError, match="fast"):
        Detokenizer(object())
