"""Trains the demo model, tokenizer and all, from made-up dialogues, and saves it with a model card.

    python scripts/train_demo.py --out ds_serve/demo/model              # on CUDA, as shipped
    python scripts/train_demo.py --out /tmp/demo --steps 20 --rows 4    # a trial on a CPU

Batch i is a function of (seed, i) alone, made by worker processes ahead of the training loop; nothing is
read from disk or network. The loss counts what the assistant says, and the end mark after it. Rows are packed
with dialogues that do not see each other; every sixth batch holds dialogues of up to 2048 tokens. On CUDA the
arithmetic is bf16 with float32 weights, on a CPU float32. Knows nothing of ds_serve.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent))
import demo_card
import demo_data

PAD, END, SYSTEM, USER, ASSISTANT = SPECIALS = [
    "<|pad|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
]
# Tools, calls and results are in plain words: training saw none, a grammar holds the model to calls.
CHAT_TEMPLATE = (
    "{% macro explain() %}"
    "{{ 'You can call these functions:\\n' }}"
    "{% for tool in tools %}{{ tool['function'] | tojson + '\\n' }}{% endfor %}"
    '{{ \'A call is <tool_call>\\n{"name": NAME, "arguments": OBJECT}\\n</tool_call>\' }}'
    "{% endmacro %}"
    "{% if tools and messages[0]['role'] != 'system' %}{{ '<|system|>' + explain() + '<|end|>' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'tool' %}"
    "{{ '<|user|><tool_response>\\n' + message['content'] + '\\n</tool_response>' }}"
    "{% elif message['role'] in ['system', 'user', 'assistant'] %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% else %}"
    "{{ raise_exception('The roles are system, user, assistant and tool, not ' + message['role']) }}"
    "{% endif %}"
    "{% if tools and loop.first and message['role'] == 'system' %}{{ '\\n' + explain() }}{% endif %}"
    "{% for call in message['tool_calls'] or [] %}"
    "{% if message['content'] or not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<tool_call>\\n{\"name\": ' + call['function']['name'] | tojson }}"
    "{{ ', \"arguments\": ' + call['function']['arguments'] | tojson + '}\\n</tool_call>' }}"
    "{% endfor %}"
    "{{ '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CONTEXT = 2048
SHORT = 512


def train_tokenizer(seed: int, dialogues: int, vocab: int) -> Tokenizer:
    """A byte-level BPE of `vocab` tokens, each digit a token of its own, learnt from the first dialogues."""
    rng = random.Random(f"tokenizer/{seed}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=SPECIALS,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = (m["content"] for _ in range(dialogues) for m in demo_data.training_dialogue(rng))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encoded(tokenizer: Tokenizer, messages: list[dict[str, str]], limit: int) -> tuple[list[int], list[bool]]:
    """Token ids of a dialogue and whether each is to be learnt; cut after the last turn within `limit`."""
    ids: list[int] = []
    learn: list[bool] = []
    for message, piece in zip(
        messages, tokenizer.encode_batch([m["content"] for m in messages]), strict=True
    ):
        said = message["role"] == "assistant"
        if len(ids) + len(piece.ids) + 2 > limit:
            break
        ids += [tokenizer.token_to_id(f"<|{message['role']}|>"), *piece.ids, tokenizer.token_to_id(END)]
        learn += [False] + [said] * (len(piece.ids) + 1)
    return ids, learn


_worker: dict = {}


def _start_worker(tokenizer_json: str, seed: int, rows: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker.update(tokenizer=Tokenizer.from_str(tokenizer_json), seed=seed, rows=rows)


def make_batch(step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Batch number `step`: (ids, document number, learn), each [rows, length]; document 0 is padding."""
    tokenizer, rng = _worker["tokenizer"], random.Random(f"{_worker['seed']}/{step}")
    long = step % 6 == 5
    rows, length = (max(1, _worker["rows"] * SHORT // CONTEXT), CONTEXT) if long else (_worker["rows"], SHORT)
    ids, docs, learn = (np.zeros((rows, length), dtype) for dtype in (np.int32, np.int32, bool))
    row = used = number = 0
    while row < rows:
        if rng.random() < 0.04:
            text = tokenizer.encode(demo_data.plain_text(rng)).ids + [tokenizer.token_to_id(END)]
            doc, mask = text[:length], [True] * min(len(text), length)
        else:
            turns = rng.randint(20, 90) if long and rng.random() < 0.5 else None
            doc, mask = encoded(tokenizer, demo_data.training_dialogue(rng, turns), length)
        if used + len(doc) > length:
            row, used = row + 1, 0
            if row == rows:
                break
        number += 1
        span = slice(used, used + len(doc))
        ids[row, span], docs[row, span], learn[row, span] = doc, number, mask
        used += len(doc)
    return ids, docs, learn


def loss_of(
    model: LlamaForCausalLM, ids: torch.Tensor, docs: torch.Tensor, learn: torch.Tensor
) -> torch.Tensor:
    """Mean cross entropy of the learnt tokens of packed [rows, length]; attention stays in a document."""
    length = ids.shape[1]
    places = torch.arange(length, device=ids.device)
    starts = torch.where(docs != torch.roll(docs, 1, 1), places, 0)
    starts[:, 0] = 0
    position = places - torch.cummax(starts, 1).values
    mask = (docs[:, None, :, None] == docs[:, None, None, :]) & (places[:, None] >= places)
    hidden = model.model(
        input_ids=ids, position_ids=position, attention_mask=mask, use_cache=False
    ).last_hidden_state
    rows, cols = torch.nonzero(learn[:, 1:], as_tuple=True)
    logits = model.lm_head(hidden[rows, cols])
    return torch.nn.functional.cross_entropy(logits.float(), ids[rows, cols + 1])


def train(model: LlamaForCausalLM, batches, args: argparse.Namespace, device: str) -> dict:
    """AdamW with warm-up and cosine decay; ends after args.steps or args.minutes, whichever comes first."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=device == "cuda",
    )
    tokens = learnt = step = 0
    begun, waited = time.perf_counter(), 0.0
    model.train()
    while step < args.steps:
        asked = time.perf_counter()
        arrays = next(batches)
        waited += time.perf_counter() - asked
        progress = max(step / args.steps, (time.perf_counter() - begun) / (60 * args.minutes))
        if progress >= 1:
            break
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
        rate = args.lr * min(1.0, (step + 1) / args.warmup) * decay
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids, docs, learn = (torch.from_numpy(a).to(device, non_blocking=True) for a in arrays)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = loss_of(model, ids.long(), docs, learn)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, tokens, learnt = step + 1, tokens + int((arrays[1] > 0).sum()), learnt + int(arrays[2].sum())
        if step % args.report == 0 or step == 1:
            print(
                f"step {step} loss {loss.item():.4f} lr {rate:.2e} tokens {tokens / 1e6:.1f} M "
                f"time {time.perf_counter() - begun:.0f} s (waited for data {waited:.0f} s)",
                flush=True,
            )
    return {
        "steps": step,
        "tokens": tokens,
        "learnt_tokens": learnt,
        "loss": round(loss.item(), 4),
        "seconds": round(time.perf_counter() - begun, 1),
    }


@torch.inference_mode()
def reply_to(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    dialogues: list[list[dict[str, str]]],
    batch: int = 250,
) -> list[str]:
    """Greedy replies of at most 160 tokens, in batches padded on the left."""
    replies = []
    for start in range(0, len(dialogues), batch):
        texts = [
            tokenizer.apply_chat_template(d, tokenize=False, add_generation_prompt=True)
            for d in dialogues[start : start + batch]
        ]
        inputs = tokenizer(
            texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        )
        inputs = {k: v.to(model.device) for k, v in inputs.items() if k != "token_type_ids"}
        out = model.generate(**inputs, do_sample=False, max_new_tokens=160)
        replies += tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return replies


def evaluate(folder: Path, device: str, dtype: torch.dtype, n: int) -> dict[str, list[int]]:
    """{kind: [right, asked]} of the saved weights on `n` held-back prompts; prints them and some misses."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    probes = demo_data.held_back(n)
    replies = reply_to(model, tokenizer, [p.messages for p in probes])
    right = [demo_data.is_right(p, r) for p, r in zip(probes, replies, strict=True)]
    asked, good = (
        Counter(p.kind for p in probes),
        Counter(p.kind for p, ok in zip(probes, right, strict=True) if ok),
    )
    for kind in asked:
        print(f"{kind:12} {good[kind]:4} of {asked[kind]:4}")
    print(f"held-back, {dtype}: {sum(right)} of {len(right)} right")
    for probe, reply in [(p, r) for p, r, ok in zip(probes, replies, right, strict=True) if not ok][:40]:
        print(f"  {probe.kind}: {probe.messages[-1]['content']!r} -> {reply!r}, not {probe.answers[0]!r}")
    return {kind: [good[kind], asked[kind]] for kind in asked}


def save(model: LlamaForCausalLM, raw: Tokenizer, out: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token=PAD,
        eos_token=END,
        model_max_length=CONTEXT,
        extra_special_tokens=[SYSTEM, USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(out, save_jinja_files=False)
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)


def start_model(args: argparse.Namespace, tokenizer: Tokenizer) -> LlamaForCausalLM:
    """New weights of the demo's shape, in float32."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=args.vocab,
            hidden_size=256,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32,
            intermediate_size=512,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.token_to_id(PAD),
            bos_token_id=None,
            eos_token_id=tokenizer.token_to_id(END),
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=20261122)
    parser.add_argument("--steps", type=int, default=8800)
    parser.add_argument("--minutes", type=float, default=6.9, help="the decay ends here at the latest")
    parser.add_argument("--rows", type=int, default=96, help=f"rows of {SHORT} tokens in a batch")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--tokenizer-dialogues", type=int, default=30_000)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--probes", type=int, default=1000, help="held-back prompts for the card's table")
    parser.add_argument("--report", type=int, default=100)
    args = parser.parse_args()
    begun = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    raw = train_tokenizer(args.seed, args.tokenizer_dialogues, args.vocab)
    print(f"tokenizer: {raw.get_vocab_size()} tokens, {time.perf_counter() - begun:.0f} s", flush=True)
    with multiprocessing.get_context("spawn").Pool(
        args.workers, _start_worker, (raw.to_str(), args.seed, args.rows)
    ) as pool:
        batches = pool.imap(make_batch, range(args.steps))
        model = start_model(args, raw).to(device)
        parameters = sum(p.numel() for p in model.parameters())
        print(f"device {device}, {parameters:,} parameters, seed {args.seed}", flush=True)
        record = train(model, batches, args, device)
        pool.terminate()
    save(model, raw, args.out)
    record |= {
        "seed": args.seed,
        "batch_rows": args.rows,
        "lr": args.lr,
        "parameters": parameters,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
    }
    record["held_back"] = evaluate(args.out, device, torch.float32, args.probes)
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    (args.out / "README.md").write_text(demo_card.card(record))
    print(json.dumps(record))


if __name__ == "__main__":
    main()
