"""One engine and its figures, in a process of its own: the part of benchmarks/gpu.py that runs on ranks.

    python benchmarks/gpu_run.py JOB.json FOUND.json

A job says which settings and which measurements; what was found is plain values. Every time is one that a
caller of the engine sees: from submit() to an output's callback. Several ranks run this same file, and all
but the first follow it.
"""

from __future__ import annotations

import json
import logging
import queue
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gpu_model import DRY, FULL, Scale
from gpu_profile import Watch, table

from ds_serve.config import Settings
from ds_serve.launch import ranks
from ds_serve.messages import Output, Request, SamplingParams, Stats
from ds_serve.rank import build_local_engine, follow

HOST_POOL_PROMPTS = 3
WAIT_S = 300.0
HEARTBEAT_S = 1.5  # other ranks tell once a second how long they were busy


class Bench:
    """An engine, and random prompts that it has not seen."""

    def __init__(self, settings: Settings, scale: Scale) -> None:
        self.engine = build_local_engine(settings)
        self.scale = scale
        self._rng = random.Random(0)
        self._count = 0
        self.launches_s = 0.0  # that rank 0's thread took to launch steps
        worker = self.engine._loop._ranks.worker
        graphs = None if worker._graphs is None else f"of up to {worker._graphs.sizes[-1]} rows"
        self.in_use = (
            f"attention {worker.model.backend.name}, layers fused or compiled: "
            f"{worker.model.injection.injected} + {worker.model.injection.compiled}, graphs: {graphs}"
        )
        self._time_launches(worker)

    def _time_launches(self, worker) -> None:
        launch = worker.launch

        def timed(plan):
            began = time.perf_counter()
            launched = launch(plan)
            self.launches_s += time.perf_counter() - began
            return launched

        worker.launch = timed

    def prompts(self, count: int, length: int) -> list[list[int]]:
        vocab = self.engine.info.vocab_size
        return [[self._rng.randrange(10, vocab) for _ in range(length)] for _ in range(count)]

    def run(
        self, prompts: list[list[int]], out: int, all_started: Callable[[], None] | None = None, **params
    ) -> list[Answer]:
        """All prompts at once, out tokens each, greedy; all_started is called once each has a token.

        Outputs are only noted as they come: to wake this thread for each would take time from the engine's.
        """
        params = {"temperature": 0.0, "ignore_eos": True, "max_tokens": out} | params
        events: queue.SimpleQueue = queue.SimpleQueue()  # a last output, or None: each has a token
        answers: dict[str, Answer] = {}
        started: set[str] = set()

        def note(output: Output) -> None:
            answers[output.id].outputs.append((time.perf_counter(), output))
            if all_started is not None and output.id not in started:
                started.add(output.id)
                if len(started) == len(prompts):
                    events.put(None)
            if output.finish_reason is not None:
                events.put(output)

        for prompt in prompts:
            request = Request(id=f"b{self._count}", prompt_token_ids=prompt, params=SamplingParams(**params))
            self._count += 1
            answers[request.id] = Answer(time.perf_counter())
            self.engine.submit(request, note)
        running = len(prompts)
        while running:
            event = events.get(timeout=WAIT_S)
            if event is None:
                all_started()
            elif event.error:
                raise RuntimeError(event.error)
            else:
                running -= 1
        return list(answers.values())

    def stats(self) -> Stats:
        """The engine's, once all ranks have said how busy they were."""
        if len(self.engine.stats().stage_busy_s) > 1:
            time.sleep(HEARTBEAT_S)
        return self.engine.stats()

    def first_token_ms(self, prompt: list[int]) -> tuple[float, Answer]:
        [answer] = self.run([prompt], 1)
        return (answer.times[0] - answer.began) * 1e3, answer


@dataclass
class Answer:
    """One request's outputs, each with when it came; began: when it was submitted. time.perf_counter()'s."""

    began: float
    outputs: list[tuple[float, Output]] = field(default_factory=list)

    @property
    def last(self) -> Output:
        return self.outputs[-1][1]

    @property
    def tokens(self) -> list[int]:
        return [token for _, output in self.outputs for token in output.token_ids]

    @property
    def times(self) -> list[float]:
        """When each token came."""
        return [now for now, output in self.outputs for _ in output.token_ids]

    @property
    def logprobs(self) -> list[float]:
        """Of the tokens."""
        return [each.logprob for _, output in self.outputs for each in output.logprobs or []]

    @property
    def prompt_logprobs(self) -> list[float]:
        """Of the prompt's tokens but the first."""
        return [each.logprob for _, output in self.outputs for each in output.prompt_logprobs or []]


@dataclass
class Found:
    """Figures by row, beside some of them a note; texts of parts that tell a story, and what parts failed."""

    rows: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    first_token_at: float = 0.0  # seconds since the epoch
    in_use: str = ""  # of what makes CUDA fast

    def put(self, row: str, value: float, note: str = "") -> None:
        self.rows[row], self.notes[row] = value, note


# -- measurements ------------------------------------------------------------------------------------


def decode_steps(bench: Bench, found: Found) -> None:
    """Milliseconds a step while all rows decode. Prompts are in the cache, so all begin at nearly once."""
    scale = bench.scale
    for number, rows in enumerate(scale.batches):
        prompts = bench.prompts(rows, scale.prompt)
        bench.run(prompts, 1)
        bench.run(prompts, min(8, scale.out))
        rounds, host = [], Host(bench)
        for _ in range(scale.rounds):
            answers = bench.run(prompts, scale.out)
            rounds.append(_steps_ms(answers))
        means, medians = zip(*rounds, strict=True)
        note = f"median gap {statistics.median(medians):.2f}; {host.text()}"
        found.put(f"step/{number}", statistics.median(means), note)


def _steps_ms(answers: list[Answer]) -> tuple[float, float]:
    """(mean, median) milliseconds from token to token of the answer that began last, while all run."""
    began, ended = max(each.times[0] for each in answers), min(each.times[-1] for each in answers)
    last = max(answers, key=lambda each: each.times[0])
    times = [each for each in last.times if began <= each <= ended]
    if len(times) < 2:
        raise RuntimeError("the requests never all decoded at once: more --out, or fewer at once")
    gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
    return (times[-1] - times[0]) / len(gaps) * 1e3, statistics.median(gaps) * 1e3


class Host:
    """What the host did for each step since this was made: the engine's thread, and rank 0's, which launches.
    stages: how long each computed, on CUDA by its device's clock."""

    def __init__(self, bench: Bench) -> None:
        self._bench, self._before, self._launches = bench, bench.stats(), bench.launches_s

    def text(self) -> str:
        before, after = self._before, self._bench.stats()
        steps = max(1, after.num_steps - before.num_steps)

        def each(name: str) -> float:
            return (getattr(after, name) - getattr(before, name)) / steps * 1e3

        pairs = zip(after.stage_busy_s, before.stage_busy_s, strict=True)
        stages = "+".join(f"{(now - then) / steps * 1e3:.2f}" for now, then in pairs)
        launch = (self._bench.launches_s - self._launches) / steps * 1e3
        return (
            f"a step: plan {each('plan_s'):.2f} update {each('update_s'):.2f} wait {each('wait_s'):.2f} "
            f"launch {launch:.2f} stages {stages}"
        )


def first_tokens(bench: Bench, found: Found) -> None:
    """Milliseconds to the first token of a lone prompt, cold; then of the longest as a device hit."""
    scale = bench.scale
    for number, length in enumerate(scale.long):
        rounds, hits, host = [], [], Host(bench)
        for turn, prompt in enumerate(bench.prompts(scale.rounds + 1, length)):
            cold, _ = bench.first_token_ms(prompt)
            hit, answer = bench.first_token_ms(prompt)
            if answer.last.num_cached_tokens < length - 2 * bench.engine.info.block_size:
                raise RuntimeError(f"a device hit found {answer.last.num_cached_tokens} of {length} tokens")
            if turn:
                rounds.append(cold)
                hits.append(hit)
        found.put(f"ttft/{number}", statistics.median(rounds), host.text())
    found.put("hit/device", statistics.median(hits), f"best {min(hits):.1f}")


def rates(bench: Bench, found: Found) -> None:
    """Output tokens a second of new prompts at once, prompts' time included."""
    scale = bench.scale
    for number, rows in enumerate(scale.rates):
        bench.run(bench.prompts(rows, scale.prompt), 4)
        rounds, host = [], Host(bench)
        for _ in range(scale.rounds):
            prompts = bench.prompts(rows, scale.prompt)
            time.sleep(0.2)
            answers = bench.run(prompts, scale.out)
            ended = max(each.times[-1] for each in answers)
            rounds.append(rows * scale.out / (ended - answers[0].began))
        note = f"best {max(rounds):.0f}; {host.text()}"
        found.put(f"rate/{number}", statistics.median(rounds), note)


def host_hits(bench: Bench, found: Found) -> None:
    """Milliseconds to the first token of a long prompt that other prompts have pushed to the host tier."""
    length = bench.scale.long[-1]
    rounds, copies = [], []
    for turn in range(bench.scale.rounds + 1):
        [prompt] = bench.prompts(1, length)
        bench.first_token_ms(prompt)
        bench.first_token_ms(prompt)
        held = bench.engine.info.num_blocks * bench.engine.info.block_size // length
        for other in bench.prompts(held + 2, length):
            for _ in range(2):  # a scan of prompts that never come back would not push it out
                bench.first_token_ms(other)
        before = bench.engine.stats()
        taken, answer = bench.first_token_ms(prompt)
        if answer.last.num_host_tokens < length // 2:
            raise RuntimeError(
                f"of {length} tokens {answer.last.num_host_tokens} came from the host tier: loading a block "
                f"was measured at {bench.engine.info.copy_s_per_block * 1e6:.0f} us, computing a token at "
                f"{bench.engine.info.prefill_s_per_token * 1e6:.1f} us"
            )
        if turn:
            rounds.append(taken)
            copies.append((bench.engine.stats().load_s - before.load_s) * 1e3)
    found.put("hit/host", statistics.median(rounds), f"copy {statistics.median(copies):.1f} ms")


def profile(bench: Bench, found: Found) -> None:
    """What a decode step and a prompt's step are made of; times are longer than without a profiler."""
    scale = bench.scale
    Watch.ready()
    for rows in scale.batches:
        prompts = bench.prompts(rows, scale.prompt)
        bench.run(prompts, 4)
        watch = Watch()
        answer = bench.run(prompts, scale.out, all_started=watch.start)[0]
        steps = sum(began > watch.started for began in answer.times)
        found.texts[f"decode step, {rows} at once"] = table(watch.stop(), steps)
    length = scale.long[0]
    first, second = bench.prompts(2, length)
    bench.first_token_ms(first)
    watch = Watch()
    watch.start()
    bench.first_token_ms(second)
    found.texts[f"prompt of {length}"] = table(watch.stop(), 1)


PARTS: dict[str, Callable[[Bench, Found], None]] = {
    "decode": decode_steps, "ttft": first_tokens, "rate": rates, "host": host_hits, "profile": profile,
}  # fmt: skip


# -- one process -------------------------------------------------------------------------------------


def settings_of(job: dict, scale: Scale, **own) -> Settings:
    """The engine's settings: those of the figures, this job's own, then what the caller set by hand."""
    longest = scale.long[-1] + 64
    chosen = {
        "model": job["folder"],
        "device": "cpu" if job["dry"] else "cuda",
        "max_num_seqs": max(scale.batches + scale.rates),
        "max_num_batched_tokens": scale.chunk,
        "max_model_len": longest,
        "tensor_parallel": job["tp"],
        "pipeline_parallel": job["pp"],
    }
    if "host" in job["parts"]:  # a small device pool, so that few prompts push another out of it
        chosen["num_blocks"] = HOST_POOL_PROMPTS * longest // 16 + 64
        chosen["host_cache"] = "64MiB" if job["dry"] else "8GiB"
    elif job["dry"]:
        chosen["kv_cache_memory"] = "64MiB"
    return Settings(**(chosen | own | job["settings"]))


def run(job: dict, save: Callable[[dict], None]) -> None:
    """Does a job: {folder, dry, tp, pp, parts, settings}. Saves what it has after each part; a part that
    fails leaves its reason, and the others go on."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("ds_serve").setLevel(logging.INFO)  # which attention, what is compiled, which graphs
    scale = DRY if job["dry"] else FULL
    bench, found = Bench(settings_of(job, scale), scale), Found()
    found.in_use = bench.in_use
    bench.run(bench.prompts(1, scale.prompt), 1)
    found.first_token_at = time.time()
    save(asdict(found))
    for part in job["parts"]:
        try:
            PARTS[part](bench, found)
        except Exception as error:
            found.errors[part] = f"{type(error).__name__}: {error}"
        save(asdict(found))
    bench.engine.close()


def main() -> int:
    if (env := ranks()) is not None and env.rank > 0:
        return follow()
    job = json.loads(Path(sys.argv[1]).read_text())
    run(job, lambda found: Path(sys.argv[2]).write_text(json.dumps(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
