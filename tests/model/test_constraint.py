"""Masks of grammars token by token, and in the sampler: what may be drawn, and when a text may end."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ds_serve import demo
from ds_serve.messages import INVALID_TOKEN, NO_TOKEN_FITS, SamplingParams
from ds_serve.text.codec import TextCodec
from ds_serve.text.grammar import Grammars
from ds_serve.worker import draw
from ds_serve.worker.constraint import Constraints
from ds_serve.worker.sampler import Sampler

END, PAD, USER = 1, 0, 3
VOCAB = 2048


@pytest.fixture(scope="module")
def codec():
    return TextCodec(demo.model_path())


@pytest.fixture(scope="module")
def grammars(codec):
    return Grammars(codec.tokenizer)


@pytest.fixture
def constraints():
    made = Constraints(demo.model_path())
    yield made
    made.close()


def with_grammar(grammar, **changes):
    return SamplingParams(**{"max_tokens": 50, "eos_token_ids": (END,), "grammar": grammar} | changes)


def allowed(constraints, slots, vocab_size=VOCAB):
    """The set of tokens that each of slots may draw."""
    constraints.begin(slots)
    forbidden = draw.unset_bits(constraints.masks(), vocab_size, torch.device("cpu"))
    return [set(np.flatnonzero(~row)) for row in forbidden.numpy()]


def ids(codec, text):
    return codec.encode(text, add_special_tokens=False)


def test_a_text_may_end_where_its_grammar_does_and_by_all_end_tokens(codec, grammars, constraints):
    constraints.admit(3, with_grammar(grammars.regex("ab?"), eos_token_ids=(END, 5, VOCAB + 7)), [])
    [a], [b] = ids(codec, "a"), ids(codec, "b")
    assert allowed(constraints, [3]) == [{a, *ids(codec, "ab")}]
    constraints.append([3], [a])
    assert allowed(constraints, [3]) == [{b, END, 5}]
    constraints.append([3], [b])
    assert allowed(constraints, [3]) == [{END, 5}]
    constraints.append([3], [5])
    assert allowed(constraints, [3]) == [set()]


def test_a_grammar_may_spell_the_end_at_its_end_only(grammars, constraints, codec):
    constraints.admit(0, with_grammar(grammars.lark('start: "a" <|end|>')), ids(codec, "a"))
    constraints.admit(1, with_grammar(grammars.lark('start: "a" (<|end|> | <|user|>) "b"')), ids(codec, "a"))
    assert allowed(constraints, [0, 1]) == [{END}, {USER}]


def test_tokens_that_stand_for_nothing_are_never_allowed(grammars, constraints):
    constraints.admit(0, with_grammar(grammars.lark('start: <[*]> "b"')), [])
    [found] = allowed(constraints, [0], vocab_size=VOCAB + 100)
    assert found == set(range(VOCAB)) - {END}


def test_output_that_a_sequence_brings_is_replayed(codec, grammars, constraints):
    params = with_grammar(grammars.json_schema({"type": "array", "items": {"type": "integer"}}))
    output = ids(codec, "[12, 3")
    constraints.admit(0, params, [])
    for token in output:
        constraints.begin([0])
        constraints.append([0], [token])
    constraints.admit(7, params, output)
    by_step, replayed = allowed(constraints, [0, 7])
    assert by_step == replayed and set(ids(codec, "],7")) <= replayed


def test_a_slot_starts_afresh(codec, grammars, constraints):
    [a] = ids(codec, "a")
    constraints.admit(0, with_grammar(grammars.regex("a+")), [])
    constraints.admit(1, with_grammar(grammars.regex("ab")), [])
    constraints.append([0, 1], [a, a])  # nobody asks slot 0 for the next
    constraints.admit(0, with_grammar(grammars.choice(["x"])), [])
    assert allowed(constraints, [1, 0]) == [set(ids(codec, "b")), set(ids(codec, "x"))]
    constraints.release(0)
    assert allowed(constraints, [1, 0]) == [set(ids(codec, "b"))]
    constraints.append([0, 1], [a, ids(codec, "b")[0]])
    assert allowed(constraints, [0, 1]) == [{END}]
    constraints.release(1)
    constraints.begin([0, 1])
    with pytest.raises(RuntimeError, match="without a begin"):
        constraints.masks()


def test_a_grammar_that_fails_allows_nothing_and_harms_no_other(codec, grammars, constraints):
    constraints.admit(0, with_grammar("start: nonsense"), [])
    constraints.admit(1, with_grammar(grammars.regex("[0-9]")), ids(codec, "x"))
    constraints.admit(2, with_grammar(grammars.regex("[0-9]")), ids(codec, "7"))
    for _ in range(2):
        assert allowed(constraints, [0, 1, 2]) == [set(), set(), {END}]


def test_without_a_tokenizer_nothing_is_allowed(tmp_path, caplog):
    constraints = Constraints(tmp_path)
    constraints.wait()
    constraints.admit(0, with_grammar('start: "a"'), [])
    assert allowed(constraints, [0], 10) == [set()]
    assert str(tmp_path) in caplog.text
    constraints.close()


@pytest.fixture
def sampler(constraints):
    return Sampler(8, VOCAB, constraints=constraints)


def sample(sampler, logits, slots, position=5):
    sampler.begin(slots)
    return sampler.sample(logits, slots, [position] * len(slots)).to_host()


@pytest.mark.parametrize("temperature", [0.0, 2.0])
@pytest.mark.parametrize("both", [False, True], ids=["one of two rows", "both rows"])
def test_sampling_keeps_to_the_grammar(codec, grammars, constraints, sampler, temperature, both):
    digits = set(ids(codec, "0123456789"))
    free = SamplingParams(max_tokens=9, temperature=temperature, seed=1)
    bound = with_grammar(
        grammars.regex("[0-9]"), temperature=temperature, logprobs=0, logit_bias={40: 90.0}, seed=1
    )
    sampler.admit(4, bound if both else free, [9], 1)
    sampler.admit(2, bound, [9], 1)
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(1)).mul(4)
    tokens, logprobs = sample(sampler, logits, [4, 2])
    assert tokens[1] in digits and (tokens[0] in digits) == both
    wanted = logits[1].log_softmax(-1)[tokens[1]].item()
    assert logprobs[1].logprob == pytest.approx(wanted, abs=1e-4)
    best = max(digits, key=lambda token: logits[1, token])
    assert temperature or tokens[1] == best
    constraints.append([4, 2], tokens)
    assert sample(sampler, logits[1:], [2])[0] == [END]


def test_a_neighbour_without_a_grammar_draws_what_it_draws_alone(grammars, sampler):
    free = SamplingParams(max_tokens=9, temperature=1.5, seed=3, top_p=0.9)
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(2))
    sampler.admit(0, free, [9], 1)
    alone, _ = sample(sampler, logits[:1], [0])
    sampler.admit(1, with_grammar(grammars.choice(["yes", "no"])), [9], 1)
    together, _ = sample(sampler, logits, [0, 1])
    assert together[0] == alone[0]


def test_a_stuck_row_is_told_from_one_that_is_not_finite(codec, grammars, sampler):
    for slot in (0, 1):
        sampler.admit(slot, with_grammar(grammars.regex("[0-9]")), [9], 1)
    sampler.admit(2, with_grammar(grammars.regex("[0-9]"), temperature=0.0), [9, *ids(codec, "x")], 1)
    sampler.admit(3, SamplingParams(max_tokens=9), [9], 1)
    logits = torch.zeros(4, VOCAB)
    logits[0] = torch.nan
    logits[1, ids(codec, "0123456789")] = -torch.inf
    logits[3] = -torch.inf
    tokens, _ = sample(sampler, logits, [0, 1, 2, 3])
    assert tokens == [INVALID_TOKEN, NO_TOKEN_FITS, NO_TOKEN_FITS, INVALID_TOKEN]


def test_a_sampler_without_constraints_refuses_grammars():
    with pytest.raises(ValueError, match="grammar"):
        Sampler(1, VOCAB).admit(0, with_grammar('start: "a"'), [9], 1)


@pytest.mark.parametrize("size", [1, 31, 32, 33, 64, 100])
def test_bits_are_read_alike_on_every_device(size):
    words = np.random.default_rng(0).integers(0, 2**32, (3, 2), dtype=np.uint32)
    wanted = [
        [not (int(row[t // 32]) >> t % 32 & 1) if t < 64 else True for t in range(size)] for row in words
    ]
    assert draw.unset_bits(words, size, torch.device("cpu")).tolist() == wanted
    if torch.cuda.is_available():
        assert draw.unset_bits(words, size, torch.device("cuda")).tolist() == wanted
