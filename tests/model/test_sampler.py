"""The sampler against transformers' own logits processors, and its promises on seeds and batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ds_serve.messages import INVALID_TOKEN, SamplingParams
from ds_serve.worker.draw import NUCLEUS_CANDIDATES, least_kept, pick, uniforms, weigh
from ds_serve.worker.sampler import Sampler

VOCAB = 64
SEVERAL = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def make_params(**changes) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 100, **changes})


def one(params: SamplingParams, logits: torch.Tensor, tokens=(), num_prompt: int = 0) -> tuple[int, object]:
    """(token, log-probability) of a single sequence in a batch of its own."""
    sampler = Sampler(1, logits.shape[-1])
    sampler.admit(0, params, list(tokens), num_prompt)
    ids, logprobs = sampler.sample(logits[None], [0], [len(tokens)]).to_host()
    return ids[0], logprobs[0] if logprobs else None


def distribution(params, logits: torch.Tensor, tokens=(), num_prompt: int = 0) -> torch.Tensor:
    """The probabilities [V] that a random row is drawn from."""
    sampler = Sampler(1, logits.shape[-1])
    sampler.admit(0, params, list(tokens), num_prompt)
    plan = sampler._plan([0])
    scores = sampler._edit(logits[None], plan, np.array([len(tokens)]))
    distance = (scores - scores.amax()) / plan.temperature
    weights = weigh(distance).double()
    if plan.filter is not None:
        weights *= distance >= least_kept(distance, plan.filter)
    return weights[0] / weights.sum()


def reference(params: SamplingParams, logits: torch.Tensor, tokens=(), num_prompt: int = 0) -> torch.Tensor:
    """The same by transformers' processors, in the order in which generate applies them."""
    chain = LogitsProcessorList()
    if params.logit_bias:
        chain.append(SequenceBiasLogitsProcessor({(t,): float(b) for t, b in params.logit_bias.items()}))
    if params.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.min_tokens:
        ends = sorted(params.end_token_ids)
        chain.append(MinNewTokensLengthLogitsProcessor(num_prompt, params.min_tokens, ends))
    chain.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        chain.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        chain.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        chain.append(MinPLogitsWarper(params.min_p))
    ids = torch.tensor([list(tokens)], dtype=torch.long)
    return chain(ids, logits[None].clone())[0].double().softmax(-1)


def random_logits(seed: int, *shape: int, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


sampling = st.fixed_dictionaries(
    {
        "temperature": st.floats(0.05, 5.0),
        "top_k": st.integers(0, VOCAB + 5),
        "top_p": st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
        "min_p": st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
        "repetition_penalty": st.one_of(st.just(1.0), st.floats(0.3, 3.0)),
        "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100), max_size=4),
        "min_tokens": st.integers(0, 8),
        "seed": st.integers(-(2**63), 2**63 - 1),
    }
)


# -- against transformers -----------------------------------------------------------------------


@SEVERAL
@given(
    sampling, st.integers(0, 2**31), st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12), st.data()
)
def test_distribution_is_that_of_transformers(fields, seed, tokens, data):
    num_prompt = data.draw(st.integers(1, len(tokens)))
    params = make_params(**fields, eos_token_ids=(3, 7), stop_token_ids=(9,))
    logits = random_logits(seed, VOCAB)
    found = distribution(params, logits, tokens, num_prompt)
    wanted = reference(params, logits, tokens, num_prompt)
    # A nucleus border within float32's rounding may fall to either side.
    unfiltered = make_params(
        **{**fields, "top_p": 1.0, "min_p": 0.0}, eos_token_ids=(3, 7), stop_token_ids=(9,)
    )
    full = reference(unfiltered, logits, tokens, num_prompt)
    if params.top_p < 1.0:
        assume(((full.sort(descending=True).values.cumsum(0) - params.top_p).abs() > 1e-5).all())
    if params.min_p > 0.0:
        assume((full[full < full.max()] / full.max() / params.min_p - 1).abs().min() > 1e-4)
    assert torch.equal(found > 1e-10, wanted > 1e-10)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 5, 8])
def test_tokens_tied_with_the_kth_stay_as_in_transformers(top_k):
    logits = torch.tensor([1.0, 5.0, 3.0, 3.0, 3.0, 5.0, 0.0, 2.0])
    params = make_params(top_k=top_k)
    found = distribution(params, logits)
    torch.testing.assert_close(found, reference(params, logits), atol=1e-6, rtol=1e-5)


def test_a_tie_on_the_nucleus_border_is_kept_whole():
    logits = torch.tensor([2.0, 0.0, 0.0, 0.0, -1.0])
    found = distribution(make_params(top_p=0.75), logits)  # the first holds 0.70, each tied one 0.09
    assert (found > 0).tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("spread", [0.1, 3.0])  # 0.1: nearly flat, the nucleus outgrows the candidates
@pytest.mark.parametrize("top_k", [0, 500])
def test_nucleus_of_a_large_vocabulary(spread, top_k):
    logits = random_logits(5, 4000, spread=spread)
    params = make_params(top_p=0.9, top_k=top_k)
    found, wanted = distribution(params, logits), reference(params, logits)
    if spread == 0.1 and not top_k:
        assert (wanted > 0).sum() > 2 * NUCLEUS_CANDIDATES
    assert ((found > 0) != (wanted > 0)).sum() <= 1  # float32's own sum decides the border
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


def test_presence_and_frequency_count_output_only():
    logits = random_logits(1, VOCAB)
    prompt, output = [1, 2, 2], [2, 5, 5, 5]
    params = make_params(presence_penalty=0.5, frequency_penalty=0.25)
    wanted = logits.clone()
    wanted[2] -= 0.5 + 0.25
    wanted[5] -= 0.5 + 3 * 0.25
    found = distribution(params, logits, prompt + output, len(prompt))
    torch.testing.assert_close(found, wanted.double().softmax(-1), atol=1e-6, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 300), st.sampled_from([0.05, 1.0, 8.0]), st.booleans())
def test_a_draw_reads_the_same_from_survivors_as_from_the_whole_row(seed, top_k, spread, ties):
    vocabulary, rows = 3000, 6
    logits = random_logits(seed, rows, vocabulary, spread=spread)
    if ties:
        logits = logits.bfloat16().float()
    sampler = Sampler(rows, vocabulary)
    for slot in range(rows):
        kinds = {"top_k": (slot % 2) * top_k, "top_p": 0.9 if slot % 3 else 1.0, "min_p": 0.02 * (slot > 3)}
        sampler.admit(slot, make_params(**kinds, seed=seed + slot), [], 0)
    slots = list(range(rows))
    found = sampler.sample(logits, slots, [4] * rows).token_ids.tolist()
    for slot in slots:
        params = sampler._slots[slot].params
        distance = logits[[slot]] - logits[slot].max()
        least = torch.full((1, 1), -torch.inf)
        if params.top_k:
            least = distance.topk(params.top_k).values[:, -1:]
        if params.top_p < 1.0:
            weights = weigh(distance) * (distance >= least)
            best, order = weights.sort(descending=True)
            inside = best.cumsum(-1) - best < params.top_p * weights.sum()
            least = distance[:, order[inside][-1], None]
        if params.min_p:
            least = least.clamp(min=np.log(params.min_p))
        uniform = torch.from_numpy(uniforms(np.array([seed + slot], dtype=np.uint64), np.array([4])))
        assert found[slot] == pick(distance, uniform, least).item()


# -- greedy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_is_argmax_over_the_real_vocabulary(dtype):
    logits = random_logits(2, 16, VOCAB + 8).to(dtype)
    logits[:, VOCAB:] = 1000.0
    before = logits.clone()
    sampler = Sampler(16, VOCAB)
    for slot in range(16):
        sampler.admit(slot, make_params(temperature=0.0), [1], 1)
    ids, logprobs = sampler.sample(logits, list(range(16)), [1] * 16).to_host()
    assert ids == logits[:, :VOCAB].float().argmax(-1).tolist()
    assert logprobs == []
    assert torch.equal(logits, before)


def test_draws_stay_inside_the_real_vocabulary():
    logits = torch.zeros(VOCAB + 8)
    logits[VOCAB:] = 50.0
    sampler = Sampler(1, VOCAB)
    sampler.admit(0, make_params(top_p=0.99), [], 0)
    drawn = {sampler.sample(logits[None], [0], [i]).token_ids.item() for i in range(300)}
    assert max(drawn) < VOCAB and len(drawn) > 40


@pytest.mark.parametrize("temperature", [1e-3, 1e-40, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = random_logits(3, VOCAB)
    assert one(make_params(temperature=temperature, top_p=0.9), logits)[0] == logits.argmax()


def test_edits_apply_to_greedy_rows_too():
    logits = torch.zeros(VOCAB)
    logits[4], logits[6], logits[8] = 3.0, 2.0, 1.0
    assert one(make_params(temperature=0.0, logit_bias={6: 2.0}), logits)[0] == 6
    assert one(make_params(temperature=0.0, repetition_penalty=2.0), logits, [4], 1)[0] == 6
    assert one(make_params(temperature=0.0, presence_penalty=1.5), logits, [9, 4], 1)[0] == 6
    assert one(make_params(temperature=0.0, logit_bias={4: -100, 6: -100}), logits)[0] == 8


# -- min_tokens ---------------------------------------------------------------------------------


def test_end_tokens_are_masked_until_min_tokens_output_tokens_exist():
    logits = torch.zeros(VOCAB)
    logits[3], logits[9], logits[20] = 9.0, 8.0, 7.0
    params = make_params(temperature=0.0, min_tokens=2, eos_token_ids=(3,), stop_token_ids=(9, VOCAB + 50))
    sampler = Sampler(1, VOCAB)
    sampler.admit(0, params, [1, 1, 1], 3)
    assert [sampler.sample(logits[None], [0], [i]).token_ids.item() for i in (3, 4, 5)] == [20, 20, 3]
    ignoring = make_params(
        temperature=0.0, min_tokens=2, eos_token_ids=(3,), stop_token_ids=(9,), ignore_eos=True
    )
    assert one(ignoring, logits, [1], 1)[0] == 3  # an ignored EOS ends nothing, so nothing masks it


# -- seeds --------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(sampling, min_size=2, max_size=8), st.integers(0, 2**31), st.randoms())
def test_a_row_is_the_same_in_any_company_and_any_place(rows, seed, shuffler):
    logits = random_logits(seed, len(rows), VOCAB)
    rows = [make_params(**fields, eos_token_ids=(3,)) for fields in rows]
    rows[0] = make_params(temperature=0.0)
    alone = [one(params, logits[i], [i, 1, 2], 1)[0] for i, params in enumerate(rows)]
    sampler = Sampler(10, VOCAB)
    order = list(range(len(rows)))
    for i, params in enumerate(rows):
        sampler.admit(i, params, [i, 1, 2], 1)
    for _ in range(3):
        shuffler.shuffle(order)
        part = order[: shuffler.randint(1, len(order))]
        ids, _ = sampler.sample(logits[part], part, [3] * len(part)).to_host()
        assert ids == [alone[i] for i in part]


def test_seed_and_position_both_change_the_draw():
    logits = torch.zeros(1000)
    sampler = Sampler(2, 1000)
    sampler.admit(0, make_params(seed=1), [], 0)
    sampler.admit(1, make_params(seed=2), [], 0)
    first, second = (
        [sampler.sample(logits[None], [slot], [i]).token_ids.item() for i in range(200)] for slot in (0, 1)
    )
    assert len(set(first)) > 150
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 5
    assert sum(a == b for a, b in zip(first, second[1:], strict=False)) < 5


def test_uniforms_are_uniform_over_seeds_and_over_positions():
    count = 20_000
    for seeds, positions in (
        (np.arange(count, dtype=np.uint64), np.full(count, 7)),
        (np.full(count, 7, dtype=np.uint64), np.arange(count)),
    ):
        u = uniforms(seeds, positions)
        assert u.min() >= 0 and u.max() < 1
        observed = np.bincount((u * 100).astype(int), minlength=100)
        chi_square = ((observed - count / 100) ** 2 / (count / 100)).sum()
        assert chi_square < 160  # 99 degrees of freedom: p is about 1e-4
        assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.03


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.7, "top_k": 12}, {"top_p": 0.8}, {"min_p": 0.1}])
def test_frequencies_follow_the_distribution(changes):
    count, params, logits = 4000, make_params(**changes), random_logits(11, VOCAB, spread=1.5)
    expected = reference(params, logits).numpy() * count
    sampler = Sampler(count, VOCAB)
    for slot in range(count):
        sampler.admit(slot, make_params(**changes, seed=slot), [], 0)
    ids = sampler.sample(logits.expand(count, -1), list(range(count)), [0] * count).token_ids
    observed = torch.bincount(ids, minlength=VOCAB).numpy()
    assert observed[expected == 0].sum() == 0
    common = expected >= 5
    chi_square = ((observed - expected)[common] ** 2 / expected[common]).sum()
    freedom = common.sum() - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom) + 6


# -- slots --------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(0, 6))
def test_a_readmitted_sequence_goes_on_as_if_never_preempted(seed, num_prompt, preempted_after):
    params = make_params(
        repetition_penalty=1.3,
        presence_penalty=0.8,
        frequency_penalty=0.4,
        seed=seed,
        min_tokens=4,
        eos_token_ids=(1,),
    )
    logits = random_logits(seed, 10, 8)
    prompt = [token % 8 for token in range(num_prompt)]

    def run(preempt_at):
        sampler, slot, tokens = Sampler(4, 8), 0, list(prompt)
        sampler.admit(slot, params, tokens, num_prompt)
        for step in range(10):
            if step == preempt_at:
                sampler.admit(0, make_params(frequency_penalty=1.0), [3], 1)  # another takes its slot
                slot = 2
                sampler.admit(slot, params, tokens, num_prompt)
            out = sampler.sample(logits[step, None], [slot], [len(tokens)])
            sampler.append([slot], out.token_ids)
            tokens += out.to_host()[0]
        return tokens

    assert run(None) == run(preempted_after)


def test_penalty_tables_keep_slots_apart_and_are_reused():
    sampler, logits = Sampler(6, VOCAB), torch.zeros(6, VOCAB)
    logits[:, 4], logits[:, 5] = 2.0, 1.0
    slots = list(range(6))
    for round_ in range(3):
        for slot in slots:
            penalty = 2.0 if slot % 2 else 0.0
            sampler.admit(slot, make_params(temperature=0.0, presence_penalty=penalty), [4, 5], 2)
        first = sampler.sample(logits, slots, [2] * 6)
        sampler.append(slots, first.token_ids)
        second = sampler.sample(logits, slots, [3] * 6)
        assert first.token_ids.tolist() == [4] * 6, round_
        assert second.token_ids.tolist() == [4, 5] * 3, round_
        sampler.append(slots[:2], [4, 5])
        assert sampler.sample(logits[:2], [0, 1], [4, 4]).token_ids.tolist() == [
            4,
            0,
        ]  # 4 and 5 are down to 0 and below
    assert len(sampler._counts) <= 6


def test_bad_calls_are_refused_by_name():
    sampler, logits = Sampler(2, VOCAB), torch.zeros(1, VOCAB)
    with pytest.raises(ValueError, match="slot:"):
        sampler.admit(2, make_params(), [1], 1)
    with pytest.raises(ValueError, match="num_prompt_tokens:"):
        sampler.admit(0, make_params(), [1], 2)
    with pytest.raises(ValueError, match="logit_bias:"):
        sampler.admit(0, make_params(logit_bias={VOCAB: 1.0}), [1], 1)
    with pytest.raises(ValueError, match="token_ids:"):
        sampler.admit(0, make_params(presence_penalty=1.0), [VOCAB], 1)
    sampler.admit(0, make_params(), [1], 1)
    with pytest.raises(ValueError, match="slots:"):
        sampler.sample(logits, [1], [1])
    with pytest.raises(ValueError, match="slots:"):
        sampler.sample(logits.expand(2, -1), [0, 0], [1, 1])
    with pytest.raises(ValueError, match="logits:"):
        sampler.sample(logits[:, 1:], [0], [1])
    with pytest.raises(ValueError, match="positions:"):
        sampler.sample(logits, [0], [])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", ["nan", "inf", "nothing"])
def test_logits_that_are_no_distribution_give_an_invalid_token(temperature, bad):
    sampler, logits = Sampler(3, VOCAB), random_logits(4, 3, VOCAB)
    if bad == "nothing":
        logits[1] = -torch.inf
    else:
        logits[1, 8] = float(bad)
    for slot in range(3):
        sampler.admit(slot, make_params(temperature=temperature, top_p=0.9, top_k=9 * slot), [1], 1)
    out = sampler.sample(logits, [0, 1, 2], [1, 1, 1])
    assert 0 <= out.token_ids.min() and out.token_ids.max() < VOCAB
    tokens, _ = out.to_host()
    assert [token == INVALID_TOKEN for token in tokens] == [False, True, False]


# -- log-probabilities --------------------------------------------------------------------------


def test_logprobs_are_of_the_raw_logits_and_stand_beside_their_rows():
    logits = random_logits(6, 4, VOCAB)
    asked = [None, 0, 3, 5]
    sampler = Sampler(4, VOCAB)
    for slot, count in enumerate(asked):
        params = make_params(
            temperature=0.3, logprobs=count, logit_bias={slot: 100.0}, repetition_penalty=1.5
        )
        sampler.admit(slot, params, [1], 1)
    ids, logprobs = sampler.sample(logits, [0, 1, 2, 3], [1] * 4).to_host()
    assert ids == [0, 1, 2, 3]
    wanted = logits.log_softmax(-1)
    assert logprobs[0] is None and logprobs[1].top_ids == []
    for row in (1, 2, 3):
        assert logprobs[row].logprob == pytest.approx(wanted[row, row].item(), abs=1e-6)
        best = wanted[row].topk(asked[row])
        assert logprobs[row].top_ids == best.indices.tolist()
        assert logprobs[row].top_logprobs == pytest.approx(best.values.tolist(), abs=1e-6)
