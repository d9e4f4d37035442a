"""What passes between rank 0 and the other ranks, and over which sockets.

On one machine: unix sockets in a private folder. Over several: tcp with CURVE, keys at both ends, handed over
in the store of torch.distributed, and so as private as that is. Knows no policy: when to send what is
control.py's and follower.py's, whom to blame for silence health.py's.
"""

from __future__ import annotations

import ipaddress
import math
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal, Protocol

import msgspec
import zmq
from zmq.utils import z85

from ds_serve.messages import CopyResult, StepPlan, StepResult
from ds_serve.parallel.place import Place

LINGER_MS = 1000  # how long a closing rank waits for what it has sent to leave

Phase = Literal["idle", "compute", "receive", "loading"]


class _Wire(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of these messages, as in messages.py."""


# -- rank 0 -> the others ----------------------------------------------------------------------


class Build(_Wire, tag="build"):
    """Load this model and be ready for plans."""

    settings_json: str


class Close(_Wire, tag="close"):
    """This engine is done; its plans end."""


class Leave(_Wire, tag="leave"):
    """Rank 0's process is done: end with exit code 0."""


class Gone(_Wire, tag="gone"):
    """Rank 0 ends without a Leave: end with exit code 1. The link's own; a worker never sees it."""

    reason: str


RankMessage = Build | StepPlan | Close | Leave


# -- both ways -----------------------------------------------------------------------------------


class Beat(_Wire, tag="beat"):
    """A sign of life and of progress. pid on host is the process; busy_s the seconds it has computed."""

    rank: int
    step: int
    num_calls: int
    phase: Phase
    busy_s: float
    pid: int
    host: str


# -- the others -> rank 0 ------------------------------------------------------------------------


class Failure(_Wire, tag="failed"):
    """A rank's worker raised. communication: the error says no more than that another rank was lost."""

    rank: int
    reason: str
    communication: bool = False


encode = msgspec.msgpack.Encoder().encode
decode_down = msgspec.msgpack.Decoder(Build | StepPlan | Close | Leave | Gone | Beat).decode
decode_up = msgspec.msgpack.Decoder(StepResult | CopyResult | Beat | Failure).decode


# -- where they meet -----------------------------------------------------------------------------

KEY = "ds_serve/control"  # of the Address in the store


class Store(Protocol):
    """As torch.distributed's: get() waits until the key is there."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...


class Address(_Wire):
    """All that a follower needs to reach rank 0; rank 0 leaves it in the store.

    plans and words are ZeroMQ endpoints, folder holds them on one machine. The keys are CURVE's over tcp:
    the server's public one, and the pair (public, secret) that all followers show.
    """

    plans: str
    words: str
    host: str
    pid: int
    folder: str = ""
    server_key: str = ""
    client_keys: tuple[str, str] = ("", "")


def host_id() -> str:
    """The same text for processes that can see one another's pids."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # not Linux
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def one_machine(world_size: int, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher said that all ranks are on this machine. DS_SERVE_FORCE_TCP=1 denies it."""
    if environ.get("DS_SERVE_FORCE_TCP") == "1":
        return False
    # DeepSpeed's, torchrun's and mpirun's names
    names = ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")
    return any(environ.get(name) == str(world_size) for name in names)


class BoundSockets:
    """Rank 0's ends: plans (XPUB, to all others), words (PULL, from them), door (who may come in over tcp).

    address is for the store. Sockets are not thread-safe; who uses which is control.py's business.
    """

    def __init__(self, place: Place) -> None:
        self.context = zmq.Context()
        self.door: Door | None = None
        self._folder: Path | None = None
        self.plans, self.words = self.context.socket(zmq.XPUB), self.context.socket(zmq.PULL)
        try:
            for each in (self.plans, self.words):
                each.set_hwm(0)
                each.linger = LINGER_MS
            self.words.bind(_OWN_WORDS)
            self.address = self._bind_folder() if one_machine(place.world_size) else self._bind_tcp()
        except BaseException:
            self.close()
            self.context.term()
            raise

    def _bind_folder(self) -> Address:
        self._folder = Path(tempfile.mkdtemp(prefix="ds-serve-ranks-"))  # 0700
        plans, words = (f"ipc://{self._folder}/{name}" for name in ("plans", "words"))
        self.plans.bind(plans)
        self.words.bind(words)
        return Address(plans=plans, words=words, host=host_id(), pid=os.getpid(), folder=str(self._folder))

    def _bind_tcp(self) -> Address:
        if not zmq.has("curve"):
            raise RuntimeError(
                f"ranks on several machines need a ZeroMQ with CURVE, but libzmq {zmq.zmq_version()} here is "
                "built without it: install pyzmq from PyPI's wheels"
            )
        server, client = zmq.curve_keypair(), zmq.curve_keypair()
        self.door = Door(self.context, client_key=client[0])
        name = os.environ.get("MASTER_ADDR", "127.0.0.1")
        interface, host, ipv6 = _interface(name)
        endpoints = []
        for each in (self.plans, self.words):
            each.ipv6 = ipv6
            each.zap_domain = b"ds_serve"
            each.curve_secretkey, each.curve_publickey, each.curve_server = server[1], server[0], True
            each.bind(f"tcp://{interface}:*")
            port = each.last_endpoint.rstrip(b"\0").decode().rpartition(":")[2]
            endpoints.append(f"tcp://{host}:{port}")
        return Address(
            plans=endpoints[0],
            words=endpoints[1],
            host=host_id(),
            pid=os.getpid(),
            server_key=server[0].decode(),
            client_keys=(client[0].decode(), client[1].decode()),
        )

    def remove_folder(self) -> None:
        """Once all are connected nobody needs the files, and nothing stays whatever becomes of the ranks."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def close(self) -> None:
        """Closes the sockets; what was sent leaves within LINGER_MS, or is dropped."""
        self.plans.close()
        self.words.close()
        if self.door is not None:
            self.door.socket.close()
        self.remove_folder()


_OWN_WORDS = "inproc://ds-serve-words"


def say_here(context: zmq.Context, word: Failure) -> None:
    """Sends a word to the PULL socket of this same process; from any thread."""
    with context.socket(zmq.PUSH) as own:
        own.linger = LINGER_MS
        own.connect(_OWN_WORDS)
        own.send(encode(word))


def _interface(name: str) -> tuple[str, str, bool]:
    """MASTER_ADDR -> (interface to bind, host to connect to, whether IPv6).

    A name is bound on all interfaces: on its own machine it often means a loopback address.
    """
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return ("127.0.0.1" if name == "localhost" else "*"), name, False
    host = f"[{address}]" if address.version == 6 else str(address)
    return (host if address.is_loopback else "*"), host, address.version == 6


class Door:
    """ZeroMQ's authentication (ZAP 1.0): lets in who shows the followers' key, and nobody else."""

    def __init__(self, context: zmq.Context, client_key: bytes) -> None:
        self.socket = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind("inproc://zeromq.zap.01")
        self._client_key = z85.decode(client_key)

    def answer(self) -> None:
        """Answers one question that has come in."""
        version, request_id, _domain, _address, _identity, mechanism, *credentials = (
            self.socket.recv_multipart()
        )
        known = mechanism == b"CURVE" and credentials == [self._client_key]
        status = (b"200", b"OK") if known else (b"400", b"unknown key")
        self.socket.send_multipart([version, request_id, *status, b"", b""])


class ConnectedSockets:
    """A follower's ends: plans (SUB) and words (PUSH)."""

    def __init__(self, place: Place, address: Address) -> None:
        self.context = zmq.Context()
        self.plans, self.words = self.context.socket(zmq.SUB), self.context.socket(zmq.PUSH)
        for each, endpoint in ((self.plans, address.plans), (self.words, address.words)):
            each.set_hwm(0)
            each.linger = LINGER_MS
            if address.server_key:
                each.ipv6 = "[" in endpoint
                each.curve_serverkey = address.server_key.encode()
                each.curve_publickey, each.curve_secretkey = (key.encode() for key in address.client_keys)
        # Everything, and a topic of its own, which tells rank 0 who has come and who has gone.
        self.plans.subscribe(b"")
        self.plans.subscribe(topic(place.rank))
        self.plans.connect(address.plans)
        self.words.connect(address.words)

    def close(self) -> None:
        """Closes the sockets; what was sent leaves within LINGER_MS, or is dropped."""
        self.plans.close()
        self.words.close()


def topic(rank: int) -> bytes:
    """What rank subscribes to beside the plans; no message begins so."""
    return b"rank %d" % rank


def read_topic(frame: bytes) -> tuple[int, bool] | None:
    """(rank, whether it has come) of a frame that XPUB received; None where it names no rank."""
    name, _, rank = frame[1:].partition(b" ")
    return (int(rank), frame[0] == 1) if name == b"rank" else None


# -- waiting -------------------------------------------------------------------------------------


def poll_until(poller: zmq.Poller, when: float) -> set:
    """What is ready at the latest at `when` (time.monotonic()): sockets and descriptors."""
    wait_s = max(0.0, when - time.monotonic())
    return {source for source, _ in poller.poll(math.ceil(wait_s * 1000))}


def frames(socket: zmq.Socket) -> Iterator[bytes]:
    """All that has come in."""
    with suppress(zmq.Again):
        while True:
            yield socket.recv(zmq.NOBLOCK)


def pidfd(pid: int) -> int | None:
    """A descriptor that is ready once the process has ended; None where the system has no such thing.

    Raises ProcessLookupError where there is no such process.
    """
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise
    except (AttributeError, OSError):  # not Linux, an old kernel, or a sandbox that forbids it
        return None
