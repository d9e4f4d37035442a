"""How busy pipeline stages are, on real ranks, and what a pipeline gives beside one rank alone.

    python benchmarks/pipeline.py smollm2-135m --pp 2

It starts its ranks itself (the deepspeed launcher, one thread each). A stage's utilisation is the time that
it computed over the time with a step in flight (Stats.stage_busy_s, active_s). Printed are, for a prompt that
is cut into m = 1, 2, 4, 8 chunks of --chunk tokens, each stage's utilisation and the ideal m / (m + p - 1);
then decoding with --prompts requests at once: utilisation and tokens/s; last the same on one rank of one
thread. `python -m pytest tests/unit -k utilisation -s` has the same figures for simulated stage times.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from shapes import directory

from ds_serve.config import Settings
from ds_serve.launch import Options, ranks, several
from ds_serve.messages import Request, SamplingParams
from ds_serve.rank import build_local_engine, follow

SETTLE_S = 1.5  # busy times come with heartbeats, one a second


class Bench:
    """One engine, and random prompts that it has not seen."""

    def __init__(self, settings: Settings) -> None:
        self.engine = build_local_engine(settings)
        self._rng = random.Random(0)
        self._count = 0

    def run(self, prompts: int, length: int, out: int) -> tuple[list[float], float]:
        """(utilisation of each stage, seconds) of prompts at once."""
        time.sleep(SETTLE_S)
        before = self.engine.stats()
        outputs: queue.SimpleQueue = queue.SimpleQueue()
        began = time.perf_counter()
        for _ in range(prompts):
            ids = [self._rng.randrange(10, self.engine.info.vocab_size) for _ in range(length)]
            params = SamplingParams(max_tokens=out, temperature=0.0, ignore_eos=True)
            request = Request(id=f"b{self._count}", prompt_token_ids=ids, params=params)
            self._count += 1
            self.engine.submit(request, outputs.put)
        running = prompts
        while running:
            output = outputs.get()
            if output.error:
                raise RuntimeError(output.error)
            running -= output.finish_reason is not None
        seconds = time.perf_counter() - began
        time.sleep(SETTLE_S)
        after = self.engine.stats()
        active = after.active_s - before.active_s
        pairs = zip(after.stage_busy_s, before.stage_busy_s, strict=True)
        return [(now - then) / active for now, then in pairs], seconds


def measure(args: argparse.Namespace, pp: int) -> dict:
    settings = Settings(
        model=args.folder,
        pipeline_parallel=pp,
        stage_layers=args.stage_layers if pp > 1 else None,
        num_threads=1,
        max_num_batched_tokens=args.chunk,
    )
    bench = Bench(settings)
    bench.run(4, args.chunk, 8)
    found: dict = {"chunks": {}}
    for count in (1, 2, 4, 8):
        rounds = [bench.run(1, count * args.chunk, 1) for _ in range(args.repeat)]
        stages = [sorted(each)[len(each) // 2] for each in zip(*(busy for busy, _ in rounds), strict=True)]
        found["chunks"][count] = {"busy": stages, "seconds": sorted(s for _, s in rounds)[len(rounds) // 2]}
    busy, seconds = bench.run(args.prompts, 16, args.out)
    found["decode"] = {"busy": busy, "tokens_per_s": args.prompts * args.out / seconds}
    bench.engine.close()
    return found


def launch(args: argparse.Namespace, pp: int) -> dict:
    """measure() on pp ranks, each a process of one thread."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        arguments = [*sys.argv[1:], "--measure", str(pp), str(out)]
        if pp == 1:
            subprocess.run([sys.executable, __file__, *arguments], check=True)
        else:
            settings = Settings(model=args.folder, pipeline_parallel=pp)
            started = several(settings, Options(), "pipeline", arguments)
            path = f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"
            subprocess.run(started.command, env=started.environment | {"PYTHONPATH": path}, check=True)
        return json.loads(out.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a directory, or a shape of benchmarks/shapes.py")
    parser.add_argument("--pp", type=int, default=2)
    parser.add_argument("--stage-layers", help="10,20: so that stages take equal time; a head costs time too")
    parser.add_argument("--chunk", type=int, default=128, help="tokens of a chunk")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--out", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--measure", nargs=2, metavar=("PP", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.folder = directory(args.model)
    if args.measure:
        if ranks() is not None and ranks().rank > 0:
            return follow()
        found = measure(args, int(args.measure[0]))
        Path(args.measure[1]).write_text(json.dumps(found))
        return 0
    several_ranks, one = launch(args, args.pp), launch(args, 1)
    print(f"{args.pp} stages of one thread; utilisation of each stage")
    for count, entry in several_ranks["chunks"].items():
        shares = " ".join(f"{share:5.1%}" for share in entry["busy"])
        ideal = int(count) / (int(count) + args.pp - 1)
        alone = one["chunks"][count]["seconds"]
        print(
            f"  prompt of {count} chunks: {shares}  ideal {ideal:5.1%}   "
            f"{entry['seconds'] * 1e3:.0f} ms, one rank {alone * 1e3:.0f} ms"
        )
    decode, alone = several_ranks["decode"], one["decode"]["tokens_per_s"]
    shares = " ".join(f"{share:5.1%}" for share in decode["busy"])
    rate = decode["tokens_per_s"]
    print(
        f"  {args.prompts} requests: {shares}   {rate:.0f} tok/s, one rank {alone:.0f} ({rate / alone:.2f} x)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
