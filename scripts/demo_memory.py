"""What a user tells of themselves in the demo model's dialogues, and how it is asked for and recalled later.

It knows nothing of dialogues, tokens or models. `demo_data.py` calls it, nobody else.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import demo_facts as facts
from demo_turns import (
    Drawn,
    Talk,
    bare,
    capitalised,
    cased,
    fill,
    is_held,
    made_up_word,
    person,
    some_word,
    with_article,
)


@dataclass(frozen=True)
class Attribute:
    """Something a user tells of themselves: how they say it, and how it is asked for and answered later."""

    values: Callable[[random.Random], str]
    tells: list[str]
    thanks: str
    asks: list[str]
    answer: str
    missing: str


def _of(*lists: list[str]) -> Callable[[random.Random], str]:
    return lambda rng: rng.choice(rng.choice(lists))


MEMORY = {
    "name": Attribute(
        person,
        [
            "My name is {v}.",
            "I am called {v}.",
            "You can call me {v}.",
            "Call me {v}.",
            "Hi, I am {v}.",
            "I'm {v}.",
            "Hello, my name is {v}.",
            "The name is {v}.",
            "Hi! My name is {v}.",
        ],
        "Nice to meet you, {v}!",
        [
            "What is my name?",
            "Do you remember my name?",
            "Who am I?",
            "Tell me my name.",
            "Do you know my name?",
            "What was my name?",
        ],
        "Your name is {v}.",
        "You have not told me your name yet.",
    ),
    "colour": Attribute(
        _of(facts.CATEGORIES["colours"]),
        [
            "My favourite colour is {v}.",
            "My favorite color is {v}.",
            "The colour I like best is {v}.",
            "I like the colour {v}.",
        ],
        "{v} is a lovely colour!",
        [
            "What is my favourite colour?",
            "What is my favorite color?",
            "Which colour do I like best?",
            "Which colour do I like?",
        ],
        "Your favourite colour is {v}.",
        "You have not told me your favourite colour yet.",
    ),
    "city": Attribute(
        lambda rng: rng.choice(facts.PLACES) if rng.random() < 0.7 else capitalised(made_up_word(rng)),
        ["I live in {v}.", "My home is in {v}.", "I am from {v}.", "My city is {v}."],
        "{v} sounds like a nice place!",
        ["Where do I live?", "Where am I from?", "Which city do I live in?", "Where is my home?"],
        "You live in {v}.",
        "You have not told me where you live yet.",
    ),
    "age": Attribute(
        lambda rng: str(rng.randint(3, 99)),
        ["I am {v} years old.", "My age is {v}.", "I'm {v} years old.", "I am {v}."],
        "Thank you for telling me that you are {v}!",
        ["How old am I?", "What is my age?", "Do you know how old I am?"],
        "You are {v} years old.",
        "You have not told me your age yet.",
    ),
    "food": Attribute(
        _of(facts.FOODS),
        [
            "My favourite food is {v}.",
            "My favorite food is {v}.",
            "The food I like best is {v}.",
            "I like to eat {v}.",
        ],
        "{v} sounds tasty!",
        ["What is my favourite food?", "What is my favorite food?", "What do I like to eat?"],
        "Your favourite food is {v}.",
        "You have not told me your favourite food yet.",
    ),
    "hobby": Attribute(
        _of(facts.HOBBIES),
        ["My hobby is {v}.", "I like {v}.", "I enjoy {v}.", "In my free time I like {v}."],
        "{v} sounds like fun!",
        ["What is my hobby?", "What do I like to do?", "What do I enjoy?"],
        "Your hobby is {v}.",
        "You have not told me your hobby yet.",
    ),
    "job": Attribute(
        _of(facts.JOBS),
        ["I am a {v}.", "I work as a {v}.", "My job is {v}.", "I'm a {v}."],
        "Being a {v} sounds interesting!",
        ["What is my job?", "What do I work as?", "What do I do for a living?"],
        "You are a {v}.",
        "You have not told me your job yet.",
    ),
    "pet": Attribute(
        lambda rng: (
            f"{rng.choice(facts.PETS)} called {rng.choice(facts.PET_NAMES) if rng.random() < 0.6 else person(rng)}"
        ),
        ["I have a {v}.", "My pet is a {v}.", "At home I have a {v}.", "I've got a {v}."],
        "A {v}, how lovely!",
        [
            "What is my pet?",
            "Which pet do I have?",
            "What is my pet called?",
            "Do you remember my pet?",
            "What pet do I have?",
        ],
        "You have a {v}.",
        "You have not told me about your pet yet.",
    ),
    "word": Attribute(
        some_word,
        [
            "Remember the word {v}.",
            "Please remember the word {v}.",
            "The secret word is {v}.",
            "The password is {v}.",
        ],
        "I will remember {v}.",
        [
            "What was the word?",
            "Which word did I tell you?",
            "What is the secret word?",
            "What is the password?",
            "Which word should you remember?",
        ],
        "The word is {v}.",
        "You have not told me a word yet.",
    ),
    "number": Attribute(
        lambda rng: str(rng.randint(0, 9999)),
        [
            "Remember the number {v}.",
            "My number is {v}.",
            "Please remember the number {v}.",
            "The secret number is {v}.",
        ],
        "I will remember {v}.",
        [
            "What was the number?",
            "Which number did I tell you?",
            "What is the secret number?",
            "What is my number?",
        ],
        "The number is {v}.",
        "You have not told me a number yet.",
    ),
}


def telling(rng: random.Random, talk: Talk, what: str | None = None) -> Drawn:
    if what is None and rng.random() < 0.15:
        one, other = rng.sample(list(MEMORY), 2)
        key, text, answers = telling(rng, talk, one)
        other_key, other_text, other_answers = telling(rng, talk, other)
        return (
            key if is_held(key) else other_key,
            f"{text} {other_text}",
            [f"{answers[0]} {other_answers[0]}"],
        )
    what = what or rng.choice(list(MEMORY))
    part = MEMORY[what]
    value, tell = part.values(rng), rng.choice(part.tells)
    talk.pending[what] = value
    said = tell.format(v=value)
    if what == "pet" and rng.random() < 0.3:
        kind, name = value.split(" called ")
        said = rng.choice(
            ["My {k} is called {n}.", "My {k}'s name is {n}.", "I have a {k} named {n}."]
        ).format(k=kind, n=name)
    key, text = f"tell|{what}|{bare(said)}", with_article(said)
    style = cased(rng)
    if what == "word":  # a word is remembered as it was written
        talk.pending[what] = value = style(value)
    elif style is str and rng.random() < 0.1:
        text = text.replace(value, value.lower())
    return key, style(text), [fill(part.thanks, v=value)]


def recalling(rng: random.Random, talk: Talk, what: str | None = None) -> Drawn:
    if what is None and len(talk.known) > 1 and rng.random() < 0.1:
        answer = " ".join(fill(MEMORY[k].answer, v=talk.known[k]) for k in talk.known)
        return (
            None,
            rng.choice(
                ["What do you know about me?", "What have I told you?", "Tell me what you know about me."]
            ),
            [answer],
        )
    if what is None:
        what = rng.choice(list(talk.known)) if talk.known and rng.random() < 0.8 else rng.choice(list(MEMORY))
    if what == "pet" and rng.random() < 0.4:
        return pet_name(rng, talk)
    part = MEMORY[what]
    answer = part.answer if what in talk.known else part.missing
    return None, rng.choice(part.asks), [fill(answer, v=talk.known.get(what))]


def pet_name(rng: random.Random, talk: Talk) -> Drawn:
    """The name of the pet that was told of, or now and then of another, which was not."""
    own, name = talk.known["pet"].split(" called ") if "pet" in talk.known else (None, None)
    kind = own if own and rng.random() < 0.85 else rng.choice(facts.PETS)
    answer = "Your {k} is called {n}." if kind == own else "You have not told me about your {k} yet."
    ask = rng.choice(
        [
            "What is my {k} called?",
            "What is my {k}'s name?",
            "What is the name of my {k}?",
            "Do you know my {k}'s name?",
            "How is my {k} called?",
            "What's my {k} called?",
        ]
    )
    return None, ask.format(k=kind), [answer.format(k=kind, n=name)]
