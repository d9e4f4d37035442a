"""`ds-serve check` and `serve --check` on one rank: right models match, wrong ones are refused by layer."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from broken import break_where_asked
from tiny_models import build, save
from tiny_quantised import quantise

from ds_serve import checking, demo
from ds_serve.attention.builder import load_ops
from ds_serve.attention.interface import UnsupportedModelError
from ds_serve.cli import main
from ds_serve.config import Settings
from ds_serve.model.certificate import AS_IS, FUSED, Row
from ds_serve.model.compare import judge_local, judge_total
from ds_serve.model.errors import ModelLoadError
from ds_serve.rank import build_local_engine
from ds_serve.worker.certify import LENGTHS

sys.path.append(str(Path(__file__).parents[1] / "ranks"))
from sharding_cases import CASES  # noqa: E402
from sharding_cases import FUSED as WIDE

HERE = Path(__file__).parent
RIGHT = ["llama-tied", "gemma2", "gemma3n", "mixtral", "deepseek_v3"]
if os.environ.get("DS_SERVE_TEST_ALL") == "1":
    RIGHT += ["gpt2", "gpt_oss", "opt", "phi3-1kv", "llama4", "dbrx"]
SMALL = {"num_blocks": 64, "max_model_len": 160}
can_fuse = pytest.mark.skipif(
    load_ops() is None or not torch.ops.ds_serve.has_avx512_bf16(), reason="needs a compiler and AVX512-BF16"
)


def saved(case, folder, spoil=None, dtype=torch.float32) -> str:
    model = build(case.architecture, dtype, **case.overrides)
    if spoil:
        model.config.spoil = spoil
    return save(model, folder)


# -- right models ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_model_matches(name, tmp_path):
    found = checking.check(Settings(model=saved(CASES[name], tmp_path), **SMALL))
    assert found.matches, found.table()
    assert [row.name for row in found.rows] == ["embedding", "layer 0", "layer 1", "layer 2", "head"]
    assert found.rows[1].kind.endswith(("DecoderLayer", "Block"))
    assert all(row.local < 1e-5 and row.total < 1e-5 for row in found.rows)
    assert found.streamed == (name != "gemma3n")  # whose layers read the token embeddings besides
    assert found.same_argmax == 1 and found.greedy.tokens == 128
    assert not found.greedy.mismatches and not found.greedy.ties
    assert found.probe_tokens == sum(LENGTHS) >= 256


def test_half_precision_may_flip_an_expert_and_matches(tmp_path):
    found = checking.check(Settings(model=saved(CASES["mixtral"], tmp_path, dtype=torch.bfloat16), **SMALL))
    assert found.matches, found.table()
    assert all(row.over <= 3 for row in found.rows)


@can_fuse
def test_fused_layers_match_and_the_certificate_says_which_they_are(tmp_path):
    found = checking.check(
        Settings(model=saved(WIDE["fused-llama"], tmp_path, dtype=torch.bfloat16), **SMALL)
    )
    assert found.matches, found.table()
    assert [row.done for row in found.rows] == [AS_IS, FUSED, FUSED, FUSED, FUSED]
    off = checking.check(Settings(model=str(tmp_path), injection="off", **SMALL))
    assert off.matches and {row.done for row in off.rows} == {AS_IS, "mode is off"}


def test_a_checkpoint_that_is_dense_once_read_is_checked_against_its_dense_form(tmp_path):
    found = checking.check(Settings(model=quantise("fp8", tmp_path, torch.bfloat16), **SMALL))
    assert found.matches and found.dtype == "bfloat16", found.table()
    assert found.rows[1].local > 1e-3  # bfloat16 against float32, not against itself


def test_a_checkpoint_that_stays_quantised_has_no_original(tmp_path, capsys):
    pytest.importorskip("torchao")
    assert main(["check", quantise("torchao-int8", tmp_path)]) == 2
    assert "its weights stay as torchao quantised them" in capsys.readouterr().err


# -- wrong ones --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "spoil", "dtype"),
    [
        pytest.param(WIDE["fused-llama"], ["fused gate and up", 1], torch.bfloat16, marks=can_fuse),
        pytest.param(WIDE["fused-qwen3"], ["fused norm", 2], torch.bfloat16, marks=can_fuse),
        (CASES["llama"], ["heads", 0], torch.bfloat16),
        (CASES["llama"], ["nan", 1], torch.float32),
        (CASES["mixtral"], ["experts", 1], torch.float32),
        (CASES["mixtral"], ["experts", 1], torch.bfloat16),
        (CASES["deepseek_v3"], ["experts", 2], torch.bfloat16),
    ],
)
def test_a_wrong_layer_is_named_and_only_it(case, spoil, dtype, tmp_path, monkeypatch):
    break_where_asked(monkeypatch)
    monkeypatch.setattr("ds_serve.model.loader.verify_paged", lambda *_: None)  # it refuses NaN by itself
    folder = saved(case, tmp_path, spoil, dtype)
    found = checking.check(Settings(model=folder, **SMALL))
    assert found.first_failure.startswith(f"layer {spoil[1]} ({found.rows[1].kind}"), found.table()
    if spoil[0] != "nan":  # which goes on through all layers
        assert [row.name for row in found.rows if row.fails == "local"] == [f"layer {spoil[1]}"]


def test_with_the_setting_a_wrong_layer_is_a_load_error(tmp_path, monkeypatch):
    break_where_asked(monkeypatch)
    folder = saved(CASES["llama"], tmp_path, ["heads", 2])
    build_local_engine(Settings(model=demo.model_path(), check=True, num_blocks=64)).close()
    with pytest.raises(ModelLoadError, match=r"layer 2 \(LlamaDecoderLayer.* computes something else"):
        build_local_engine(Settings(model=folder, check=True, **SMALL))
    build_local_engine(Settings(model=folder, **SMALL)).close()  # unasked, nobody looks


def test_a_wrong_token_is_a_mismatch(tmp_path, monkeypatch, capsys):
    folder, continue_ = saved(CASES["llama"], tmp_path), checking._continue

    def wrong(engine, prompts):
        outputs = continue_(engine, prompts)
        outputs[3][5] = (outputs[3][5] + 1) % 160
        return outputs

    monkeypatch.setattr(checking, "_continue", wrong)
    assert main(["check", folder, "--num-blocks", "64"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("MISMATCH: greedy tokens differ: prompt 3 of 17 tokens, new token 5:")


# -- bounds ------------------------------------------------------------------------------------


def test_bounds_are_the_yardsticks_and_count_tokens():
    row, eps = Row(name="layer 0"), 2**-7
    found, yardstick = torch.full((300,), 0.01), torch.full((300,), 0.01)
    judge_local(row, found, yardstick, eps, has_experts=True)
    assert not row.fails and row.over == 0
    found[:3] = 0.5
    judge_local(row, found, yardstick, eps, has_experts=True)
    assert row.over == row.over_allowed == 3 and not row.fails
    judge_local(row, found, yardstick, eps, has_experts=False)
    assert row.over == 3 and row.fails == "local"
    found[:4] = math.nan
    judge_local(row, found, yardstick, eps, has_experts=True)
    assert row.over == 4 and row.fails == "local"
    yardstick[10] = 0.9  # another token that takes another expert in the served dtype
    judge_local(row, found, yardstick, eps, has_experts=True)
    assert row.over == row.over_allowed == 4 and not row.fails


def test_a_hidden_state_that_changes_between_layers_is_found():
    row = Row(name="layer 0")
    found = torch.full((300,), 1e-6)
    found[7] = math.nan
    judge_total(row, found, None, 2**-23, has_experts=False)
    assert row.fails == "total"
    found[7] = 0.5
    judge_total(row, found, None, 2**-23, has_experts=True)
    assert not row.fails
    judge_total(row, found + 1, None, 2**-23, has_experts=True)
    assert row.fails == "total"


def test_a_model_without_a_list_of_layers_is_refused(tmp_path, monkeypatch, capsys):
    def none(module):
        raise UnsupportedModelError("no list")

    monkeypatch.setattr("ds_serve.worker.certify.stack_name", none)
    assert main(["check", "demo", "--num-blocks", "64"]) == 2
    assert "has no list of its decoder layers" in capsys.readouterr().err


# -- the command -------------------------------------------------------------------------------


def test_exit_codes_and_json(tmp_path, monkeypatch, capsys):
    break_where_asked(monkeypatch)
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    saved(CASES["mixtral"], right)
    saved(CASES["mixtral"], wrong, ["experts", 1])
    file = tmp_path / "found.json"
    assert main(["check", str(right), "--num-blocks", "64", "--json", str(file)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "MATCH"
    written = json.loads(file.read_text())
    assert written["verdict"] == "match" and written["reason"] == ""
    assert written["dtype"] == "float32" and written["kind"] == "MixtralForCausalLM"
    assert written["rows"][1]["verdict"] == "ok" and written["rows"][1]["kind"] == "MixtralDecoderLayer"
    assert written["greedy"]["tokens"] == 128 and written["memory"][0]["weights"] > 10_000

    assert main(["check", str(wrong), "--num-blocks", "64", "--json", str(file)]) == 1
    assert "MISMATCH: layer 1 (MixtralDecoderLayer" in capsys.readouterr().out.splitlines()[-1]
    written = json.loads(file.read_text())
    assert written["verdict"] == "mismatch" and written["rows"][2]["verdict"] == "local"
    assert [row["verdict"] for row in written["rows"][:2]] == ["ok", "ok"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["/nowhere"], "/nowhere"),
        (["demo", "--json", "/nowhere/x.json"], "--json /nowhere/x.json"),
        (["demo", "--max-model-len", "100000"], "max_model_len is 100000"),
        (["demo", "--master-port", "7777"], "--master_port: for several ranks"),
    ],
)
def test_what_cannot_be_checked_is_code_2(arguments, word, capsys):
    assert main(["check", *arguments]) == 2
    assert word in capsys.readouterr().err


def test_a_model_that_is_not_served_is_code_2_and_a_crash_is_not(tmp_path, monkeypatch, capsys):
    build("mamba", num_hidden_layers=2, state_size=4).save_pretrained(tmp_path)
    assert main(["check", str(tmp_path)]) == 2
    assert "Mamba" in capsys.readouterr().err

    def crash(*_):
        raise RuntimeError("out of order")

    monkeypatch.setattr(checking, "_continue", crash)
    assert main(["check", "demo", "--num-blocks", "64"]) == 3
    assert "RuntimeError: out of order" in capsys.readouterr().err


# -- the server --------------------------------------------------------------------------------


@pytest.mark.skipif(os.environ.get("DS_SERVE_TEST_ALL") != "1", reason="the start of a server takes long")
def test_serve_with_check_serves_what_is_right(tmp_path):
    sys.path.append(str(HERE.parent / "serve"))
    from real_server import Server

    server = Server(tmp_path / "log", "--check")
    try:
        assert server.chat(max_tokens=4).choices[0].message.content
    finally:
        server.stop()
    said = (tmp_path / "log").read_text()
    assert "layer 7    LlamaDecoderLayer" in said and "\nMATCH" in said


def test_serve_with_check_refuses_what_is_wrong(tmp_path):
    folder = saved(CASES["llama"], tmp_path / "model", ["heads", 1])
    shutil.copy(Path(demo.model_path(), "tokenizer.json"), folder)
    # Read by the engine's process too, as python starts.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if any(name.endswith('ds_serve.rank') for name in sys.orig_argv):\n"
        f"    sys.path.insert(0, {str(HERE)!r})\n"
        "    import broken\n"
        "    broken.break_where_asked()\n"
    )
    command = [
        sys.executable,
        "-m",
        "ds_serve",
        "serve",
        folder,
        "--port",
        "0",
        "--num-blocks",
        "64",
        "--check",
    ]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode not in (0, -9)
    assert "is not what transformers computes: layer 1 (LlamaDecoderLayer" in done.stderr
    assert "is served on" not in done.stdout
