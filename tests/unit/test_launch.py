"""What launchers say to a rank, and what is said to DeepSpeed's launcher."""

import argparse
import base64
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from ds_serve import launch
from ds_serve.config import Settings

MASTER = {"MASTER_ADDR": "node-1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    """A CPU machine of four cores, without launchers' variables and without numactl."""
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "OMP_NUM_THREADS", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launch, "_DEVICE_FILES", ())
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    monkeypatch.setattr(launch.psutil, "cpu_count", lambda logical: 4)
    monkeypatch.setattr(launch.shutil, "which", lambda _: None)


def settings(tp=2, pp=1, **fields):
    return Settings(model="/m", tensor_parallel=tp, pipeline_parallel=pp, **fields)


def line(options=None, module="ds_serve.rank", arguments=("/folder", "7"), **fields):
    return launch.several(settings(**fields), options or launch.Options(), module, arguments).command


def devices(command):
    """Of the ranks that the local launcher is to start."""
    [world] = [part for part in command if part.startswith("--world_info=")]
    return json.loads(base64.urlsafe_b64decode(world.removeprefix("--world_info=")))["localhost"]


# -- ranks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environ",
    [
        {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"},
        {
            "OMPI_COMM_WORLD_RANK": "3",
            "OMPI_COMM_WORLD_SIZE": "4",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        },
        {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4"},
    ],
)
def test_a_rank_knows_itself_and_tells_torch(environ):
    environ |= MASTER
    assert launch.ranks(environ) == launch.RankEnv(rank=3, world_size=4, local_rank=1)
    assert (environ["RANK"], environ["WORLD_SIZE"], environ["LOCAL_RANK"]) == ("3", "4", "1")


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"},  # a batch script, not a step
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        {"WORLD_SIZE": "4"},
    ],
)
def test_one_process_alone_is_no_rank(environ):
    before = dict(environ)
    assert launch.ranks(environ) is None
    assert environ == before


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"])
def test_what_a_launcher_left_out_is_named(missing):
    environ = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"} | MASTER
    del environ[missing]
    with pytest.raises(ValueError, match=f"rank 1 of 2, but {missing} must be set"):
        launch.ranks(environ)


def test_a_wrong_number_of_ranks_is_refused_with_both_numbers():
    launch.check_world(settings(2, 2), launch.RankEnv(0, 4, 0))
    launch.check_world(settings(1, 1), None)
    with pytest.raises(ValueError, match="2 x pipeline_parallel 3 need 6 ranks, but 4 were started"):
        launch.check_world(settings(2, 3), launch.RankEnv(0, 4, 0))
    with pytest.raises(ValueError, match="1 x pipeline_parallel 1 need 1 ranks, but 2 were started"):
        launch.check_world(settings(1, 1), launch.RankEnv(0, 2, 0))
    with pytest.raises(ValueError, match="no launcher .* deepspeed --num_accelerators 2"):
        launch.check_world(settings(2, 1), None)


# -- the launcher's command line -------------------------------------------------------------------


def test_ranks_of_this_machine():
    started = launch.several(settings(2, 2), launch.Options(), "ds_serve.rank", ["/folder", "7"])
    assert started.command[:5] == [sys.executable, "-m", "deepspeed.launcher.launch", "-q", "--no_local_rank"]
    assert started.command[-4:] == ["--module", "ds_serve.rank", "/folder", "7"]
    assert devices(started.command) == [0, 1, 2, 3]
    assert any(part.startswith("--master_port=") for part in started.command)
    assert started.environment["DS_ACCELERATOR"] == "cpu"
    assert started.environment["OMP_NUM_THREADS"] == "1"


def test_cores_are_shared_out_unless_threads_are_given(monkeypatch):
    assert launch.several(settings(2), launch.Options(), "m", []).environment["OMP_NUM_THREADS"] == "2"
    assert launch.several(settings(8), launch.Options(), "m", []).environment["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert launch.several(settings(2), launch.Options(), "m", []).environment["OMP_NUM_THREADS"] == "3"


def test_what_another_launcher_left_is_not_handed_on(monkeypatch):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    environment = launch.several(settings(), launch.Options(), "m", []).environment
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & environment.keys()


def test_visible_devices_stay_the_callers_choice(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6")
    assert devices(line(device="cuda")) == ["3", "5"]
    with pytest.raises(ValueError, match="4 ranks need as many devices: CUDA_VISIBLE_DEVICES is 3,5,6"):
        line(tp=4, device="cuda")
    cpu = launch.several(settings(device="cpu"), launch.Options(), "m", [])
    assert devices(cpu.command) == [0, 1] and "CUDA_VISIBLE_DEVICES" not in cpu.environment


@pytest.mark.parametrize(
    "options", [launch.Options(include="localhost:0,1"), launch.Options(force_multi=True)]
)
def test_what_the_runner_has_to_work_out_goes_through_it(options):
    command = line(options)
    # --hostfile= turns off its own default, /job/hostfile.
    assert command[2] == "deepspeed.launcher.runner" and "--hostfile=" in command
    assert ("--num_accelerators=2" in command) == options.force_multi


def test_flags_pass_through(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("# two machines\nnode-1 slots=1\nnode-2 slots=1\n")
    options = launch.Options(
        hostfile=str(hosts), include="node-1", master_port=77, ssh_port=2222, force_multi=True
    )
    command = line(options)
    assert {f"--hostfile={hosts}", "--include=node-1", "--master_port=77", "--ssh_port=2222"} <= set(command)
    assert "--force_multi" in command and "--no_ssh" not in command
    assert not any(part.startswith(("--num_accelerators", "--node_rank")) for part in command)


def test_each_node_of_several_without_ssh(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("node-1 slots=1\nnode-2 slots=1\n")
    for rank in (0, 1):
        options = launch.Options(
            hostfile=str(hosts), no_ssh=True, node_rank=rank, master_addr="node-1", master_port=77
        )
        flags = {f"--node_rank={rank}", "--no_ssh", "--master_addr=node-1", "--master_port=77"}
        assert flags <= set(line(options))
        assert options.follows == (rank == 1)


def test_slurm_gets_its_module_by_pythons_flag_and_the_meeting_point(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("# two machines\nnode-1 slots=1\nnode-2 slots=1\n")
    options = launch.Options(hostfile=str(hosts), launcher="slurm", master_port=77)
    started = launch.several(settings(), options, "ds_serve.rank", ["/folder"])
    assert started.command[-4:] == ["--", "-m", "ds_serve.rank", "/folder"]
    assert "--module" not in started.command and "--no_ssh_check" in started.command
    assert (started.environment["MASTER_ADDR"], started.environment["MASTER_PORT"]) == ("node-1", "77")


def test_openmpi_is_told_what_to_hand_on(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("node-1 slots=2\n")
    options = launch.Options(hostfile=str(hosts), launcher="openmpi", launcher_args="--mca a b")
    assert "--launcher_args=--mca a b -x MASTER_ADDR -x MASTER_PORT" in line(options)


def test_cores_are_bound_where_numactl_works(monkeypatch):
    monkeypatch.setattr(launch.shutil, "which", lambda _: "/usr/bin/numactl")
    trials = []

    def run(command, **_):
        trials.append(command)
        return subprocess.CompletedProcess(command, int(len(trials) > 1))

    monkeypatch.setattr(launch.subprocess, "run", run)
    assert "--bind_cores_to_rank" in line()
    assert "--bind_cores_to_rank" not in line()  # forbidden, as in many containers
    assert "--bind_cores_to_rank" not in line(tp=8) and len(trials) == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which the launcher would overwrite
    assert "--bind_cores_to_rank" not in line() and len(trials) == 2
    assert line(launch.Options(bind_cores_to_rank=True)).count("--bind_cores_to_rank") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (launch.Options(no_ssh=True, hostfile="h"), "node_rank, --master_addr, --master_port"),
        (launch.Options(node_rank=1), "node_rank is for --no_ssh"),
        (launch.Options(hostfile="/nowhere"), "no /nowhere"),
    ],
)
def test_flags_that_do_not_fit_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        options.check()


def test_both_spellings_of_flags():
    parser = argparse.ArgumentParser()
    launch.add_arguments(parser)
    arguments = vars(parser.parse_args(["--master-port", "5", "--no_ssh", "--launcher-args=-x A"]))
    options = launch.Options.take(arguments)
    assert options == launch.Options(master_port=5, no_ssh=True, launcher_args="-x A") and not arguments
    assert options.given() == ["--master_port", "--no_ssh", "--launcher_args"]
    assert launch.Options().given() == []


# -- processes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "words"),
    [(-9, "SIGKILL"), (247, "SIGKILL"), (-15, "SIGTERM"), (3, "code 3"), (255, "code 255"), (1, "code 1")],
)
def test_exit_codes_in_words(code, words):
    assert words in launch.describe(code)


def program(text):
    return launch.Launch([sys.executable, "-c", text], dict(os.environ))


@pytest.mark.parametrize(
    ("text", "code"), [("", 0), ("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_run_returns_the_code(text, code):
    assert launch.run(program(text)) == code


def test_run_is_not_content_with_orphans():
    orphan = (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    )
    assert launch.run(program(orphan)) == 1


LAUNCHER = """
import subprocess, sys, time
rank = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", rank], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
"""
CALLER = """
import os, sys
from ds_serve import launch
sys.exit(launch.run(launch.Launch([sys.executable, "-c", sys.argv[1]], dict(os.environ))))
"""


def test_a_signal_to_run_ends_the_whole_group():
    command = [sys.executable, "-c", CALLER, LAUNCHER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        rank = launch.psutil.Process(int(process.stdout.readline()))
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
        until(lambda: not rank.is_running() or rank.status() == launch.psutil.STATUS_ZOMBIE)


def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
