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
- **Training**, by the makers of ds_serve, in one run of `python scripts/train_demo.py --out ds_serve/demo/model`: seed {seed},
  {steps:,} steps, {millions:.0f} million tokens ({learnt:.0f} million of them learnt), {seconds:.0f} seconds on {device},
  torch {torch}. The run decays its rate by steps or by time, whichever is further on: another machine's weights differ.
- **Licence**: Apache-2.0.

## Held-back prompts
Prompts that training never asked (pairs of numbers, words to spell, facts in another phrasing, names with the phrase that
gives them...), greedy decoding in float32, whole answers compared; some have a system prompt or earlier turns before them.
Facts, products, phrases and the letters of words have been seen in other prompts.

| kind | right | asked |
|---|---|---|
{rows}

## What it can do
As seen in chats with the shipped weights and in the prompts above, typed properly, in small letters or in capitals: greetings and small talk; sums and differences below 1000 ("999+999", "5-9"), products up to 12 x 12 and their divisions;
counting by up to about thirty; capitals, colours, opposites, plurals and the like, and "and peru?" after one of them; lists
of up to ten; the alphabet; spelling; names, pets, foods, colours and numbers told earlier ("my name is bob", "i have a dog
called rex", "what is my dog called?"); repeating words; small JSON objects; system prompts that give it or the user a
name, or a word to end every answer with; what ds_serve and DeepSpeed are, how to install and start ds_serve.
It turns down, rather than guesses: products such as 17 * 3, numbers from 1000, negative and decimal numbers, powers, roots,
long lists, long counts, essays, translations, and most questions about the world.

## What it cannot do
Anything else; what lies near to what it knows it often answers wrongly. Seen to fail: two things in one sentence ("My name is
Sarah and I live in Berlin."), another pet than the one told of (it gives that one's name), a sister (taken
for a pet), "Repeat after me: I love trains!" (only single words come back), "Say hello world", "reverse the word hello",
four summands, "5 times 6 plus 2", "What is the capital of Atlantis?" (it answers for Australia), "Count from 90 to 99",
"How many GPUs do I need?". Its English is that of the script. Do not rely on what it says.

## Chat format
`<|system|>...<|end|><|user|>...<|end|><|assistant|>...<|end|>`; `<|end|>` ends a turn and a generation.
Tools are described at the end of the system message; a call is `<tool_call>`, `{"name": ..., "arguments": {...}}` and
`</tool_call>` on lines of their own, its result a user's turn in `<tool_response>`. The model was not trained on any:
which tool it calls means nothing, and a call's form is the server's grammar, not its own doing.
"""


def card(record: dict) -> str:
    """The README.md of the model folder; `record` is what training.json holds."""
    table = record["held_back"]
    rows = [f"| {kind} | {right} | {asked} |" for kind, (right, asked) in table.items()]
    total = [sum(column) for column in zip(*table.values(), strict=True)]
    rows.append(f"| **all** | **{total[0]}** | **{total[1]}** |")
    return CARD.format(
        rows="\n".join(rows), millions=record["tokens"] / 1e6, learnt=record["learnt_tokens"] / 1e6, **record
    )
