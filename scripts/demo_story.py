"""The demo model's short stories: one plot, whose hero, place, find and end are drawn.

It knows nothing of dialogues, tokens or models. `demo_data.py` calls it, nobody else.
"""

from __future__ import annotations

import random

import demo_facts as facts
from demo_turns import Drawn, Talk, fill, first_most, with_article


def story(rng: random.Random, talk: Talk) -> Drawn:
    hero = rng.choice(
        [
            *facts.CATEGORIES["animals"],
            *facts.CATEGORIES["birds"],
            "dragon",
            "robot",
            "princess",
            "king",
            "wizard",
            "knight",
        ]
    )
    asked = rng.random() < 0.7
    ask = rng.choice(
        [
            "Tell me a story about a {h}.",
            "Write a story about a {h}.",
            "A story about a {h}, please.",
            "Write a short story about a {h}.",
        ]
        if asked
        else [
            "Tell me a story.",
            "Write a story.",
            "Do you know a story?",
            "Write a short story.",
            "Once upon a time",
        ]
    )
    hero = hero if asked else "fox"
    name = first_most(rng, ["Milo", *rng.sample(facts.PET_NAMES, 4)])
    liked = first_most(rng, ["singing", *rng.sample(facts.HOBBIES, 4)])
    friend = first_most(rng, ["an owl", "a cat", "a mouse", "a bear"])
    place = first_most(rng, ["the forest", "the garden", "an old castle", "a small village"])
    thing = first_most(rng, ["a golden key", "a little box", "a magic stone", "an old map"])
    end = first_most(
        rng,
        [
            "They shared it and were friends for ever.",
            "They went home, and they had tea and cake.",
            "And if they are not asleep, they are still looking at it.",
        ],
    )
    text = (
        f"Once upon a time there was a {hero} called {name}. {name} lived in {place} and liked {liked}. "
        f'One day {name} found {thing}. "What is this?" said {name}. Then {name} met {friend}. "I know what it is," '
        f'said the {friend.split()[1]}. "It belongs to the one who is kind." {end}'
    )
    return None, fill(ask, h=hero), [with_article(text)]
