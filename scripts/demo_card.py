"""The demo model's card, written from the record of its training. `train_demo.py` calls it, nobody else."""

from __future__ import annotations

CARD = """---
license: apache-2.0
language: en
pipeline_tag: text-generation
tags: [demo, synthetic]
---
# The demo model of ds_serve

A very small Llama ({parameters:,} parameters, bf16, 8 layers, 8 heads over 4 key-value heads, context 2048, byte-level BPE
of 2048 tokens) that shows a server at work without a download. It is a demo: it knows what is in its script, and no more.

- **Data**: dialogues that `scripts/demo_data.py` makes up as training goes: small talk, sums, facts from tables in
  `scripts/demo_facts.py`, lists, spelling, repeating, small JSON objects, remembering what the user said, jokes, short
  stories, and questions about ds_serve and about itself. No outside text was used.
- **Training**, by the makers of ds_serve, with `scripts/train_demo.py`:
{stages}
- **Licence**: Apache-2.0.

## Held-back prompts
Prompts that training never asked (pairs of numbers, words to spell, facts in another phrasing, names with the phrase that
gives them...), greedy decoding in float32, whole answers compared; some have a system prompt or earlier turns before them.
Facts, products, phrases and the letters of words have been seen in other prompts.

| kind | right | asked |
|---|---|---|
{rows}

## What it can do
Greetings and small talk; sums and differences below 1000, products up to 12 x 12 and their divisions; counting;
capitals, colours, opposites, plurals and the like; short lists; spelling; names, pets, places and numbers told earlier in
the dialogue; system prompts that give it or the user a name, or a word to end every answer with.

## What it cannot do
Anything else: it says so for many questions, and answers others wrongly. Seen to fail: names in small letters ("my name is
bob"), prompts in capitals, "What is my dog called?", lists of more than ten, counting beyond 99, products such as 17 * 3,
negative or decimal numbers typed first, "List the letters of the alphabet.". Its English is that of the script. Do not rely
on what it says.

## Chat format
`<|system|>...<|end|><|user|>...<|end|><|assistant|>...<|end|>`; `<|end|>` ends a turn and a generation.
"""


STAGE = ("  {n}. seed {seed}, {steps:,} steps, {millions:.2f} million tokens ({learnt:.2f} million of them learnt), "
         "{seconds:.0f} seconds on {device}, torch {torch}{aim}")


def _stages(record: dict) -> list[dict]:
    return [*(_stages(record["resumed_from"]) if "resumed_from" in record else []), record]


def card(record: dict) -> str:
    """The README.md of the model folder; `record` is what training.json holds."""
    table = record["held_back_many"]
    rows = [f"| {kind} | {right} | {asked} |" for kind, (right, asked) in table.items()]
    total = [sum(column) for column in zip(*table.values(), strict=True)]
    rows.append(f"| **all** | **{total[0]}** | **{total[1]}** |")
    stages = [STAGE.format(n=i + 1, millions=stage["tokens"] / 1e6, learnt=stage["learnt_tokens"] / 1e6,
                           aim=": tuned on products, with --resume and --products" if i else "", **stage)
              for i, stage in enumerate(_stages(record))]
    return CARD.format(rows="\n".join(rows), stages="\n".join(stages), parameters=record["parameters"])
