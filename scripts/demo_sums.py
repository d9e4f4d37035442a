"""The demo model's turns with numbers: sums, counting, comparing, and what is too much for it.

It knows nothing of dialogues, tokens or models. `demo_data.py` calls it, nobody else.
"""

from __future__ import annotations

import random

import demo_facts as facts
from demo_turns import Drawn, Talk, bare, capitalised, rarely

ASKS = {
    "+": [
        "{a}+{b}",
        "{a} + {b}",
        "{a}+{b}=",
        "{a} plus {b}",
        "What is {a} + {b}?",
        "What is {a}+{b}?",
        "What is {a} plus {b}?",
        "Calculate {a} + {b}.",
        "How much is {a} + {b}?",
        "Add {a} and {b}.",
        "What is the sum of {a} and {b}?",
        "I have {a} apples and get {b} more. How many do I have?",
        "Compute {a}+{b}",
        "{a} + {b} = ?",
    ],
    "-": [
        "{a}-{b}",
        "{a} - {b}",
        "{a}-{b}=",
        "{a} minus {b}",
        "What is {a} - {b}?",
        "What is {a}-{b}?",
        "What is {a} minus {b}?",
        "Calculate {a} - {b}.",
        "How much is {a} - {b}?",
        "Subtract {b} from {a}.",
        "Compute {a}-{b}",
        "{a} - {b} = ?",
    ],
    "*": [
        "{a}*{b}",
        "{a} * {b}",
        "{a} x {b}",
        "{a} times {b}",
        "What is {a} * {b}?",
        "What is {a} times {b}?",
        "What is {a} x {b}?",
        "Calculate {a} * {b}.",
        "Multiply {a} by {b}.",
        "How much is {a} * {b}?",
        "What is {a}*{b}?",
    ],
    "/": [
        "{a}/{b}",
        "{a} / {b}",
        "What is {a} / {b}?",
        "What is {a} divided by {b}?",
        "Divide {a} by {b}.",
        "Calculate {a} / {b}.",
        "How much is {a} / {b}?",
        "What is {a}/{b}?",
    ],
}
TOO_BIG = "These numbers are too big for me. I am only a tiny demo model."
TOO_HARD = "This is too hard for me. I am only a tiny demo model, and know only small sums of whole numbers."
TOO_FAR = "That is too far for me. I count about thirty numbers at a time, and up to 99."
HARD = [
    "{o}{a} + {b}",
    "{o}{a} - {b}",
    "{o}{a} * {b}",
    "{b} * {o}{a}",
    "What is {o}{a} + {b}?",
    "What is {o}{a} - {b}?",
    "{a}.{b} + {c}",
    "{c} + {a}.{b}",
    "What is {a}.{b} + {c}?",
    "What is {a}.{b} * {c}?",
    "{a}^{b}",
    "{a}**{b}",
    "What is {a} to the power of {b}?",
    "What is {a} squared?",
    "What is the square root of {a}?",
    "Square root of {a}",
    "What is {a}% of {b}?",
    "{a}!",
    "What is the factorial of {a}?",
    "({a} + {b}) * {c}",
    "{a} + {b} * {c}",
    "What is the cube of {a}?",
    "Is {a} a prime number?",
    "Is {a} prime?",
    "{a} mod {b}",
    "x + {a} = {b}",
    "Solve x + {a} = {b}.",
    "What is half of {a}?",
    "Round {a}.{b}.",
    "What is {a}/{b} + {c}?",
]


def _two_numbers(rng: random.Random) -> tuple[int, int]:
    top = rng.choice([9, 20, 99, 99, 99, 999, 999])
    return rng.randint(0, top), rng.randint(0, rng.choice([9, top]))


def arithmetic(rng: random.Random, talk: Talk) -> Drawn:
    op = rng.choice("+++++----***/")
    ask = rng.choice(ASKS[op])
    a, b = _two_numbers(rng)
    if op == "-" and a < b and rng.random() < 0.8:
        a, b = b, a
    if op in "*/" and rng.random() < 0.2:
        return beyond_the_table(rng, op)
    if op in "*/":
        a, b = rng.randint(0, 12), rng.randint(0, 12)
    if op == "*":
        return rarely(f"{a}*{b}", ask), ask.format(a=a, b=b), [f"{a} * {b} = {a * b}."]
    if op == "/":
        b = max(b, 1)
        return f"{a * b}/{b}|{ask}", ask.format(a=a * b, b=b), [f"{a * b} / {b} = {a}."]
    return f"{a}{op}{b}", ask.format(a=a, b=b), [f"{a} {op} {b} = {a + b if op == '+' else a - b}."]


def beyond_the_table(rng: random.Random, op: str) -> Drawn:
    """A product with a factor above 12, or a division that the table up to 12 does not hold."""
    if op == "*":
        a, b = rng.randint(13, rng.choice([20, 99, 999])), rng.randint(0, rng.choice([12, 99]))
        a, b = rng.choice([(a, b), (b, a)])
        return f"{a}*{b}", rng.choice(ASKS[op]).format(a=a, b=b), [TOO_BIG]
    while True:
        a, b = rng.randint(0, rng.choice([20, 99, 999])), rng.randint(0, rng.choice([12, 99]))
        if b == 0 or a % b or b > 12 or a // b > 12:
            return f"{a}/{b}", rng.choice(ASKS[op]).format(a=a, b=b), [TOO_HARD]


def hard(rng: random.Random) -> Drawn:
    a, b, c = (rng.randint(0, rng.choice([9, 20, 99])) for _ in range(3))
    text = rng.choice(HARD).format(o=rng.choice(["-", "-", "- "]), a=a, b=b, c=c)
    return f"hard|{bare(text)}", text, [TOO_HARD]


def numbers(rng: random.Random, talk: Talk) -> Drawn:
    a, b, c = (rng.randint(0, rng.choice([9, 20, 99])) for _ in range(3))
    form = rng.randrange(9)
    if form == 0 and max(a, b, c) <= 20:
        ask = rng.choice(["{a} + {b} + {c}", "What is {a} + {b} + {c}?", "{a}+{b}+{c}"])
        return f"{a}+{b}+{c}", ask.format(a=a, b=b, c=c), [f"{a} + {b} + {c} = {a + b + c}."]
    if form == 1 and a != b:
        ask = rng.choice(
            [
                "Which is bigger, {a} or {b}?",
                "Which number is larger, {a} or {b}?",
                "What is more, {a} or {b}?",
            ]
        )
        return f"{a}>{b}", ask.format(a=a, b=b), [f"{max(a, b)} is bigger than {min(a, b)}."]
    if form == 2:
        ask = rng.choice(
            ["Is {a} even or odd?", "Is {a} odd or even?", "Is {a} an even number?", "Is {a} odd?"]
        )
        return f"even{a}|{ask}", ask.format(a=a), [f"{a} is {'odd' if a % 2 else 'even'}."]
    if form == 3:
        ask, by = rng.choice(
            [
                ("What comes after {a}?", 1),
                ("Which number comes after {a}?", 1),
                ("What comes before {a}?", -1),
                ("Which number comes before {a}?", -1),
            ]
        )
        a = max(a, 1)
        return f"next{a}|{ask}", ask.format(a=a), [f"{a + by} comes {'after' if by > 0 else 'before'} {a}."]
    if form == 4:
        words = facts.NUMBERS
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        ask = rng.choice(["What is {a} plus {b}?", "How much is {a} and {b}?", "{a} plus {b}"])
        return (
            rarely(f"words{a}+{b}", ask),
            capitalised(ask.format(a=words[a], b=words[b])),
            [f"{capitalised(words[a])} plus {words[b]} is {words[a + b]}."],
        )
    if form == 5:
        op = rng.choice("+-*/")
        x, y = rng.randint(1000, 10 ** rng.randint(4, 7)), rng.randint(0, 10 ** rng.randint(1, 6))
        if op == "*" and rng.random() < 0.6:
            x, y = rng.randint(13, 999), rng.randint(13, 99)
        x, y = rng.choice([(x, y), (y, x)])
        return f"{x}{op}{y}", rng.choice(ASKS[op]).format(a=x, b=y), [TOO_BIG]
    return hard(rng) if form == 6 else counting(rng, talk)


def counting(rng: random.Random, talk: Talk) -> Drawn:
    a = rng.choice([1, 1, rng.randint(0, 70)])
    b = a + rng.randint(2, 29)
    far = rng.random() < 0.15
    if far:
        b = rng.choice([a + rng.randint(31, 99), rng.randint(100, 999), 10 ** rng.randint(2, 6)])
    if not far and rng.random() < 0.2:
        ask = rng.choice(["Count down from {b}.", "Count backwards from {b}."])
        b = rng.randint(3, 25)
        return f"down{b}|{ask}", ask.format(b=b), [", ".join(map(str, range(b, 0, -1))) + "."]
    ask = rng.choice(
        ["Count to {b}.", "Count up to {b}.", "Can you count to {b}?"]
        if a == 1
        else ["Count from {a} to {b}."]
    )
    ask = rng.choice([ask, "Count from {a} to {b}."])
    return (
        f"count{a}-{b}",
        ask.format(a=a, b=b),
        [TOO_FAR if far else ", ".join(map(str, range(a, b + 1))) + "."],
    )
