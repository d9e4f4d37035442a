"""`ds-serve bench` as a stranger types it: against our front over a fake engine, and a rude server."""

import csv
import json
import os
import signal
import threading

import pytest
from fake_server import until
from rude_server import RudeServer

from ds_serve.bench import run as bench_run
from ds_serve.cli import main

SMALL = ["--input-tokens", "8", "--output-tokens", "4", "--no-progress"]


@pytest.fixture(scope="module")
def rude():
    with RudeServer() as server:
        yield server


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def bench(url, *arguments):
    """The exit code."""
    return main(["bench", "--url", url, *SMALL, *map(str, arguments)])


def saved(folder):
    return json.loads((folder / "report.json").read_text())


def test_a_closed_loop_is_counted_printed_and_saved(server, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    assert bench(server.url + "/v1", "--requests", 9, "--concurrency", 3, "--warmup", 2, "--out", out) == 0
    assert len(server.engine.requests) == 11
    assert all(len(request.prompt_token_ids) == 8 for request in server.engine.requests)
    assert all(request.params.ignore_eos for request in server.engine.requests)
    report = saved(out)
    summary = report["summary"]
    assert summary["requests"] | {"examples": 0} == {
        "good": 9,
        "failed": 0,
        "interrupted": 0,
        "success": 1.0,
        "failures": {},
        "examples": 0,
    }
    assert summary["tokens"]["output"] == 36 and summary["tokens"]["input"] == 72
    assert (summary["tokens"]["cached"], summary["tokens"]["host_cached"]) == (18, 9)
    latency = summary["latency_ms"]
    assert 0 < latency["ttft"]["p50"] <= latency["e2e"]["p50"] <= latency["e2e"]["max"]
    assert report["target"]["engine"]["vocab_size"] == 400 and report["target"]["vocab"] == 400
    with open(out / "requests.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["index"] for row in rows] == [str(index) for index in range(9)]
    assert {row["output_tokens"] for row in rows} == {"4"} and {row["failure"] for row in rows} == {""}
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    for word in ("9 requests", "9 good (100.00 %)", "p99.9", "18 of 72 (25.00 %), 9 from host", "server: "):
        assert word in text


@pytest.mark.parametrize(
    ("kind", "model", "detail"),
    [
        ("http 429", "http 429", "the queue is full"),
        ("http 500", "http 500", "oops"),
        ("cut", "cut", ""),
        ("cut", "cut cleanly", "before its last event"),
        ("error event", "error event", "the engine is gone"),
        ("bad json", "bad json", ""),
        ("not streamed", "not streamed", "application/json"),
        ("disconnected", "disconnected", ""),
        ("bad http", "bad http", ""),
        ("timeout", "timeout", "0.2 s"),
    ],
)
def test_failures_are_told_apart(rude, tmp_path, capsys, kind, model, detail):
    timeout = 0.2 if kind == "timeout" else 20
    code = bench(
        rude.url, "--model", model, "--requests", 2, "--timeout", timeout, "--out", tmp_path, "--no-plot"
    )
    requests = saved(tmp_path)["summary"]["requests"]
    assert (code, requests["failures"], requests["good"]) == (1, {kind: 2}, 0)
    assert detail in requests["examples"][kind]
    assert f"{kind}: 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("error in reply", "whole error"),
        ("bad json", "whole nothing"),
        ("bad json", "whole bad"),
        ("cut", "whole cut"),
    ],
)
def test_failures_of_whole_replies_are_told_apart(rude, tmp_path, kind, model):
    options = ["--no-stream", "--requests", 2, "--out", tmp_path, "--no-plot"]
    assert bench(rude.url, "--model", model, *options) == 1
    assert saved(tmp_path)["summary"]["requests"]["failures"] == {kind: 2}


def test_a_port_where_nobody_listens(capsys):
    assert bench("http://127.0.0.1:9/v1") == 1
    assert "127.0.0.1:9" in capsys.readouterr().err
    assert bench("http://127.0.0.1:9/v1", "--model", "m", "--requests", 2) == 1
    assert "connect: 2" in capsys.readouterr().out
    assert bench("http://127.0.0.1:9/v1", "--model", "m", "--warmup", 1) == 1
    assert "warm-up" in capsys.readouterr().err


def test_without_usage_pieces_are_counted_and_said(rude, tmp_path, capsys):
    assert bench(rude.url, "--requests", 2, "--out", tmp_path, "--no-plot") == 0
    summary = saved(tmp_path)["summary"]
    assert summary["tokens"]["output"] == 6 and summary["tokens"]["requests_counted_by_pieces"] == 2
    assert summary["latency_ms"]["tpot"].keys() == summary["latency_ms"]["itl"].keys() >= {"p50", "max"}
    text = capsys.readouterr().out
    assert "good at http" in text and "no usage came" in text and "cached" not in text


def test_the_key_is_sent_and_not_saved(rude, tmp_path, monkeypatch):
    key, file = "sk-secret", tmp_path / "key"
    file.write_text(f"# ours\n{key}\n")
    rude.authorizations.clear()
    assert bench(rude.url, "--requests", 1, "--api-key-file", file, "--out", tmp_path / "o", "--no-plot") == 0
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    assert bench(rude.url, "--requests", 1) == 0
    assert rude.authorizations == ["Bearer sk-secret", "Bearer sk-other"]
    assert key not in (tmp_path / "o" / "report.json").read_text()


def test_an_open_loop_counts_from_the_intended_time(server, tmp_path):
    """One at a time on a slow server: later requests are sent late, and their latency says so."""
    server.engine.step_s = 0.002
    options = ["--rate", 2000, "--concurrency", 1, "--requests", 5, "--out", tmp_path, "--no-plot"]
    assert bench(server.url + "/v1", *options) == 0
    rows = saved(tmp_path)["requests"]
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 4]
    for row, before in zip(rows[1:], rows, strict=False):
        assert row["sent_s"] >= before["end_s"] and row["intended_s"] < before["end_s"]
    for row in rows:
        assert row["e2e_ms"] == pytest.approx(1000 * (row["end_s"] - row["intended_s"]), abs=0.01)
    assert saved(tmp_path)["summary"]["latency_ms"]["late"]["max"] > 0


def test_the_same_seed_is_the_same_workload(server):
    def sent(*arguments):
        server.engine.requests.clear()
        assert bench(server.url + "/v1", "--requests", 4, "--concurrency", 1, *arguments) == 0
        return [request.prompt_token_ids for request in server.engine.requests]

    assert sent("--seed", 3) == sent("--seed", 3) != sent("--seed", 4)


def test_a_trace_is_replayed(server, tmp_path):
    rows = [{"t": 0.01 * i, "in_len": 12, "out_len": 1 + i, "block": 8, "hash_ids": [3]} for i in range(3)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["bench", "--url", server.url + "/v1", "--trace", tmp_path / "t.jsonl", "--out", tmp_path]
    assert main([*map(str, arguments), "--trace-speed", "2", "--no-plot"]) == 0
    made = server.engine.requests
    assert len({tuple(request.prompt_token_ids[:8]) for request in made}) == 1
    assert len({tuple(request.prompt_token_ids) for request in made}) == 3
    assert sorted(request.params.max_tokens for request in made) == [1, 2, 3]
    assert [row["intended_s"] for row in saved(tmp_path)["requests"]] == [0.0, 0.005, 0.01]


@pytest.mark.parametrize("endpoint", ["chat", "batch", "completions"])
def test_each_endpoint_whole_and_streamed(server, tmp_path, endpoint):
    options = ["--endpoint", endpoint, "--requests", 2, "--out", tmp_path, "--no-plot"]
    each = 3 if endpoint == "batch" else 1
    for stream in ("--stream", "--no-stream"):
        server.engine.requests.clear()
        sized = ["--batch-size", 3] if endpoint == "batch" else []
        assert bench(server.url + "/v1", *options, *sized, stream, "--extra", '{"seed": 5}') == 0
        assert len(server.engine.requests) == 2 * each
        summary = saved(tmp_path)["summary"]
        assert summary["tokens"]["output"] == 8 * each
        assert bool(summary["latency_ms"]["ttft"]) == (stream == "--stream")
        assert endpoint != "batch" or not summary["latency_ms"]["tpot"]


def test_a_missed_goal_is_exit_code_1(server, tmp_path, capsys):
    options = ["--requests", 3, "--slo", "success=100%", "--slo", "p99_ttft=0.0001ms"]
    assert bench(server.url + "/v1", *options, "--out", tmp_path, "--no-plot") == 1
    assert [goal["met"] for goal in saved(tmp_path)["goals"]] == [True, False]
    assert "p99_ttft=0.0001ms MISSED" in capsys.readouterr().out
    assert bench(server.url + "/v1", "--requests", 3, "--slo", "p99_ttft=60s") == 0


def test_a_sweep_ends_where_a_goal_breaks(server, tmp_path, capsys):
    url, sweep = server.url + "/v1", ["--sweep", "concurrency=1,2", "--requests", 3]
    assert bench(url, *sweep, "--slo", "max_e2e=60s", "--out", tmp_path) == 0
    report = saved(tmp_path)
    assert report["highest_good"] == 2 and [step["level"] for step in report["steps"]] == [1, 2]
    assert [goal["goal"] for goal in report["steps"][0]["goals"]] == ["max_e2e=60s", "success=99%"]
    assert saved(tmp_path / "concurrency-2")["summary"]["requests"]["good"] == 3
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    prompts = {tuple(request.prompt_token_ids) for request in server.engine.requests}
    assert len(prompts) == 6  # the second level finds nothing of the first in a cache
    assert bench(url, *sweep, "--slo", "rps=1000000000") == 1
    assert "no level meets the goals" in capsys.readouterr().out


def test_the_mission_rows(server, tmp_path, capsys):
    options = ["--profile", "mission", "--requests", 64, "--concurrency", 8, "--out", tmp_path, "--no-plot"]
    assert main(["bench", "--url", server.url + "/v1", "--input-tokens", "9", *map(str, options)]) == 0
    text = capsys.readouterr().out
    assert "single: 2,000 TPS with TP99 50 ms (goal, 4 cores); measured" in text
    assert "batch:  1,000 TPS (goal, 4 cores); measured" in text
    assert all(request.params.max_tokens == 1 for request in server.engine.requests)
    assert len({tuple(request.prompt_token_ids) for request in server.engine.requests}) == 64
    assert saved(tmp_path / "batch")["summary"]["tokens"]["input"] == 9 * 64


def test_ctrl_c_reports_what_is_there(server, tmp_path, capsys):
    server.engine.step_s = 0.001

    def interrupt():
        until(lambda: len(server.engine.requests) > 4)
        server.engine.hold.set()  # so that some are running
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    code = bench(server.url + "/v1", "--duration", 60, "--concurrency", 2, "--out", tmp_path, "--no-plot")
    thread.join()
    requests = saved(tmp_path)["summary"]["requests"]
    assert code == 130 and requests["good"] >= 1 and requests["interrupted"] == 2 and not requests["failed"]
    assert "interrupted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--rate", "0"], "--rate"),
        (["--input-tokens", "many"], "--input-tokens"),
        (["--slo", "fast"], "--slo"),
        (["--trace", "/nowhere"], "/nowhere"),
        (["--prompts", "/nowhere"], "/nowhere"),
        (["--api-key-file", "/nowhere"], "--api-key-file"),
        (["--extra", "[1]"], "--extra"),
        (["--extra", "{"], "--extra"),
        (["--sweep", "rate=1:4"], "--slo"),
        (["--out", "/proc/none"], "--out"),
        (["--concurrency", "x"], "--concurrency"),
    ],
)
def test_bad_arguments_are_exit_code_2(rude, capsys, arguments, word):
    try:
        code = main(["bench", "--url", rude.url, *arguments])
    except SystemExit as exit:  # argparse's own
        code = exit.code
    error = capsys.readouterr().err
    assert code == 2 and word in error and "Traceback" not in error


def test_a_missing_package_is_one_sentence(rude, capsys, monkeypatch):
    monkeypatch.setattr(bench_run.importlib.util, "find_spec", lambda name: None)
    assert bench(rude.url) == 2
    assert "aiohttp is not installed: pip install 'ds_serve[bench]'" in capsys.readouterr().err
