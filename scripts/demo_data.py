"""Dialogues for the demo model: a seeded generator with a train side and a held-back side, and a checker of answers.

No prompt of the held-back side is ever asked on the train side (`demo_turns.is_held` decides by a hash of what is
asked). Knows nothing of tokens, tensors or models. `train_demo.py` and `tests/model/test_demo_quality.py` call
`training_dialogue(rng)`, `plain_text(rng)`, `held_back(n, seed)` and `is_right(probe, reply)`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

import demo_facts as facts
import demo_memory as memory
import demo_phrases as phrases
import demo_story
import demo_sums as sums
import demo_turns as turns
from demo_turns import Talk

Message = dict[str, str]

KINDS: dict[str, Callable[[random.Random, Talk], turns.Drawn]] = {
    "arithmetic": sums.arithmetic,
    "numbers": sums.numbers,
    "fact": turns.fact,
    "list": turns.listing,
    "spelling": turns.spelling,
    "repeat": turns.repeating,
    "json": turns.as_json,
    "small talk": turns.small_talk,
    "identity": turns.identity,
    "ds_serve": turns.about_ds_serve,
    "unknown": turns.unknown,
    "story": demo_story.story,
    "telling": memory.telling,
    "recalling": memory.recalling,
}
TRAIN_SHARES = {
    "arithmetic": 22,
    "numbers": 9,
    "fact": 14,
    "list": 8,
    "spelling": 10,
    "repeat": 4,
    "json": 2,
    "small talk": 10,
    "identity": 7,
    "ds_serve": 9,
    "unknown": 11,
    "story": 1.5,
    "telling": 9,
    "recalling": 10,
}
HELD_SHARES = {
    "arithmetic": 40,
    "fact": 35,
    "list": 20,
    "spelling": 20,
    "numbers": 18,
    "memory": 15,
    "ds_serve": 12,
    "unknown": 10,
    "small talk": 10,
    "identity": 8,
    "repeat": 7,
    "json": 5,
}
NEUTRAL = [
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "You are a chatbot.",
    "You are the demo model of ds_serve.",
    "Answer the user's questions.",
    "Be brief and polite.",
]
ROLES = "assistant tutor teacher helper guide chatbot librarian friend expert secretary coach model".split()
MANNERS = "helpful friendly polite brief kind honest careful cheerful patient clever quick concise".split()
STYLED = {"spelling", "repeat", "json", "telling"}  # these choose capitals or small letters themselves
MISTYPED = {"fact", "small talk", "identity", "ds_serve", "unknown", "story", "recalling"}
RULES = [
    "Answer briefly.",
    "Be polite.",
    "Answer in English.",
    "Do not lie.",
    "Keep it short.",
    "Help the user.",
    "Think before you answer.",
    "Answer in one sentence.",
    "Always be kind.",
    "If you do not know, say so.",
    "Use simple words.",
    "Never be rude.",
]


@dataclass(frozen=True)
class Probe:
    """A held-back prompt: messages up to a user turn, and the answers that count as right."""

    kind: str
    messages: list[Message]
    answers: list[str]


def normal(text: str) -> str:
    """Lower case, single blanks, no closing full stop or exclamation mark: what two equal answers share."""
    return " ".join(text.lower().split()).rstrip(".! ")


def mistyped(rng: random.Random, text: str) -> str:
    """The text with one letter left out, doubled or swapped with the next."""
    at = rng.randrange(len(text) - 1)
    if not text[at : at + 2].isalpha():
        return text
    return rng.choice(
        [
            text[:at] + text[at + 1 :],
            text[:at] + text[at] + text[at:],
            text[:at] + text[at + 1] + text[at] + text[at + 2 :],
        ]
    )


def rough(rng: random.Random, text: str, kind: str) -> str:
    """The text as a stranger may type it: small first letter, no closing mark, contracted, with a please or a typo."""
    if kind in MISTYPED and len(text) > 5 and rng.random() < 0.06:
        text = mistyped(rng, text)
    if rng.random() < 0.15:
        text = (
            text.replace("What is", "What's", 1).replace("Who is", "Who's", 1).replace("do not", "don't", 1)
        )
    if rng.random() < 0.12:
        text = text.replace("'s ", "s ", 1)
    if rng.random() < 0.15:
        text = text.replace("I'm", "I am", 1) if "I'm" in text else text.replace("I am", "I'm", 1)
    if rng.random() < 0.3 and not text.isupper():
        text = text[0].lower() + text[1:]
    if rng.random() < 0.3 and text[-1] in ".?!":
        text = text[:-1]
    elif rng.random() < 0.05 and text[-1] in ".?!":
        text = text[:-1] + rng.choice([" please", ", please.", ", please?", "!!", "??", " :)", "..."])
    return text if kind in STYLED else turns.cased(rng)(text)


def _system(rng: random.Random, talk: Talk) -> str | None:
    """A system prompt or None; some name the model or the user, or ask for an ending of every answer."""
    chance = rng.random()
    if chance < 0.6:
        return None
    base = rng.choice(NEUTRAL)
    if rng.random() < 0.5:
        role = f"You are a {rng.choice(MANNERS)} {rng.choice(ROLES)}."
        base = " ".join([role, *rng.sample(RULES, rng.randint(0, 3))])
    name = turns.person(rng)
    if chance < 0.67:
        talk.persona = name
        said = rng.choice(
            [
                "Your name is {n}. {b}",
                "You are {n}. {b}",
                "You are {n}, a " + rng.choice(ROLES) + ".",
                "{b} Your name is {n}.",
            ]
        )
        return said.format(n=name, b=base)
    if chance < 0.74:
        talk.known["name"] = name
        return rng.choice(
            ["The user's name is {n}. {b}", "{b} The user is called {n}.", "{b} You talk to {n}."]
        ).format(n=name, b=base)
    if chance < 0.8:
        talk.ending = rng.choice(
            [
                turns.some_word(rng),
                rng.choice(["over", "meow", "woof", "my friend", "sir", "amen", "ahoy", "cheers"]),
            ]
        )
        said = rng.choice(
            [
                '{b} End every answer with "{w}".',
                'End every answer with "{w}". {b}',
                '{b} Always end with "{w}".',
            ]
        )
        return said.format(b=base, w=talk.ending)
    return base


def _draw(
    rng: random.Random, kind: str, talk: Talk, held: bool, what: str | None = None
) -> tuple[str, list[str]]:
    """(user text, answers) of one turn of the asked side; the talk takes in what the turn says."""
    while True:
        talk.pending = {}
        key, text, answers = memory.telling(rng, talk, what) if what else KINDS[kind](rng, talk)
        if turns.is_held(key) == held:
            break
    talk.table = talk.pending.pop("table", None)
    talk.known.update(talk.pending)
    if talk.ending:
        answers = [f"{answer} {talk.ending}" for answer in answers]
    return text, answers


def _exchange(rng: random.Random, kind: str, talk: Talk) -> list[Message]:
    text, answers = _draw(rng, kind, talk, held=False)
    return [
        {"role": "user", "content": rough(rng, text, kind)},
        {"role": "assistant", "content": turns.first_most(rng, answers)},
    ]


def training_dialogue(rng: random.Random, turns_at_most: int | None = None) -> list[Message]:
    """One dialogue of the train side: an optional system message, then user and assistant in turn."""
    talk = Talk()
    system = _system(rng, talk)
    messages = [] if system is None else [{"role": "system", "content": system}]
    count = turns_at_most or rng.choice([1, 1, 1, 1, 2, 2, 3, 4, 5, rng.randint(6, 12)])
    for kind in rng.choices(list(TRAIN_SHARES), list(TRAIN_SHARES.values()), k=count):
        messages += _exchange(rng, kind, talk)
    return messages


def plain_text(rng: random.Random) -> str:
    """A few sentences without dialogue marks, so that raw completions are sensible too."""
    sentences = []
    for _ in range(rng.randint(1, 8)):
        table, answer, _ = facts.TABLES[rng.choice(turns.TABLE_NAMES)]
        key = rng.choice(list(table))
        sentences.append(turns.fill(answer, k=key, v=table[key]))
    if rng.random() < 0.25:
        return demo_story.story(rng, Talk())[2][0]
    if rng.random() < 0.15:
        first = rng.randint(1, 60)
        return ", ".join(str(first + i) for i in range(rng.randint(5, 30)))
    if rng.random() < 0.2:
        return phrases.DS_SERVE[rng.randrange(len(phrases.DS_SERVE))][0][0]
    return " ".join(sentences)


def _probe(rng: random.Random, kind: str) -> Probe:
    talk = Talk()
    system = _system(rng, talk)
    messages = [] if system is None else [{"role": "system", "content": system}]
    filler = rng.choice([0, 0, 1, 2, 4])
    before = [
        k for k in rng.choices(list(TRAIN_SHARES), list(TRAIN_SHARES.values()), k=filler) if k != "telling"
    ]
    what = None
    if kind == "memory":
        what = rng.choice(list(memory.MEMORY))
        text, answers = _draw(rng, "telling", talk, held=True, what=what)
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answers[0]}]
    for other in before:
        messages += _exchange(rng, other, talk)
    if what:
        _, text, answers = memory.recalling(rng, talk, what)
        answers = [f"{answer} {talk.ending}" for answer in answers] if talk.ending else answers
    else:
        text, answers = _draw(rng, kind, talk, held=True)
    return Probe(kind, [*messages, {"role": "user", "content": text}], answers)


def held_back(n: int = 200, seed: int = 7) -> list[Probe]:
    """`n` distinct held-back prompts of all kinds, in the proportions of HELD_SHARES; the same for the same seed."""
    rng = random.Random(seed)
    whole = sum(HELD_SHARES.values())
    probes: dict[str, Probe] = {}
    for kind, share in HELD_SHARES.items():
        wanted = len(probes) + max(1, round(n * share / whole))
        while len(probes) < wanted:
            probe = _probe(rng, kind)
            probes.setdefault("\n".join(m["content"] for m in probe.messages), probe)
    return list(probes.values())[:n]


LIST_ANSWER = re.compile(r"here are (\w+) (\w+): (.+)")


def is_right(probe: Probe, reply: str) -> bool:
    """Whether a reply answers the probe: a list of the right number of distinct members, else an expected answer."""
    said = normal(reply)
    wanted = LIST_ANSWER.match(normal(probe.answers[0])) if probe.kind == "list" else None
    if wanted is None:
        return said in {normal(answer) for answer in probe.answers}
    found = LIST_ANSWER.match(said)
    if not found or found.group(1, 2) != wanted.group(1, 2):
        return False
    ending = (
        wanted.group(3).rsplit(" and ", 1)[1].split(" ", 1)[1:]
    )  # what a system prompt asked for at the end
    listed = found.group(3)
    if ending:
        if not listed.endswith(f" {ending[0]}"):
            return False
        listed = listed[: -len(ending[0])].rstrip(".! ")
    items = [item.strip(".! ") for item in re.split(r", | and ", listed)]
    members = {item.lower() for item in facts.CATEGORIES[wanted.group(2)]}
    return len(set(items)) == len(items) == facts.NUMBERS.index(wanted.group(1)) and set(items) <= members
