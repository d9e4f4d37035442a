"""What it costs to send a step's plan to all ranks and to get its result back, without any model.

    python benchmarks/plans.py --ranks 4 --running 64

Every rank is a process of its own; the last one answers each plan with a token for each row. Printed are
medians over the steps: the time that sending takes from rank 0's engine thread, the way there and back of a
lone step, and, with ranks that are busy for --busy ms a step and one step in flight for each rank, how
much longer than that a step takes: what is left of the overhead where steps overlap.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

from torch.distributed import TCPStore

from ds_serve.messages import Row, StepPlan, StepResult
from ds_serve.parallel.control import Controller, Follower
from ds_serve.parallel.place import Place
from ds_serve.parallel.wire import Leave


def plan(step: int, running: int) -> StepPlan:
    """A decode step: one row in sixteen brings a block."""
    rows = [
        Row(
            slot=slot,
            start=1000 + step,
            count=1,
            new_block_ids=[step % 5000] if (slot + step) % 16 == 0 else [],
            sample=True,
        )
        for slot in range(running)
    ]
    return StepPlan(step=step, rows=rows)


def follow(place: Place, port: int, busy_s: float) -> int:
    follower = Follower(place, TCPStore("127.0.0.1", port, is_master=False), 60.0)
    while not isinstance(message := follower.receive(), Leave):
        time.sleep(busy_s if message.step >= 0 else 0)  # a negative step is one of the lone ones
        if place.samples:
            tokens = [row.start % 49152 for row in message.rows]
            follower.deliver(StepResult(step=message.step, token_ids=tokens))
    follower.close()
    return 0


def measure(controller: Controller, args: argparse.Namespace) -> dict[str, float]:
    """Medians in milliseconds."""
    sends, trips, gaps = [], [], []
    for step in range(args.steps):
        message = plan(step - args.steps, args.running)
        began = time.perf_counter()
        controller.send(message)
        sends.append(time.perf_counter() - began)
        controller.results.get()
        trips.append(time.perf_counter() - began)
    ahead = args.ranks
    for step in range(ahead):
        controller.send(plan(step, args.running))
    last = None
    for step in range(args.steps):
        controller.results.get()
        now = time.perf_counter()
        if last is not None:
            gaps.append(now - last - args.busy / 1e3)
        last = now
        if step + ahead < args.steps:
            controller.send(plan(step + ahead, args.running))
    return {
        "sending, on the engine's thread": statistics.median(sends) * 1e3,
        "there and back, a lone step": statistics.median(trips) * 1e3,
        f"longer than {args.busy:g} ms a step, overlapped": statistics.median(gaps) * 1e3,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--running", type=int, default=64, help="rows of a step")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--busy", type=float, default=5.0, help="ms that a rank sleeps for its step")
    parser.add_argument("--follow", type=int, nargs=2, metavar=("RANK", "PORT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.follow:
        rank, port = args.follow
        return follow(Place(rank, 1, args.ranks), port, args.busy / 1e3)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    options = ["--ranks", str(args.ranks), "--busy", str(args.busy)]
    followers = [
        subprocess.Popen([sys.executable, __file__, *options, "--follow", str(rank), str(store.port)])
        for rank in range(1, args.ranks)
    ]
    controller = Controller(Place(0, 1, args.ranks), store, 60.0)
    controller.join(60.0)
    for name, value in measure(controller, args).items():
        print(f"{value:8.3f} ms  {name}")
    controller.send(Leave())
    codes = [follower.wait(10) for follower in followers]
    controller.close()
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
