"""What the load test sends and when: lengths, arrivals, prompts, traces; options that do not fit together."""

import gzip
import json
from itertools import islice

import numpy as np
import pytest

from ds_serve.bench.arrivals import gamma, poisson
from ds_serve.bench.endpoints import endpoint
from ds_serve.bench.lengths import Lengths
from ds_serve.bench.options import Options
from ds_serve.bench.slo import Goal
from ds_serve.bench.sweep import Levels
from ds_serve.bench.tokens import LOWEST_ID
from ds_serve.bench.traces import read_trace
from ds_serve.bench.workload import Workload, material

IDS = 1000


def prompts(indexes=range(4), vocab=IDS, step=0, **options):
    source = material(Options(**options), vocab).reseeded(step).source
    return [source.prompt(index) for index in indexes]


def lengths(text, count=4000):
    rng = np.random.default_rng(3)
    return [Lengths.parse(text).draw(rng) for _ in range(count)]


def test_lengths_follow_their_distribution():
    assert set(lengths("128", 5)) == {128}
    assert set(lengths("2:5")) == {2, 3, 4, 5}
    assert np.mean(lengths("exp:100")) == pytest.approx(100, rel=0.1)
    assert np.std(lengths("normal:100,10")) == pytest.approx(10, rel=0.1)
    assert np.median(lengths("lognormal:100,0.5")) == pytest.approx(100, rel=0.1)
    assert min(lengths("normal:2,50")) == 1
    for text in ["128", "2:5", "exp:100", "normal:100,10", "lognormal:100,0.5"]:
        assert str(Lengths.parse(text)) == text


@pytest.mark.parametrize("text", ["", "0", "a", "5:2", "1.5", "normal:3", "exp:nan", "lognormal:3,-1"])
def test_what_is_no_length_is_refused(text):
    with pytest.raises(ValueError):
        Lengths.parse(text)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 16.0])
def test_gaps_have_the_rate_and_the_burstiness_asked_for(burstiness):
    times = np.array(list(islice(gamma(50.0, burstiness, seed=5), 40_000)))
    gaps = np.diff(times)
    assert gaps.min() >= 0 and gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)


def test_arrivals_repeat_with_their_seed():
    first, again, other = (list(islice(poisson(9.0, seed), 2000)) for seed in (1, 1, 2))
    assert first == again != other


def test_the_same_seed_gives_the_same_bytes():
    def bodies(seed):
        options = Options(seed=seed, input_tokens=Lengths.parse("4:90"), output_tokens=Lengths.parse("1:9"))
        workload = Workload(options, material(options, IDS), endpoint(options, "m"))
        return [workload.body(index) for index in (3, 0, -1, 2)]

    assert bodies(7) == bodies(7) != bodies(8)
    assert len(set(bodies(7))) == 4


def test_random_prompts_are_ids_of_the_vocabulary_or_words():
    made = prompts(range(200), vocab=40, input_tokens=Lengths.parse("64"))
    used = {token for prompt in made for token in prompt.content}
    assert used == set(range(LOWEST_ID, 40)) and all(len(prompt.content) == 64 for prompt in made)
    worded = prompts(endpoint="chat", input_tokens=Lengths.parse("12"))[0].content
    assert len(worded.split(" ")) == 12


def test_groups_share_their_prefix_and_nothing_else():
    options = {"shared_prefix": 32, "groups": 2, "input_tokens": Lengths.parse("40")}
    a, b, c, d = (prompt.content for prompt in prompts(**options))
    assert a[:32] == c[:32] != b[:32] == d[:32] and a[32:] != c[32:]
    later = prompts(step=1, **options)[0].content
    assert later[:32] == a[:32] and later[32:] != a[32:]
    warm = prompts([-1], **options)[0].content
    assert warm[:32] == b[:32] and warm[32:] not in (b[32:], d[32:])
    assert len(prompts(shared_prefix=200)[0].content) == 201


def write_trace(path, rows):
    data = "\n".join(json.dumps(row) for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


ROWS = [
    {"t": 2.0, "in_len": 10, "out_len": 3, "block": 4, "hash_ids": [5, 6], "session": 1},
    {"t": 0.0, "in_len": 9, "out_len": 2, "block": 4, "hash_ids": [5, 7]},
    {"t": 4.0, "in_len": 6, "out_len": 1, "block": 4, "hash_ids": [5, 6]},
    {"t": 5.0, "in_len": 50, "out_len": 1},
]


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_a_traces_equal_ids_are_equal_blocks(tmp_path, name):
    options = Options(trace=write_trace(tmp_path / name, ROWS), max_input_tokens=20, trace_speed=4.0)
    options.check()
    read = material(options, IDS)
    assert read.left_out == 1
    first, second, third = (read.source.prompt(index) for index in range(3))
    assert [len(p.content) for p in (first, second, third)] == [9, 10, 6]
    assert [p.output_tokens for p in (first, second, third)] == [2, 3, 1]
    assert first.content[:4] == second.content[:4] and first.content[4:8] != second.content[4:8]
    assert second.content[:6] == third.content  # the third's last block is cut
    assert read.source.prompt(3).content[:8] == first.content[:8]  # begins again
    assert read.source.prompt(-3).content[:4] != first.content[:4]  # a warm-up fills no cache
    workload = Workload(options, read, endpoint(options, "m"))
    assert list(workload.times()) == [0.0, 0.5, 1.0] and workload.requests == 3


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("{", "line 1"),
        ('{"t": 1}', "in_len"),
        ('{"t":-1,"in_len":1,"out_len":1}', "line 1"),
        ("", "no request"),
    ],
)
def test_a_bad_trace_is_named(tmp_path, line, word):
    (tmp_path / "t.jsonl").write_text(line)
    with pytest.raises(ValueError, match=word):
        read_trace(str(tmp_path / "t.jsonl"))


def test_a_file_that_is_not_there_is_named(tmp_path):
    for name in ("none.jsonl", "none.jsonl.gz"):
        with pytest.raises(ValueError, match="--trace: .*none"):
            read_trace(str(tmp_path / name))


def test_prompts_come_from_a_file(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": [3, 4], "output_tokens": 5, "note": 1}\n')
    first, second, third = prompts(range(3), prompts=str(path))
    assert (first.content, second.content, third.content) == ("a", [3, 4], "a")
    assert (first.output_tokens, second.output_tokens) == (64, 5)


@pytest.mark.parametrize(
    ("row", "kind", "word"),
    [
        ({}, "completions", "line 1: must have prompt or messages"),
        ({"messages": [{"role": "user", "content": "a"}]}, "completions", "need --endpoint chat"),
        ({"prompt": [1]}, "chat", "token ids need"),
        ({"prompt": "a", "output_tokens": 0}, "chat", "output_tokens"),
    ],
)
def test_a_bad_prompt_is_named(tmp_path, row, kind, word):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(ValueError, match=word):
        material(Options(prompts=str(path), endpoint=kind), IDS)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"prompts": "a", "trace": "b"}, "--prompts and --trace"),
        ({"arrival": "gamma"}, "--arrival"),
        ({"rate": 1.0, "burstiness": 2.0}, "--burstiness"),
        ({"trace_speed": 2.0}, "--trace-speed"),
        ({"trace": "a", "trace_speed": 2.0, "rate": 1.0}, "--trace-speed: --rate"),
        ({"max_input_tokens": 3}, "--max-input-tokens"),
        ({"batch_size": 3}, "--batch-size"),
        ({"groups": 3}, "--groups"),
        ({"trace": "a", "shared_prefix": 3}, "--shared-prefix"),
        ({"prompts": "a", "input_tokens": Lengths("fixed", 3)}, "--input-tokens"),
        ({"trace": "a", "output_tokens": Lengths("fixed", 3)}, "--output-tokens"),
        ({"endpoint": "chat", "prompt_form": "ids"}, "--prompt-form"),
        ({"sweep": Levels.parse("rate=1:4")}, "--slo"),
        ({"sweep": Levels.parse("rate=1:4"), "slo": (Goal.parse("rps=1"),), "rate": 2.0}, "--rate"),
        ({"profile": "mission", "rate": 2.0}, "--profile: it sets --rate"),
        ({"url": "localhost:8000"}, "--url"),
    ],
)
def test_options_that_do_not_fit_together_are_refused_by_name(options, word):
    with pytest.raises(ValueError, match=word):
        Options(**options).check()
