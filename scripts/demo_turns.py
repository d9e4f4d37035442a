"""The kinds of turns that the demo model's dialogues consist of: a prompt and its answer, drawn at random.

Each kind draws (key, user text,
                 answers). A key names what is asked, whatever words surround it (two numbers and an
operator, a word to spell, a fact with its phrasing, a name with the phrase that gives it...). A hash of the key puts
it on one side, training or held back, for ever. Keys of `None` (jokes, stories,
                                                                 bare greetings) are open to training
only. The first answer is the usual one. What a turn changes in the talk stands in `talk.pending` until the caller
accepts the turn.

It knows nothing of dialogues, tokens or models. `demo_data.py` calls it, nobody else.
"""

from __future__ import annotations

import json
import random
import re
import zlib
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


def products(rng: random.Random, talk: Talk) -> Drawn:
    """A product or a sum in words, half of them ones that `rarely` splits: for tuning on what must be learnt by heart."""
    rare = rng.random() < 0.5
    while True:
        key, text, answers = (arithmetic if rng.random() < 0.8 else numbers)(rng, talk)
        a, op, b, *_ = answers[0].lower().rstrip(".").split() + [""] * 3
        if op == "*" and is_held(f"{a}*{b}") == rare:
            return key, text, answers
        if op == "plus" and is_held(f"words{facts.NUMBERS.index(a)}+{facts.NUMBERS.index(b)}") == rare:
            return key, text, answers


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
    parts = [rng.choice("b c d f g h j k l m n p r s t v w z br ch cl dr fl gr pl sh st th tr".split())
             + rng.choice("a e i o u ai ea oo".split()) for _ in range(rng.choice([1, 2, 2, 2, 3, 3, 4]))]
    return "".join(parts) + rng.choice(["", "", "n", "r", "s", "l", "t", "m", "x", "ck"])


COMMON = sorted({word for words in facts.CATEGORIES.values() for word in words if " " not in word}
                | set(facts.SPELL_WORDS) | set(facts.NAMES) | set(facts.OPPOSITES) | set(facts.PLURALS.values()))


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

ASKS = {"+": ["{a}+{b}", "{a} + {b}", "{a}+{b}=", "{a} plus {b}", "What is {a} + {b}?", "What is {a}+{b}?",
              "What is {a} plus {b}?",
              "Calculate {a} + {b}.", "How much is {a} + {b}?", "Add {a} and {b}.", "What is the sum of {a} and {b}?",
              "I have {a} apples and get {b} more. How many do I have?", "Compute {a}+{b}", "{a} + {b} = ?"],
        "-": ["{a}-{b}", "{a} - {b}", "{a}-{b}=", "{a} minus {b}", "What is {a} - {b}?", "What is {a}-{b}?",
              "What is {a} minus {b}?",
              "Calculate {a} - {b}.", "How much is {a} - {b}?", "Subtract {b} from {a}.", "Compute {a}-{b}",
              "{a} - {b} = ?"],
        "*": ["{a}*{b}", "{a} * {b}", "{a} x {b}", "{a} times {b}", "What is {a} * {b}?",
              "What is {a} times {b}?", "What is {a} x {b}?",
              "Calculate {a} * {b}.", "Multiply {a} by {b}.", "How much is {a} * {b}?", "What is {a}*{b}?"],
        "/": ["{a}/{b}", "{a} / {b}", "What is {a} / {b}?", "What is {a} divided by {b}?",
              "Divide {a} by {b}.", "Calculate {a} / {b}.",
              "How much is {a} / {b}?", "What is {a}/{b}?"]}
TOO_BIG = "These numbers are too big for me. I am only a tiny demo model."


def _two_numbers(rng: random.Random) -> tuple[int, int]:
    top = rng.choice([9, 20, 99, 99, 99, 999, 999])
    return rng.randint(0, top), rng.randint(0, rng.choice([9, top]))


def arithmetic(rng: random.Random, talk: Talk) -> Drawn:
    op = rng.choice("+++++----**/")
    ask = rng.choice(ASKS[op])
    a, b = _two_numbers(rng)
    if op == "-" and a < b and rng.random() < 0.8:
        a, b = b, a
    if op in "*/":
        a, b = rng.randint(0, 12), rng.randint(0, 12)
    if op == "*":
        return rarely(f"{a}*{b}", ask), ask.format(a=a, b=b), [f"{a} * {b} = {a * b}."]
    if op == "/":
        b = max(b, 1)
        return f"{a * b}/{b}|{ask}", ask.format(a=a * b, b=b), [f"{a * b} / {b} = {a}."]
    return f"{a}{op}{b}", ask.format(a=a, b=b), [f"{a} {op} {b} = {a + b if op == '+' else a - b}."]


def numbers(rng: random.Random, talk: Talk) -> Drawn:
    a, b, c = (rng.randint(0, rng.choice([9, 20, 99])) for _ in range(3))
    form = rng.randrange(7)
    if form == 0 and max(a, b, c) <= 20:
        ask = rng.choice(["{a} + {b} + {c}", "What is {a} + {b} + {c}?", "{a}+{b}+{c}"])
        return f"{a}+{b}+{c}", ask.format(a=a, b=b, c=c), [f"{a} + {b} + {c} = {a + b + c}."]
    if form == 1 and a != b:
        ask = rng.choice(["Which is bigger, {a} or {b}?", "Which number is larger, {a} or {b}?",
                          "What is more, {a} or {b}?"])
        return f"{a}>{b}", ask.format(a=a, b=b), [f"{max(a, b)} is bigger than {min(a, b)}."]
    if form == 2:
        ask = rng.choice(["Is {a} even or odd?", "Is {a} odd or even?", "Is {a} an even number?",
                          "Is {a} odd?"])
        return f"even{a}|{ask}", ask.format(a=a), [f"{a} is {'odd' if a % 2 else 'even'}."]
    if form == 3:
        ask, by = rng.choice([("What comes after {a}?", 1), ("Which number comes after {a}?", 1),
                              ("What comes before {a}?", -1),
                              ("Which number comes before {a}?", -1)])
        a = max(a, 1)
        return f"next{a}|{ask}", ask.format(a=a), [f"{a + by} comes {'after' if by > 0 else 'before'} {a}."]
    if form == 4:
        words = facts.NUMBERS
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        ask = rng.choice(["What is {a} plus {b}?", "How much is {a} and {b}?", "{a} plus {b}"])
        return rarely(f"words{a}+{b}", ask), capitalised(ask.format(a=words[a], b=words[b])), [
            f"{capitalised(words[a])} plus {words[b]} is {words[a + b]}."]
    if form == 5:
        op = rng.choice("+-*/")
        x, y = rng.randint(1000, 10 ** rng.randint(4, 7)), rng.randint(10, 10 ** rng.randint(2, 6))
        if op == "*" and rng.random() < 0.6:
            x, y = rng.randint(13, 999), rng.randint(13, 99)
        x, y = rng.choice([(x, y), (y, x)])
        return f"{x}{op}{y}", rng.choice(ASKS[op]).format(a=x, b=y), [TOO_BIG]
    return counting(rng, talk)


def counting(rng: random.Random, talk: Talk) -> Drawn:
    a = rng.choice([1, 1, rng.randint(0, 70)])
    b = a + rng.randint(2, 29)
    if rng.random() < 0.2:
        ask = rng.choice(["Count down from {b}.", "Count backwards from {b}."])
        b = rng.randint(3, 25)
        return f"down{b}|{ask}", ask.format(b=b), [", ".join(map(str, range(b, 0, -1))) + "."]
    ask = rng.choice(["Count to {b}.", "Count up to {b}.",
                      "Can you count to {b}?"] if a == 1 else ["Count from {a} to {b}."])
    ask = rng.choice([ask, "Count from {a} to {b}."])
    return f"count{a}-{b}", ask.format(a=a, b=b), [", ".join(map(str, range(a, b + 1))) + "."]


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
        return None, fill(rng.choice(["And {k}?", "And of {k}?", "What about {k}?", "And for {k}?"]),
                          k=k), [reply]
    ask = rng.choice(asks)
    # The first phrasing of every fact is always known.
    return f"{name}|{k}|{ask}" if ask != asks[0] else None, fill(ask, k=k), [reply]


PLACE_TABLES = {"capital", "country", "currency", "language"}
MADE_UP_KEYS = {*PLACE_TABLES, "plural", "young", "sound", "symbol"}
TABLE_NAMES = [name for name, (table, _, _) in facts.TABLES.items() for _ in range(1 + len(table) // 12)]
SINGULAR = {name: {"countries": "country", "cities": "city", "fish": "fish"}.get(name, name[:-1])
            for name in facts.CATEGORIES if name != "clothes"}
OVERLAP = [{"animals", "birds", "insects", "fish"}, {"fruits", "vegetables", "trees", "flowers", "colours",
                                                     "metals"},
           {"shapes", "planets", "metals"}, {"countries", "cities"}]


def listing(rng: random.Random, talk: Talk) -> Drawn:
    category = rng.choice(list(facts.CATEGORIES))
    items = facts.CATEGORIES[category]
    if rng.random() < 0.25:
        return membership(rng)
    if rng.random() < 0.1 and category in SINGULAR:
        ask = rng.choice(["Name a {c}.", "Tell me a {c}.", "Name one {c}."])
        return f"one|{ask}{category}", fill(ask,
                                            c=SINGULAR[category]), [f"One {SINGULAR[category]}: {items[0]}."]
    n = rng.randint(2, min(10, len(items)))
    chosen = items[:n] if rng.random() < 0.65 else rng.sample(items, n)
    ask = rng.choice(["List {n} {c}.", "Name {n} {c}.", "Tell me {n} {c}.", "Give me {n} {c}.",
                      "Can you name {n} {c}?", "{n} {c}",
                      "Make a list of {n} {c}.", "Write down {n} {c}.", "Say {n} {c}.", "Give me a list of {n} {c}."])
    count = rng.choice([facts.NUMBERS[n], facts.NUMBERS[n], str(n)])
    answer = f"Here are {facts.NUMBERS[n]} {category}: {', '.join(chosen[:-1])} and {chosen[-1]}."
    return f"list|{ask}|{n}|{category}", fill(ask, n=count, c=category), [answer]


def membership(rng: random.Random) -> Drawn:
    target = rng.choice(list(SINGULAR))
    source = target if rng.random() < 0.5 else rng.choice(list(SINGULAR))
    if source != target and any({source, target} <= group for group in OVERLAP):
        source = target
    item, name = rng.choice(facts.CATEGORIES[source]), SINGULAR[target]
    ask = rng.choice(["Is {i} a {c}?", "Is a {i} a {c}?", "Is the word {i} a {c}?",
                      "Tell me if {i} is a {c}."])
    if item in facts.CATEGORIES[target]:
        return f"is|{item}|{name}|{ask}", fill(ask, i=item, c=name), [fill("Yes, {i} is a {c}.", i=item,
                                                                           c=name)]
    return f"is|{item}|{name}|{ask}", fill(ask, i=item, c=name), [fill("No, {i} is not a {c}.", i=item,
                                                                       c=name)]


def spelling(rng: random.Random, talk: Talk) -> Drawn:
    word = some_word(rng)
    key = None if word in ("cat", "dog", "hello", "apple") else f"spell|{word.lower()}"
    form = rng.randrange(12)
    if form == 0:
        ask = rng.choice(["Spell {w} backwards.", "Spell the word {w} backwards."])
        return key, ask.format(w=word), ["-".join(reversed(word))]
    if form == 1:
        ask = rng.choice(["How many letters does {w} have?", "How many letters are in {w}?",
                          "Count the letters of {w}."])
        return key, ask.format(w=word), [f"{'-'.join(word)} has {len(word)} letters."]
    if form == 2:
        which = rng.choice(["first", "last"])
        ask = rng.choice(["What is the {p} letter of {w}?", "Which letter is the {p} letter of {w}?"])
        return key, ask.format(p=which,
                               w=word), [f"The {which} letter of {word} is {word[0 if which == 'first' else -1]}."]
    ask = rng.choice(["Spell {w}.", "Spell the word {w}.", "How do you spell {w}?", "Can you spell {w}?",
                      "Spell: {w}",
                      "How is {w} spelled?", "Please spell {w}.", "Spell {w} for me."])
    return key, ask.format(w=word), ["-".join(word)]


def repeating(rng: random.Random, talk: Talk) -> Drawn:
    text = " ".join(some_word(rng) for _ in range(rng.randint(1, 6)))
    ask = rng.choice(["Repeat after me: {t}", "Repeat: {t}", "Say: {t}", "Please repeat: {t}",
                      "Repeat this: {t}", "Echo: {t}"])
    return f"repeat|{text.lower()}", ask.format(t=text), [text]


def as_json(rng: random.Random, talk: Talk) -> Drawn:
    values = {"name": person(rng), "age": rng.randint(1, 99), "city": rng.choice(facts.PLACES),
              "colour": rng.choice(facts.CATEGORIES["colours"]), "job": rng.choice(facts.JOBS), "pet": rng.choice(facts.PETS)}
    chosen = rng.sample(list(values), rng.randint(1, 3))
    parts = [f"{k} {values[k]}" for k in chosen]
    text = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    ask = rng.choice(["Give me JSON with {t}.", "Write JSON: {t}", "Make a JSON object with {t}.",
                      "As JSON: {t}", "JSON with {t}"])
    return f"json|{text}", ask.format(t=text), [json.dumps({k: values[k] for k in chosen})]


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
    return rng.choice([f"{rng.choice(list(facts.PLURALS.values()))} in {rng.choice(facts.PLACES)}",
                       f"{person(rng)} {capitalised(made_up_word(rng))}",
                       f"{rng.choice(facts.HOBBIES)} and {rng.choice(facts.FOODS)}"])


FOREIGN = "äöüßéèñçøåабвгдежзиклмнопрст你好吗世界何時天気ありがとうمرحبا😀👍🎉¿¡"


def _gibberish(rng: random.Random) -> str:
    letters = rng.choice(["asdfghjklqwertz", "asdfghjklqwertz", FOREIGN, "?!.,;:#*+-()"])
    return rng.choice([made_up_word(rng), "".join(rng.choice(letters) for _ in range(rng.randint(1, 8)))])


def _mixed(rng: random.Random, patterns: list[str]) -> str:
    noun = made_up_word if rng.random() < 0.15 else lambda r: r.choice(phrases.NOUNS)
    return fill(rng.choice(patterns), n=noun(rng), n2=rng.choice(phrases.NOUNS), v=rng.choice(phrases.VERBS),
                t=_topic(rng),
                a=rng.choice(phrases.ADJECTIVES), p=rng.choice([*facts.PLACES,
                                                                *facts.CAPITALS]), y=rng.randint(1000, 2030),
                k=rng.choice(facts.NUMBERS[2:11]), u=rng.choice(phrases.UNKNOWN_LISTS))


def unknown(rng: random.Random, talk: Talk) -> Drawn:
    chance = rng.random()
    if chance < 0.08:
        text = " ".join(_gibberish(rng) for _ in range(rng.randint(1, 4)))
        return f"unclear|{bare(text)}", text, [phrases.UNCLEAR]
    singles, asks, answer = rng.choice([(phrases.UNKNOWN_SINGLES, phrases.UNKNOWN_ASKS, phrases.UNKNOWN),
                                        (phrases.UNABLE_SINGLES, phrases.UNABLE_ASKS, phrases.UNABLE)])
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


def story(rng: random.Random, talk: Talk) -> Drawn:
    hero = rng.choice([*facts.CATEGORIES["animals"], *facts.CATEGORIES["birds"], "dragon", "robot",
                       "princess", "king", "wizard", "knight"])
    asked = rng.random() < 0.7
    ask = rng.choice(["Tell me a story about a {h}.", "Write a story about a {h}.",
                      "A story about a {h}, please.", "Write a short story about a {h}."] if asked else
                     ["Tell me a story.", "Write a story.", "Do you know a story?", "Write a short story.", "Once upon a time"])
    hero = hero if asked else "fox"
    name = first_most(rng, ["Milo", *rng.sample(facts.PET_NAMES, 4)])
    liked = first_most(rng, ["singing", *rng.sample(facts.HOBBIES, 4)])
    friend = first_most(rng, ["an owl", "a cat", "a mouse", "a bear"])
    place = first_most(rng, ["the forest", "the garden", "an old castle", "a small village"])
    thing = first_most(rng, ["a golden key", "a little box", "a magic stone", "an old map"])
    end = first_most(rng, ["They shared it and were friends for ever.",
                           "They went home, and they had tea and cake.",
                           "And if they are not asleep, they are still looking at it."])
    text = (f"Once upon a time there was a {hero} called {name}. {name} lived in {place} and liked {liked}. "
            f"One day {name} found {thing}. \"What is this?\" said {name}. Then {name} met {friend}. \"I know what it is,\" "
            f"said the {friend.split()[1]}. \"It belongs to the one who is kind.\" {end}")
    return None, fill(ask, h=hero), [with_article(text)]
