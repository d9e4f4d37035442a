"""The kinds of turns that the demo model's dialogues consist of: a prompt and its answer, drawn at random.

Each kind draws (key, user text, answers). A key names what is asked, whatever words surround it (two numbers and an
operator, a word to spell, a fact with its phrasing, a name with the phrase that gives it...). A hash of the key puts
it on one side, training or held back, for ever. Keys of `None` (jokes, stories, bare greetings) are open to training
only. The first answer is the usual one. What a turn changes in the talk stands in `talk.pending` until the caller
accepts the turn. Turns with numbers are in `demo_sums.py`, what users tell of themselves is in `demo_memory.py`.

It knows nothing of dialogues, tokens or models. `demo_data.py`, `demo_sums.py` and `demo_memory.py` call it.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import demo_facts as facts
import demo_phrases as phrases

Drawn = tuple["str | None", str, list[str]]


@dataclass
class Talk:
    """What a dialogue has said so far that later turns depend on."""

    known: dict[str, str] = field(default_factory=dict)
    persona: str | None = None
    ending: str | None = None
    table: str | None = None
    pending: dict[str, str] = field(default_factory=dict)


def is_held(key: str | None, every: int = 20) -> bool:
    """Whether a key belongs to the held-back side: one in `every`, by CRC-32."""
    return key is not None and zlib.crc32(f"held:{key}".encode()) % every == 0


def bare(text: str) -> str:
    """Letters, digits and signs of sums only, in lower case: two prompts with one bare form count as the same."""
    return " ".join(re.sub(r"[^\w+*/<>=-]", " ", text.lower().replace("i'm", "i am")).split())


def rarely(key: str, ask: str) -> str | None:
    """The key if its hash holds it back and this phrasing of it too: for what must be learnt by heart, not worked out."""
    return key if is_held(key) and is_held(f"{key}|{ask}", every=3) else None


def cased(rng: random.Random) -> Callable[[str], str]:
    """How a stranger writes: mostly as it is, now and then in small letters or in capitals."""
    return rng.choices([str, str.lower, str.upper], [86, 9, 5])[0]


def first_most(rng: random.Random, options: list) -> object:
    """One of the options; each is more than twice as likely as the next, so greedy decoding has a clear favourite."""
    for option in options[:-1]:
        if rng.random() < 0.6:
            return option
    return options[-1]


def with_article(text: str) -> str:
    return re.sub(r"\b([Aa]) (?=[aeioAEIO])", r"\1n ", text)


def capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def fill(pattern: str, **values: object) -> str:
    return capitalised(with_article(pattern.format(**values)))


def made_up_word(rng: random.Random) -> str:
    parts = [
        rng.choice("b c d f g h j k l m n p r s t v w z br ch cl dr fl gr pl sh st th tr".split())
        + rng.choice("a e i o u ai ea oo".split())
        for _ in range(rng.choice([1, 2, 2, 2, 3, 3, 4]))
    ]
    return "".join(parts) + rng.choice(["", "", "n", "r", "s", "l", "t", "m", "x", "ck"])


COMMON = sorted(
    {word for words in facts.CATEGORIES.values() for word in words if " " not in word}
    | set(facts.SPELL_WORDS)
    | set(facts.NAMES)
    | set(facts.OPPOSITES)
    | set(facts.PLURALS.values())
)


def some_word(rng: random.Random) -> str:
    """A word to spell, repeat or remember: known, two known ones joined, or made up."""
    chance = rng.random()
    if chance < 0.45:
        return rng.choice(facts.SPELL_WORDS if chance < 0.25 else COMMON)
    if chance < 0.65:
        return rng.choice(COMMON) + rng.choice(COMMON).lower()
    if chance < 0.95:
        return made_up_word(rng)
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 7)))


def person(rng: random.Random) -> str:
    return rng.choice(facts.NAMES) if rng.random() < 0.6 else capitalised(made_up_word(rng))


def fact(rng: random.Random, talk: Talk) -> Drawn:
    if rng.random() < 0.08:
        answer, asks = rng.choice(facts.SINGLE_FACTS)
        ask = rng.choice(asks)
        return f"fact|{ask}" if ask != asks[0] else None, ask, [answer]
    follow = talk.table is not None and rng.random() < 0.3
    name = talk.table if follow else rng.choice(TABLE_NAMES)
    table, answer, asks = facts.TABLES[name]
    talk.pending["table"] = name
    if rng.random() < 0.06 and name in MADE_UP_KEYS:
        k = made_up_word(rng)
        k = capitalised(k) if name in PLACE_TABLES else k
        return f"{name}|{k}", fill(rng.choice(asks), k=k), [phrases.UNKNOWN]
    k = rng.choice(list(table))
    reply = fill(answer, k=k, v=table[k])
    if follow:
        return (
            None,
            fill(rng.choice(["And {k}?", "And of {k}?", "What about {k}?", "And for {k}?"]), k=k),
            [reply],
        )
    ask = rng.choice(asks)
    # The first phrasing of every fact is always known.
    return f"{name}|{k}|{ask}" if ask != asks[0] else None, fill(ask, k=k), [reply]


PLACE_TABLES = {"capital", "country", "currency", "language"}
MADE_UP_KEYS = {*PLACE_TABLES, "plural", "young", "sound", "symbol"}
TABLE_NAMES = [name for name, (table, _, _) in facts.TABLES.items() for _ in range(1 + len(table) // 12)]
SINGULAR = {
    name: {"countries": "country", "cities": "city", "fish": "fish"}.get(name, name[:-1])
    for name in facts.CATEGORIES
    if name != "clothes"
}
OVERLAP = [
    {"animals", "birds", "insects", "fish"},
    {"fruits", "vegetables", "trees", "flowers", "colours", "metals"},
    {"shapes", "planets", "metals"},
    {"countries", "cities"},
]


LIST_ASKS = [
    "List {n} {c}.",
    "Name {n} {c}.",
    "Tell me {n} {c}.",
    "Give me {n} {c}.",
    "Can you name {n} {c}?",
    "{n} {c}",
    "Make a list of {n} {c}.",
    "Write down {n} {c}.",
    "Say {n} {c}.",
    "Give me a list of {n} {c}.",
]


def listing(rng: random.Random, talk: Talk) -> Drawn:
    category = rng.choice(list(facts.CATEGORIES))
    items = facts.CATEGORIES[category]
    if rng.random() < 0.25:
        return membership(rng)
    if rng.random() < 0.1 and category in SINGULAR:
        ask = rng.choice(["Name a {c}.", "Tell me a {c}.", "Name one {c}."])
        return (
            f"one|{ask}{category}",
            fill(ask, c=SINGULAR[category]),
            [f"One {SINGULAR[category]}: {items[0]}."],
        )
    if rng.random() < 0.08:
        n = rng.choice([11, 12, 15, 20, 25, 30, 40, 50, 100, rng.randint(11, 1000)])
        ask = rng.choice(LIST_ASKS)
        return (
            f"list|{ask}|{n}|{category}",
            fill(ask, n=facts.NUMBERS[n] if n <= 12 else n, c=category),
            [phrases.TOO_LONG],
        )
    n = rng.randint(2, min(10, len(items)))
    chosen = items[:n] if rng.random() < 0.65 else rng.sample(items, n)
    ask = rng.choice(LIST_ASKS)
    count = rng.choice([facts.NUMBERS[n], facts.NUMBERS[n], str(n)])
    answer = f"Here are {facts.NUMBERS[n]} {category}: {', '.join(chosen[:-1])} and {chosen[-1]}."
    return f"list|{ask}|{n}|{category}", fill(ask, n=count, c=category), [answer]


def membership(rng: random.Random) -> Drawn:
    target = rng.choice(list(SINGULAR))
    source = target if rng.random() < 0.5 else rng.choice(list(SINGULAR))
    if source != target and any({source, target} <= group for group in OVERLAP):
        source = target
    item, name = rng.choice(facts.CATEGORIES[source]), SINGULAR[target]
    ask = rng.choice(
        ["Is {i} a {c}?", "Is a {i} a {c}?", "Is the word {i} a {c}?", "Tell me if {i} is a {c}."]
    )
    if item in facts.CATEGORIES[target]:
        return (
            f"is|{item}|{name}|{ask}",
            fill(ask, i=item, c=name),
            [fill("Yes, {i} is a {c}.", i=item, c=name)],
        )
    return (
        f"is|{item}|{name}|{ask}",
        fill(ask, i=item, c=name),
        [fill("No, {i} is not a {c}.", i=item, c=name)],
    )


def spelling(rng: random.Random, talk: Talk) -> Drawn:
    style = str.upper if rng.random() < 0.04 else str
    word = style(some_word(rng))
    key = None if word.lower() in ("cat", "dog", "hello", "apple") else f"spell|{word.lower()}"
    form = rng.randrange(12)
    if form == 0:
        ask = rng.choice(["Spell {w} backwards.", "Spell the word {w} backwards."])
        return key, style(ask.format(w=word)), ["-".join(reversed(word))]
    if form == 1:
        ask = rng.choice(
            ["How many letters does {w} have?", "How many letters are in {w}?", "Count the letters of {w}."]
        )
        return key, style(ask.format(w=word)), [f"{'-'.join(word)} has {len(word)} letters."]
    if form == 2:
        which = rng.choice(["first", "last"])
        ask = rng.choice(["What is the {p} letter of {w}?", "Which letter is the {p} letter of {w}?"])
        return (
            key,
            style(ask.format(p=which, w=word)),
            [f"The {which} letter of {word} is {word[0 if which == 'first' else -1]}."],
        )
    ask = rng.choice(
        [
            "Spell {w}.",
            "Spell the word {w}.",
            "How do you spell {w}?",
            "Can you spell {w}?",
            "Spell: {w}",
            "How is {w} spelled?",
            "Please spell {w}.",
            "Spell {w} for me.",
        ]
    )
    return key, style(ask.format(w=word)), ["-".join(word)]


def repeating(rng: random.Random, talk: Talk) -> Drawn:
    style = cased(rng)
    text = style(" ".join(some_word(rng) for _ in range(rng.randint(1, 6))))
    ask = rng.choice(
        [
            "Repeat after me: {t}",
            "Repeat: {t}",
            "Say: {t}",
            "Please repeat: {t}",
            "Repeat this: {t}",
            "Echo: {t}",
        ]
    )
    return f"repeat|{text.lower()}", style(ask.format(t=text)), [text]


def as_json(rng: random.Random, talk: Talk) -> Drawn:
    style = cased(rng)
    values = {
        "name": person(rng),
        "age": rng.randint(1, 99),
        "city": rng.choice(facts.PLACES),
        "colour": rng.choice(facts.CATEGORIES["colours"]),
        "job": rng.choice(facts.JOBS),
        "pet": rng.choice(facts.PETS),
    }
    chosen = rng.sample(list(values), rng.randint(1, 3))
    parts = [f"{k} {values[k]}" for k in chosen]
    text = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    ask = rng.choice(
        [
            "Give me JSON with {t}.",
            "Write JSON: {t}",
            "Make a JSON object with {t}.",
            "As JSON: {t}",
            "JSON with {t}",
        ]
    )
    said = {k: style(values[k]) if isinstance(values[k], str) else values[k] for k in chosen}
    return f"json|{text}", style(ask.format(t=text)), [json.dumps(said)]


def _phrased(rng: random.Random, entries: list[tuple[list[str], list[str]]], talk: Talk) -> Drawn:
    answers, asks = rng.choice(entries)
    text = rng.choice(asks)
    plain = rng.random() < 0.5
    if not plain and rng.random() < 0.7:
        small = text[:2] not in ("I ", "OK") and rng.random() < 0.8
        text = rng.choice(phrases.PREFIXES) + (text[0].lower() + text[1:] if small else text)
    elif not plain and text[-1] in ".!?":
        text += rng.choice(phrases.SUFFIXES)
    if answers[0] in (phrases.CALLED, phrases.WHO) and talk.persona:
        answers = [f"My name is {talk.persona}."]
    return None if text in asks else f"said|{bare(text)}", text, answers


def small_talk(rng: random.Random, talk: Talk) -> Drawn:
    return _phrased(rng, phrases.SMALL_TALK, talk)


def identity(rng: random.Random, talk: Talk) -> Drawn:
    weighted = phrases.IDENTITY[:3] if rng.random() < 0.5 else phrases.IDENTITY
    return _phrased(rng, weighted, talk)


def about_ds_serve(rng: random.Random, talk: Talk) -> Drawn:
    return _phrased(rng, phrases.DS_SERVE[:1] if rng.random() < 0.12 else phrases.DS_SERVE, talk)


def _topic(rng: random.Random) -> str:
    chance = rng.random()
    if chance < 0.6:
        return rng.choice(facts.TOPICS)
    if chance < 0.75:
        return made_up_word(rng)
    if chance < 0.85:
        return f"the {rng.choice(['best', 'oldest', 'new', 'first', 'cheapest', 'biggest'])} {rng.choice(COMMON).lower()}"
    return rng.choice(
        [
            f"{rng.choice(list(facts.PLURALS.values()))} in {rng.choice(facts.PLACES)}",
            f"{person(rng)} {capitalised(made_up_word(rng))}",
            f"{rng.choice(facts.HOBBIES)} and {rng.choice(facts.FOODS)}",
        ]
    )


FOREIGN = "äöüßéèñçøåабвгдежзиклмнопрст你好吗世界何時天気ありがとうمرحبا😀👍🎉¿¡"


def _gibberish(rng: random.Random) -> str:
    letters = rng.choice(["asdfghjklqwertz", "asdfghjklqwertz", FOREIGN, "?!.,;:#*+-()"])
    return rng.choice([made_up_word(rng), "".join(rng.choice(letters) for _ in range(rng.randint(1, 8)))])


def _mixed(rng: random.Random, patterns: list[str]) -> str:
    noun = made_up_word if rng.random() < 0.15 else lambda r: r.choice(phrases.NOUNS)
    return fill(
        rng.choice(patterns),
        n=noun(rng),
        n2=rng.choice(phrases.NOUNS),
        v=rng.choice(phrases.VERBS),
        t=_topic(rng),
        a=rng.choice(phrases.ADJECTIVES),
        p=rng.choice([*facts.PLACES, *facts.CAPITALS]),
        y=rng.randint(1000, 2030),
        k=rng.choice(facts.NUMBERS[2:11]),
        u=rng.choice(phrases.UNKNOWN_LISTS),
    )


def unknown(rng: random.Random, talk: Talk) -> Drawn:
    chance = rng.random()
    if chance < 0.08:
        text = " ".join(_gibberish(rng) for _ in range(rng.randint(1, 4)))
        return f"unclear|{bare(text)}", text, [phrases.UNCLEAR]
    singles, asks, answer = rng.choice(
        [
            (phrases.UNKNOWN_SINGLES, phrases.UNKNOWN_ASKS, phrases.UNKNOWN),
            (phrases.UNABLE_SINGLES, phrases.UNABLE_ASKS, phrases.UNABLE),
        ]
    )
    if chance < 0.25:
        return None, rng.choice(singles), [answer]
    if chance < 0.6:
        mixed = phrases.UNKNOWN_MIXED if answer == phrases.UNKNOWN else phrases.UNABLE_MIXED
        text = _mixed(rng, mixed)
    elif chance < 0.7:
        text, answer = _mixed(rng, phrases.STATEMENTS), phrases.LISTENING
    else:
        text = capitalised(rng.choice(asks).format(t=_topic(rng)))
    return f"unknown|{bare(text)}", text, [answer]
