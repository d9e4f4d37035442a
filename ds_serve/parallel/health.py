"""Who is at fault when ranks stop: signs of life and of trouble in, one verdict out.

Trouble comes in bursts: one rank is killed, and its neighbours' collectives raise. So the first sign opens a
short grace for others, and then the likeliest cause is named. Knows no socket, process or clock: times are
seconds on a clock of the caller. Used by control.py.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from ds_serve.messages import StepPlan
from ds_serve.parallel.place import Place
from ds_serve.parallel.wire import Beat, Build, Close, Failure, Phase, RankMessage

LOADING_S = 60.0  # silence of a rank that loads a model: its threads may starve
_HEAD_START_S = 0.1  # how much later than an error that it brought about a death may be seen


class RankFailure(RuntimeError):
    """A rank is lost, and all ranks with it. place is the rank's, cause why."""

    def __init__(self, place: Place, cause: str) -> None:
        super().__init__(f"{place}: {cause}")
        self.place = place
        self.cause = cause


class _Calls(Protocol):
    num_calls: int


@dataclass(slots=True)
class Progress:
    """Where a rank's worker is. The worker's thread writes, the link's thread reads; each field by itself.

    busy_s is seconds of computing, all steps together. batch is what the present step's attention works on,
    whose num_calls grows from layer to layer.
    """

    step: int = 0
    busy_s: float = 0.0
    phase: Phase = "idle"
    batch: _Calls | None = None

    def beat(self, rank: int, pid: int, host: str) -> Beat:
        batch = self.batch
        return Beat(
            rank=rank,
            step=self.step,
            num_calls=0 if batch is None else batch.num_calls,
            phase=self.phase,
            busy_s=self.busy_s,
            pid=pid,
            host=host,
        )


def beat_interval(timeout_s: float) -> float:
    """Seconds between heartbeats, where silence of timeout_s means a lost rank."""
    return min(1.0, timeout_s / 4)


def patience(timeout_s: float, phase: Phase) -> float:
    """Seconds of silence that a rank in this phase may keep."""
    return max(timeout_s, LOADING_S) if phase == "loading" else timeout_s


class WakingClock:
    """Seconds during which this thread was there to listen.

    A pause of its own (a starved thread, a stopped process) counts for no more than longest_s: whoever
    sleeps must not find that all others have been silent.
    """

    def __init__(self, longest_s: float) -> None:
        self._longest_s = longest_s
        self._last = time.monotonic()
        self._seen = 0.0

    def now(self) -> float:
        last, self._last = self._last, time.monotonic()
        self._seen += min(self._last - last, self._longest_s)
        return self._seen


_COMMUNICATION = re.compile(
    r"\bgloo\b|nccl|connection (closed by peer|reset|refused)|broken pipe", re.IGNORECASE
)


def describe(rank: int, error: BaseException) -> Failure:
    """What a rank says of its own error. Without torch: the type is known by its name."""
    names = {each.__name__ for each in type(error).__mro__}
    text = str(error).partition("\nException raised from ")[0].strip()  # there begins torch's C++ stack
    return Failure(
        rank=rank,
        reason=f"{type(error).__name__}: {text}" if text else type(error).__name__,
        communication=bool(names & {"DistError", "ConnectionError"} or _COMMUNICATION.search(str(error))),
    )


class _Kind(IntEnum):
    """Classes of evidence, the most telling first."""

    ROOT = 0  # a process ended without a word, or an error that speaks of no other rank
    SILENT = 1
    STALLED = 2
    COMMUNICATION = 3


@dataclass(frozen=True)
class _Evidence:
    kind: _Kind
    rank: int
    cause: str
    at: float  # when it was seen
    grace_s: float  # how long others may come after it
    weight: float = 0.0  # within a kind the lowest counts


class Health:
    """What is known of all ranks, for rank 0.

    sent() may be called by another thread than the rest, and landed() by a third: each writes one number.
    """

    def __init__(self, place: Place, timeout_s: float) -> None:
        self._place = place
        self._timeout_s = timeout_s
        self._beats: dict[int, Beat] = {}
        self._heard: dict[int, float] = {}
        self._deaths: dict[int, _Evidence] = {}
        self._words: dict[int, _Evidence] = {}
        self._num_sent = 0
        self._num_landed = 0
        self._point: object = None
        self._moved = 0.0
        self._alarmed = False

    # -- what is seen ------------------------------------------------------------------------------

    def heard(self, beat: Beat, now: float) -> None:
        self._beats[beat.rank] = beat
        self._heard[beat.rank] = now

    def failed(self, failure: Failure, now: float) -> None:
        """Only a rank's first error counts."""
        if failure.communication:
            word = _Evidence(_Kind.COMMUNICATION, failure.rank, failure.reason, now, 0.5, now)
        else:
            word = _Evidence(_Kind.ROOT, failure.rank, failure.reason, now, 0.3, now)
        self._words.setdefault(failure.rank, word)

    def died(self, rank: int, cause: str, now: float) -> None:
        """A process has ended, which counts unless it said why."""
        at = self._deaths[rank].at if rank in self._deaths else now
        self._deaths[rank] = _Evidence(_Kind.ROOT, rank, cause, at, 0.1, at - _HEAD_START_S)

    def lost(self, rank: int, now: float) -> None:
        """The connection ended, which of a process elsewhere is all that is seen of its death."""
        if rank not in self._deaths:
            self.died(rank, "the connection to it was lost", now)

    def sent(self, message: RankMessage) -> None:
        """Rank 0 tells all ranks. A plan without rows is copies, and has no result that could land."""
        if isinstance(message, StepPlan):
            if not message.rows:
                return
            self._num_sent = max(self._num_sent, self._num_landed) + 1
        elif isinstance(message, Build | Close):
            self._num_sent = self._num_landed

    def landed(self) -> None:
        """A step's result is in."""
        self._num_landed += 1

    # -- what follows ------------------------------------------------------------------------------

    @property
    def suspicious(self) -> bool:
        """Whether there is any evidence, so that judge() should be asked often."""
        return self._alarmed or bool(self._words or self._deaths)

    def missing(self) -> list[int]:
        """Ranks that were never heard."""
        return [rank for rank in range(self._place.world_size) if rank not in self._heard]

    def stage_busy_s(self) -> list[float]:
        """Of shard 0 of each stage, as its last heartbeat said."""
        firsts = range(0, self._place.world_size, self._place.tp)
        return [self._beats[rank].busy_s if rank in self._beats else 0.0 for rank in firsts]

    def judge(self, now: float) -> RankFailure | None:
        """The verdict, once the grace after the first evidence is over; None before, and without any."""
        deaths = [each for rank, each in self._deaths.items() if rank not in self._words]
        evidence = [*deaths, *self._words.values(), *self._silent(now), *self._stalled(now)]
        self._alarmed = bool(evidence)
        if not evidence or now < min(each.at + each.grace_s for each in evidence):
            return None
        worst = min(evidence, key=lambda each: (each.kind, each.weight))
        return RankFailure(self._place_of(worst.rank), worst.cause)

    def _place_of(self, rank: int) -> Place:
        return Place(rank, self._place.tp, self._place.pp)

    def _silent(self, now: float) -> list[_Evidence]:
        found = []
        for rank, heard in self._heard.items():
            limit = patience(self._timeout_s, self._beats[rank].phase)
            if rank not in self._deaths and rank not in self._words and now - heard > limit:
                cause = f"no heartbeat for {limit:g} s"
                found.append(_Evidence(_Kind.SILENT, rank, cause, heard + limit, 0.5, heard))
        return found

    def _stalled(self, now: float) -> list[_Evidence]:
        """One rank, where steps are in flight and none has got on for too long."""
        beats = list(self._beats.values())
        point = (
            self._num_sent,
            self._num_landed,
            [(beat.rank, beat.step, beat.num_calls, beat.phase) for beat in beats],
        )
        in_flight = self._num_sent > self._num_landed
        if point != self._point or not in_flight or any(beat.phase == "loading" for beat in beats):
            self._point, self._moved = point, now
        if not beats or now - self._moved <= self._timeout_s:
            return []
        computing = [beat for beat in beats if beat.phase == "compute"]
        first = min(computing or beats, key=_how_far)
        cause = f"no progress for {self._timeout_s:g} s, {_whereabouts(first)}"
        peers = [beat.rank for beat in computing if beat is not first and _how_far(beat) == _how_far(first)]
        if peers:
            cause += f" (no further: {', '.join(f'rank {rank}' for rank in peers)})"
        return [_Evidence(_Kind.STALLED, first.rank, cause, self._moved + self._timeout_s, 0.5)]


def _how_far(beat: Beat) -> tuple[int, bool, int]:
    return beat.step, beat.phase == "receive", beat.num_calls


def _whereabouts(beat: Beat) -> str:
    match beat.phase:
        case "compute":
            return f"computing step {beat.step} (attention call {beat.num_calls})"
        case "receive":
            return f"waiting for hidden states of step {beat.step}"
        case _:
            return f"idle after step {beat.step}"
