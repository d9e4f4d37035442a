"""Whether this process is a rank that a launcher started, and how to start ranks with DeepSpeed's launcher.

Knows launchers' flags and environment variables. Imports neither torch nor DeepSpeed, whose launcher is a
program. Used by cli.py, server/ (which supervises what is started), generation/ and rank.py.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import psutil

from ds_serve.config import Settings

RANK_MODULE = "ds_serve.rank"
_RUNNER = "deepspeed.launcher.runner"  # the `deepspeed` command
_LOCAL = "deepspeed.launcher.launch"  # its part that starts a machine's ranks
GRACE_S = 3.0  # ranks end at SIGTERM; who has not by then is killed
_POLL_S = 0.05
_KILLERS = (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL)
_DEVICE_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # CUDA, CUDA under WSL, ROCm


# -- this process as a rank ------------------------------------------------------------------------


class RankEnv(NamedTuple):
    """What a launcher said to this process. local_rank counts on its machine."""

    rank: int
    world_size: int
    local_rank: int


class _Names(NamedTuple):
    rank: str = "RANK"
    world_size: str = "WORLD_SIZE"
    local_rank: str = "LOCAL_RANK"


# SLURM_NTASKS and SLURM_PROCID are set in a batch script too, which is no rank; the tasks of a step are.
_NAMES = {
    "deepspeed or torchrun": _Names(),
    "mpirun": _Names("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "srun": _Names("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
}


def ranks(environ: MutableMapping[str, str] = os.environ) -> RankEnv | None:
    """This process's rank, or None where no launcher started it, or started nothing beside it.

    Writes mpirun's and srun's numbers to environ as RANK, WORLD_SIZE and LOCAL_RANK, where torch.distributed
    and DeepSpeed look. ValueError where they would miss something there.
    """
    for launcher, names in _NAMES.items():
        if names.rank in environ and environ.get(names.world_size, "1") != "1":
            return _rank_env(environ, launcher, names)
    return None


def _rank_env(environ: MutableMapping[str, str], launcher: str, names: _Names) -> RankEnv:
    missing = [name for name in (names.local_rank, "MASTER_ADDR", "MASTER_PORT") if name not in environ]
    if missing:
        raise ValueError(
            f"{launcher} started this as rank {environ[names.rank]} of {environ[names.world_size]}, but "
            f"{', '.join(missing)} must be set too (MASTER_ADDR, MASTER_PORT: rank 0's machine, a free port)"
        )
    for name, own in zip(_Names(), names, strict=True):
        environ[name] = environ[own]
    return RankEnv(*(int(environ[name]) for name in names))


def check_world(settings: Settings, env: RankEnv | None) -> None:
    """ValueError unless as many ranks were started as settings ask for."""
    started, wanted = 1 if env is None else env.world_size, settings.world_size
    if started == wanted:
        return
    shape = f"tensor_parallel {settings.tensor_parallel} x pipeline_parallel {settings.pipeline_parallel}"
    if env is None:
        raise ValueError(
            f"{shape} need {wanted} ranks, but no launcher started this process: "
            f"start it with deepspeed --num_accelerators {wanted}"
        )
    raise ValueError(
        f"{shape} need {wanted} ranks, but {started} were started: start {wanted} "
        f"(deepspeed --num_accelerators {wanted}), or choose --tp and --pp for {started}"
    )


# -- DeepSpeed's launcher --------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """Flags of the deepspeed launcher, under its own names."""

    hostfile: str | None = None
    include: str | None = None
    exclude: str | None = None
    num_nodes: int | None = None
    master_addr: str | None = None
    master_port: int | None = None
    no_ssh: bool = False
    node_rank: int | None = None
    launcher: str | None = None
    launcher_args: str | None = None
    ssh_port: int | None = None
    force_multi: bool = False
    bind_cores_to_rank: bool = False
    bind_core_list: str | None = None

    @classmethod
    def take(cls, arguments: dict) -> Options:
        """Removes its fields from parsed arguments."""
        return cls(**{field.name: arguments.pop(field.name) for field in fields(cls)})

    def given(self) -> list[str]:
        """The flags that were given, as they are written."""
        return [f"--{field.name}" for field in fields(self) if getattr(self, field.name) != field.default]

    @property
    def follows(self) -> bool:
        """Whether rank 0 is started on another machine, by hand."""
        return self.no_ssh and bool(self.node_rank)

    def check(self) -> None:
        """ValueError for what the launcher would trip over."""
        if self.no_ssh:
            missing = [
                f"--{name}"
                for name in ("hostfile", "node_rank", "master_addr", "master_port")
                if getattr(self, name) is None
            ]
            if missing:
                raise ValueError(f"--no_ssh: give {', '.join(missing)} too")
        elif self.node_rank is not None:
            raise ValueError("--node_rank is for --no_ssh")
        if self.hostfile is not None and not Path(self.hostfile).is_file():
            raise ValueError(f"--hostfile: there is no {self.hostfile}")


_HELP = {
    "hostfile": "machines and their ranks, lines such as 'node-1 slots=4'; this machine first",
    "include": "machines and slots to use, as in node-1@node-2:0,2",
    "exclude": "machines and slots to leave out",
    "num_nodes": "machines of the hostfile to use",
    "master_addr": "address of rank 0's machine",
    "master_port": "port of rank 0's machine for the ranks to meet; default: a free one",
    "no_ssh": "this command is run on each machine, each with its --node_rank",
    "node_rank": "which machine of the hostfile this is, from 0",
    "launcher": "pdsh (default), openmpi, mpich, impi or slurm",
    "launcher_args": "further arguments for it, as one",
    "ssh_port": "port for ssh",
    "force_multi": "go through the launcher's multi-node part for one machine too",
    "bind_cores_to_rank": "give each rank cores of its own with numactl; by itself where that works",
    "bind_core_list": "cores to share out among ranks, as in 0-7,16-23",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A group with Options' flags, in the launcher's spelling and with dashes."""
    group = parser.add_argument_group("launcher (of deepspeed, for --tp or --pp above 1)")
    for field in fields(Options):
        spellings = dict.fromkeys((f"--{field.name}", f"--{field.name.replace('_', '-')}"))
        options: dict = {"dest": field.name, "default": field.default, "help": _HELP[field.name]}
        if field.default is False:
            options["action"] = "store_true"
        elif "int" in field.type:
            options |= {"type": int, "metavar": "N"}
        else:
            options["metavar"] = "TEXT"
        group.add_argument(*spellings, **options)


class Launch(NamedTuple):
    """A program to start: its command line, and its whole environment."""

    command: list[str]
    environment: dict[str, str]


def one(arguments: Sequence[str]) -> Launch:
    """The one rank of an engine, or this process's own rank where a launcher started it."""
    return Launch([sys.executable, "-m", RANK_MODULE, *arguments], dict(os.environ))


def several(settings: Settings, options: Options, module: str, arguments: Sequence[str]) -> Launch:
    """settings.world_size ranks, each `python -m module arguments`; on this machine unless options differ.

    ValueError where options or visible devices do not fit. The launcher ends with a rank's code, with 256 - n
    for a rank that signal n killed; over several machines with 0 where its own child process is killed.
    """
    options.check()
    environment = _environment(settings, options)
    chosen = options.include or options.exclude
    if not (options.hostfile or chosen or options.launcher or options.force_multi):
        local = _local_launcher(settings, options, environment)
        return Launch([*local, "--module", module, *arguments], environment)
    line = [sys.executable, "-m", _RUNNER, "-q", "--no_local_rank"]
    if options.hostfile is None:
        line.append("--hostfile=")  # else it looks for /job/hostfile
        line += [] if chosen else [f"--num_accelerators={settings.world_size}"]
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    if not options.no_ssh:
        values["master_port"] = options.master_port or _free_port()
    if options.launcher and options.launcher.lower() != "pdsh":
        line.append("--no_ssh_check")
        values["master_addr"] = options.master_addr or _first_host(options)
        environment |= {"MASTER_ADDR": values["master_addr"], "MASTER_PORT": str(values["master_port"])}
        if options.launcher.lower() == "openmpi":  # which hands on only what it is told to
            values["launcher_args"] = f"{options.launcher_args or ''} -x MASTER_ADDR -x MASTER_PORT".strip()
    for name, value in values.items():
        if value is True:
            line.append(f"--{name}")
        elif value is not None and value is not False:
            line.append(f"--{name}={value}")
    # The Slurm backend forgets --module: there, python's own -m stands in the script's place.
    start = ["--", "-m"] if (options.launcher or "").lower() == "slurm" else ["--module"]
    return Launch([*line, *start, module, *arguments], environment)


def _local_launcher(settings: Settings, options: Options, environment: dict[str, str]) -> list[str]:
    """The command that the runner would start after two seconds of imports, less its module."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else list(range(settings.world_size))
    if len(devices) < settings.world_size:
        raise ValueError(
            f"{settings.world_size} ranks need as many devices: CUDA_VISIBLE_DEVICES is {visible}"
        )
    world = json.dumps({"localhost": devices[: settings.world_size]}).encode()
    line = [sys.executable, "-m", _LOCAL, "-q", "--no_local_rank"]
    line.append(f"--world_info={base64.urlsafe_b64encode(world).decode()}")
    line.append(f"--master_port={options.master_port or _free_port()}")
    if options.master_addr:
        line.append(f"--master_addr={options.master_addr}")
    if options.bind_cores_to_rank or (not visible and _can_bind(settings, environment)):
        line.append("--bind_cores_to_rank")
    if options.bind_core_list is not None:
        line.append(f"--bind_core_list={options.bind_core_list}")
    return line


def _environment(settings: Settings, options: Options) -> dict[str, str]:
    environment = dict(os.environ)
    for name in _Names():  # left from another launcher
        environment.pop(name, None)
    if _on_cpu(settings, environment):
        environment["DS_ACCELERATOR"] = "cpu"
        environment.pop("CUDA_VISIBLE_DEVICES", None)
    if options.hostfile is None:
        cores = len(os.sched_getaffinity(0))
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // settings.world_size)))
    return environment


def _on_cpu(settings: Settings, environment: Mapping[str, str]) -> bool:
    if settings.device == "auto" and "DS_ACCELERATOR" in environment:
        return environment["DS_ACCELERATOR"] == "cpu"
    return settings.device == "cpu" or (
        settings.device == "auto" and not any(Path(file).exists() for file in _DEVICE_FILES)
    )


def _can_bind(settings: Settings, environment: Mapping[str, str]) -> bool:
    """Whether binding cores is right and would work: the launcher takes cores 0, 1, ... of the machine."""
    cores = psutil.cpu_count(logical=False) or 0
    if (
        environment.get("DS_ACCELERATOR") != "cpu"
        or "OMP_NUM_THREADS" in os.environ
        or "KMP_AFFINITY" in environment
        or not settings.world_size <= cores
        or not set(range(cores)) <= os.sched_getaffinity(0)
        or shutil.which("numactl") is None
    ):
        return False
    # A container may forbid it.
    trial = ["numactl", "-C", "0", "-m", "0", "true"]
    return subprocess.run(trial, capture_output=True, timeout=10, check=False).returncode == 0


def _first_host(options: Options) -> str:
    lines = Path(options.hostfile).read_text().splitlines() if options.hostfile else []
    hosts = [line.split()[0] for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return hosts[0] if hosts else socket.gethostname()


def _free_port() -> int:
    with socket.create_server(("", 0)) as free:
        return free.getsockname()[1]


# -- processes -------------------------------------------------------------------------------------


def run(launch: Launch) -> int:
    """Runs a launcher to its end, in a process group of its own. Returns its code, 128 + n after signal n.

    SIGINT and SIGTERM end the group; nothing of it is left when this returns.
    """
    received: list[int] = []
    process = subprocess.Popen(
        launch.command, env=launch.environment, stdin=subprocess.DEVNULL, process_group=0
    )

    def end(number: int, _frame: object) -> None:
        received.append(number)
        _terminate(process.pid)

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
        if received:  # which ends the launcher before its ranks
            _wait_for_end(process.pid, GRACE_S)
        orphaned = bool(_members(process.pid))  # it hides it when its own child was killed
    finally:
        end_group(process.pid)
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        return 128 + received[0]
    return 128 - code if code < 0 else code or int(orphaned)


def describe(code: int) -> str:
    """A process's exit code in words. A launcher ends with 256 - n where signal n killed a rank."""
    number = -code if code < 0 else 256 - code
    if code < 0 or number in _KILLERS:
        return f"was killed by {signal.Signals(number).name}"
    return f"ended with code {code}"


def end_group(group: int, grace_s: float = GRACE_S) -> None:
    """SIGTERM, then SIGKILL to what is left of a process group after grace_s seconds. Waits."""
    _terminate(group)
    _wait_for_end(group, grace_s)
    while alive := _members(group):
        _send(alive, signal.SIGKILL)
        time.sleep(_POLL_S)


def _terminate(group: int) -> None:
    """SIGTERM to the launcher on this machine, which ends the ranks one by one, rank 0 first.

    To its runner alone it would orphan them. To all of them at once it would look to rank 0 like the
    others' failure. Where the launcher is gone, there is no such choice.
    """
    alive = _members(group)
    if group in alive:
        with suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(group)
            children = [] if _LOCAL in launcher.cmdline() else launcher.children()
            alive = [group, *(child.pid for child in children)]
    _send(alive, signal.SIGTERM)


def _members(group: int) -> list[int]:
    """Ids of the living processes of a process group."""
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (ProcessLookupError, PermissionError):
            continue
    return found


def _wait_for_end(group: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while _members(group) and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _send(processes: list[int], number: int) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)
