"""Host work of a step without a model: schedule, build the batch, update, detokenize; prints one JSON line.

    python benchmarks/engine_host.py --running 64

A null model answers every row at once with the next token of a text. Prompts and outputs of --context tokens
in all, so that the figure is a mean over the context; medians over steps, in ms a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from transformers import AutoTokenizer

from ds_serve.attention.layout import KVLayout, LayerKV
from ds_serve.cache.manager import CacheManager
from ds_serve.demo import model_path
from ds_serve.engine.limits import Limits
from ds_serve.engine.scheduler import Scheduler
from ds_serve.messages import Request, SamplingParams, StepResult
from ds_serve.text.detokenize import Detokenizer
from ds_serve.worker.inputs import TokenPool, upload
from ds_serve.worker.slots import SlotTable

TEXT = "The engine speaks integers, the front speaks text, and the workers speak tensors. "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--running", type=int, default=64)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--out", type=int, default=400)
    parser.add_argument("--tokenizer", default=model_path(), help="a model directory")
    args = parser.parse_args()
    torch.set_num_threads(1)

    block_size = 16
    num_blocks = args.running * (args.context // block_size + 1)
    limits = Limits(args.running, 8192, args.context, max_steps_in_flight=2, vocab_size=1 << 30)
    scheduler = Scheduler(limits, CacheManager(num_blocks, block_size))
    layout = KVLayout((LayerKV(1, 8, 8),), block_size)
    slab = layout.allocate(num_blocks, "cpu")
    slots = SlotTable(args.running, args.context, block_size)
    pool = TokenPool(args.running, slab.device)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    text = tokenizer(TEXT * 200, add_special_tokens=False)["input_ids"]
    params = SamplingParams(max_tokens=args.out, temperature=0.0, ignore_eos=True)
    detokenizers = {}
    for index in range(args.running):
        prompt = [index + 5, *text[: args.context - args.out - 1]]
        scheduler.add(Request(id=str(index), prompt_token_ids=prompt, params=params))
        detokenizers[str(index)] = Detokenizer(tokenizer, prompt_token_ids=prompt)

    parts: dict[str, list[float]] = {"schedule": [], "build_batch": [], "update": [], "detokenize": []}

    def built(step):
        upload(step, slab, layout, pool)
        return step

    def timed(name, work):
        start = time.perf_counter()
        result = work()
        parts[name].append((time.perf_counter() - start) * 1e3)
        return result

    while scheduler.num_open:
        plan = timed("schedule", scheduler.schedule)
        for new in plan.new:
            slots.admit(new)
        step = timed("build_batch", lambda plan=plan: built(slots.gather(plan.rows)))
        tokens = [text[position % len(text)] for position in step.drawn_at]
        outputs = timed(
            "update", lambda p=plan, t=tokens: scheduler.update(StepResult(step=p.step, token_ids=t))
        )
        timed("detokenize", lambda o=outputs: [detokenizers[each.id].push(each.token_ids) for each in o])
    line = {"running": args.running, "steps": len(parts["schedule"])}
    medians = {f"{name}_ms": round(statistics.median(times), 3) for name, times in parts.items()}
    print(json.dumps(line | medians | {"total_ms": round(sum(medians.values()), 3)}))


if __name__ == "__main__":
    main()
