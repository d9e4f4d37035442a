"""What grammars cost: masks alone, and a batch with a JSON schema beside one without; prints one JSON line.

    python benchmarks/grammar.py --vocabulary 128000

Masks: --rows slots walk a schema by random allowed tokens; microseconds a row and step on the grammars'
thread, with the demo model's tokenizer, or a made-up byte-level BPE of --vocabulary tokens. Batch: --rows
requests of --out tokens each through the engine on the demo model, medians of --repeat alternating rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import statistics
import tempfile
import time

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ds_serve.config import Settings
from ds_serve.demo import model_path
from ds_serve.messages import Request, SamplingParams
from ds_serve.rank import build_local_engine
from ds_serve.text.codec import TextCodec
from ds_serve.text.grammar import Grammars
from ds_serve.worker.constraint import Constraints

ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "kind": {"enum": ["bird", "fish", "other"]},
        "weight": {"type": "number", "minimum": 0, "maximum": 1000},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
    },
    "required": ["name", "kind", "weight", "tags"],
    "additionalProperties": False,
}
LIST = {"type": "array", "items": ITEM, "minItems": 100}  # longer than any output here


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--out", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--vocabulary", type=int, default=0, help="0: the demo model's tokenizer")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.vocabulary:
            make_tokenizer(args.vocabulary, folder)
        figures = masks(folder if args.vocabulary else model_path(), args)
    print(json.dumps(figures | batch(args)))


def make_tokenizer(size: int, folder: str) -> None:
    """A byte-level BPE of random words of up to 12 letters and all that they are merged from."""
    draw = random.Random(0)
    vocabulary = {char: number for number, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    letters = "etaoinshrdlucmfwypvbgkqjxz"
    while len(vocabulary) < size:
        word = "".join(draw.choices(letters, weights=range(26, 0, -1), k=draw.randint(2, 12)))
        parts = ["Ġ", *word] if draw.random() < 0.6 else list(word)
        for end in range(1, len(parts)):
            left, right = "".join(parts[:end]), parts[end]
            if left + right not in vocabulary and len(vocabulary) < size:
                vocabulary[left + right] = len(vocabulary)
                merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)


def masks(folder: str, args: argparse.Namespace) -> dict[str, float]:
    began = time.perf_counter()
    codec = TextCodec(folder)
    constraints = Constraints(folder)
    constraints.wait()
    read_s = time.perf_counter() - began
    grammar = Grammars(codec.tokenizer).json_schema(LIST)
    end = codec.tokenizer.eos_token_id
    slots = list(range(args.rows))
    for slot in slots:
        params = SamplingParams(max_tokens=args.out, eos_token_ids=(end,), grammar=grammar)
        constraints.admit(slot, params, [])
    draw = np.random.default_rng(0)
    times = []
    for _ in range(args.out):
        began = time.perf_counter()
        constraints.begin(slots)
        found = constraints.masks()
        times.append((time.perf_counter() - began) / args.rows * 1e6)
        bits = np.unpackbits(found.view(np.uint8), axis=1, bitorder="little")
        constraints.append(slots, [int(draw.choice(np.flatnonzero(row))) for row in bits])
    constraints.close()
    return {
        "vocabulary": len(codec.tokenizer),
        "read_tokenizers_s": round(read_s, 2),
        "first_mask_us_a_row": round(times[0]),
        "mask_us_a_row": round(statistics.median(times), 1),
        "mask_us_a_row_p99": round(float(np.quantile(times[1:], 0.99)), 1),
    }


def batch(args: argparse.Namespace) -> dict[str, float]:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    codec = TextCodec(model_path())
    grammar = Grammars(codec.tokenizer).json_schema(LIST)
    prompt = codec.encode_chat([{"role": "user", "content": "Name some animals."}])
    engine = build_local_engine(Settings(model=model_path(), num_blocks=1000))

    def tokens_a_second(**asked) -> float:
        outputs = [queue.SimpleQueue() for _ in range(args.rows)]
        began = time.perf_counter()
        for index, each in enumerate(outputs):
            params = SamplingParams(max_tokens=args.out, seed=index, eos_token_ids=(1,), **asked)
            engine.submit(Request(id=str(index), prompt_token_ids=prompt, params=params), each.put)
        for each in outputs:
            while (output := each.get()).finish_reason is None:
                pass
            assert output.finish_reason == "length", output
        return args.rows * args.out / (time.perf_counter() - began)

    free, bound = [], []
    for _ in range(args.repeat + 1):
        free.append(tokens_a_second(ignore_eos=True))
        bound.append(tokens_a_second(grammar=grammar))
    engine.close()
    free, bound = statistics.median(free[1:]), statistics.median(bound[1:])
    return {
        "free_tokens_a_s": round(free),
        "bound_tokens_a_s": round(bound),
        "bound_by_free": round(bound / free, 3),
    }


if __name__ == "__main__":
    main()
