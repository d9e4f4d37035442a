"""benchmarks/gpu.py on a tiny model on the CPU: every figure comes out, and none of a wrong engine."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu
import gpu_check
import gpu_kernels
from gpu_model import CHECK_LAYERS, FULL, Ceilings, Floors, config_of, directory
from gpu_profile import covered, plain, table
from gpu_run import Answer

from ds_serve.messages import Output

MEASURED = "check,decode,ttft,rate,host,profile"


def test_every_figure_comes_out(tmp_path, capfd):
    assert gpu.main(["--dry-run", "--folder", str(tmp_path), "--parts", MEASURED]) == 0
    out = capfd.readouterr().out
    assert "float32, plain path: 6 answers of 6 tokens are those of generate" in out
    assert "bfloat16, fast path: log-probabilities of" in out and "draw the same" in out
    assert "-- decode step, 6 at once" in out and "from first to last kernel" in out
    rows = out.split("x floor\n")[1].splitlines()
    assert len(rows) == len(gpu.GOALS["one"])
    timed = {row[:32]: row[32:].split()[0] for row in rows if not row.startswith("start")}
    assert all(float(figure) > 0 for figure in timed.values()), timed


@pytest.fixture
def other(tmp_path, monkeypatch):
    """transformers gets another model than the engine: one value projection differs a little."""
    right = directory(config_of(True, CHECK_LAYERS), torch.device("cpu"), tmp_path)
    wrong = shutil.copytree(right, tmp_path / "wrong")
    [file] = wrong.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.v_proj.weight"] *= 1.5
    save_file(tensors, file, metadata={"format": "pt"})

    class Other(gpu_check.Original):
        def __init__(self, folder, *rest):
            super().__init__(str(wrong), *rest)

    monkeypatch.setattr(gpu_check, "Original", Other)
    return right


def test_other_tokens_than_those_of_generate_are_refused(other, tmp_path, capfd):
    with pytest.raises(SystemExit, match=r"nothing was timed: float32, plain path: after a prompt of \d+"):
        gpu.main(["--dry-run", "--folder", str(tmp_path), "--parts", "check,decode"])
    assert "decode step" not in capfd.readouterr().out


def test_log_probabilities_too_far_off_are_refused(other, monkeypatch):
    monkeypatch.setattr(gpu_check, "_tokens_of_float32", lambda *_: "")
    job = {"folder": other, "dry": True, "tp": 1, "pp": 1, "parts": [], "settings": {}}
    with pytest.raises(gpu_check.CheckFailed, match="bfloat16, fast path: log-probabilities"):
        gpu_check.check(job)


def test_other_tokens_of_the_fast_path_are_refused_where_float32_is_sure():
    class Sure:
        """Token 5 is best by far, 6 and 7 are nearly equal."""

        def logits(self, tokens):
            return torch.tensor([[0, 0, 0, 0, 0, 9.0, 4.0, 3.9]]).expand(len(tokens), -1)

    def answers(*tokens: int) -> list[Answer]:
        return [Answer(0.0, [(1.0, Output(id="a", token_ids=list(tokens)))])]

    same = gpu_check._same_where_clear(Sure(), [[1]], answers(5, 6, 6), answers(5, 7, 1), 0.1)
    assert "the same 1 tokens of 3, up to 1 answers' first token" in same
    with pytest.raises(gpu_check.CheckFailed, match="1 tokens and 1 more the fast path drew 6"):
        gpu_check._same_where_clear(Sure(), [[1]], answers(5, 6), answers(5, 5), 0.1)
    with pytest.raises(gpu_check.CheckFailed, match="agree in 0 of 5 tokens only"):
        gpu_check._same_where_clear(Sure(), [[1]], answers(6, 6, 6, 6, 6), answers(7, 6, 6, 6, 6), 0.1)


def test_floors_are_those_worked_out_by_hand():
    floors = Floors(config_of(False), Ceilings(4.27e12, 55.4e9, 790e12), FULL, 1, 1)
    assert [round(floors.step(rows), 1) for rows in FULL.batches] == [3.5, 4.6, 8.0]
    assert [round(floors.cold(length)) for length in FULL.long] == [38, 167]
    assert round(floors.device_hit(8192)) == 4 and round(floors.host_hit(8192)) in (23, 24)
    halves = Floors(config_of(False), Ceilings(4.27e12, 55.4e9, 790e12), FULL, 2, 1)
    assert halves.step(64) == pytest.approx(floors.step(64) / 2)
    stages = Floors(config_of(False), Ceilings(4.27e12, 55.4e9, 790e12), FULL, 1, 2)
    assert stages.rate(64) == pytest.approx(2 * floors.rate(64))


def test_kernels_are_added_up_by_name():
    events = [(0.0, 600.0, "void gemm<64, tile<2>>(float*)"), (500.0, 800.0, "gemm"), (900.0, 1000.0, "copy")]
    assert covered([(start, end) for start, end, _ in events]) == 900.0
    assert plain(events[0][2]) == "gemm"
    lines = table(events, 2).splitlines()
    assert lines[0] == "0.50 ms from first to last kernel, idle 10%, 2 kernels"
    assert lines[1].split() == ["0.450", "ms", "90%", "1.0", "x", "gemm"]


def test_parts_that_there_are_not_are_refused():
    with pytest.raises(SystemExit, match="--parts: no speed; there are check,"):
        gpu.main(["--dry-run", "--parts", "speed"])


def test_questions_of_tuning_are_answered_or_say_why_not(capfd):
    gpu_kernels.main(["--dry-run", "--only", "launch,copy,gemm,lt,write"])
    lines = capfd.readouterr().out.splitlines()
    assert "cuBLAS model merged M=8" in "\n".join(lines)
    answers = [line for line in lines if line[54:57] == " us"]
    assert all(float(line[44:54]) > 0 for line in answers) and len(answers) > 25
    done = {line.split()[1].rstrip(":") for line in lines if line.startswith("--")}
    assert done == {"launch", "copy", "gemm", "lt", "write"}
    assert any("-- lt: FAILED RuntimeError" in line for line in lines) or torch.cuda.is_available()
