"""Generated mathematics: problems of many kinds, worked step by step, with answers that can be checked.

Every problem has the form ``Problem: … Solution: … Answer: …``. Numbers are written in plain digits, because the
tokenizer splits digits and a model should see the same place value in the same way everywhere.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Problem:
    """One worked problem."""

    question: str
    """All that is needed to solve it; two problems with the same question are the same problem."""
    steps: tuple[str, ...]
    """The solution, one short line for each step."""
    answer: str
    """A number, a fraction, or a few numbers; nothing else."""

    def text(self) -> str:
        """The problem as a document."""
        return f"Problem: {self.question}\nSolution: " + "\n".join(self.steps) + f"\nAnswer: {self.answer}"


_PLACES = ("ones", "tens", "hundreds", "thousands", "ten thousands")
_NAMES = (
    "Ada",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Grace",
    "Hugo",
    "Iris",
    "Jonas",
    "Kira",
    "Leo",
    "Mina",
    "Noah",
)
_GOODS = (
    "apples",
    "books",
    "candles",
    "pencils",
    "stamps",
    "tickets",
    "cups",
    "lamps",
    "plants",
    "stones",
    "shirts",
    "maps",
)
_TRAVELLERS = ("train", "car", "ship", "cyclist", "bus", "plane", "runner", "truck")


def addition(rng: random.Random) -> Problem:
    """Column addition with carries."""
    a, b = _number(rng), _number(rng)
    steps, carry = [], 0
    for place in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        carried = f" + {carry} carried" if carry else ""
        carry = total // 10
        next_carry = f", carry {carry}" if carry else ""
        steps.append(f"{_PLACES[place].capitalize()}: {x} + {y}{carried} = {total}, write {total % 10}{next_carry}.")
    if carry:
        steps.append(f"Write the last carry {carry} in front.")
    return Problem(f"Compute {a} + {b}.", tuple(steps), str(a + b))


def subtraction(rng: random.Random) -> Problem:
    """Column subtraction with borrows."""
    a, b = sorted((_number(rng), _number(rng)), reverse=True)
    steps, borrow = [], 0
    for place in range(len(str(a))):
        x, y = a // 10**place % 10 - borrow, b // 10**place % 10
        borrow = int(x < y)
        borrowed = " after borrowing" if borrow else ""
        steps.append(f"{_PLACES[place].capitalize()}: {x + 10 * borrow} - {y} = {x + 10 * borrow - y}{borrowed}.")
    return Problem(f"Compute {a} - {b}.", tuple(steps), str(a - b))


def multiplication(rng: random.Random) -> Problem:
    """Multiplication by partial products."""
    a, b = rng.randint(12, 999), rng.randint(12, 99)
    tens, ones = b // 10 * 10, b % 10
    steps = [f"Split {b} into {tens} + {ones}.", f"{a} * {tens} = {a * tens}.", f"{a} * {ones} = {a * ones}."]
    steps.append(f"{a * tens} + {a * ones} = {a * b}.")
    return Problem(f"Compute {a} * {b}.", tuple(steps), str(a * b))


def division(rng: random.Random) -> Problem:
    """Long division with remainder."""
    a, b = rng.randint(100, 9999), rng.randint(3, 19)
    steps, rest = [], 0
    for digit in str(a):
        current = rest * 10 + int(digit)
        rest = current % b
        steps.append(f"Bring down {digit}: {current} = {current // b} * {b} + {rest}.")
    return Problem(
        f"Divide {a} by {b}. Give the quotient and the remainder.",
        tuple(steps),
        f"quotient {a // b}, remainder {a % b}",
    )


def linear_equation(rng: random.Random) -> Problem:
    """One unknown, one equation, an integer solution."""
    a, x, b = rng.randint(2, 19), rng.randint(-30, 60), rng.randint(1, 99)
    letter = rng.choice("xyzntk")
    sign, undo = rng.choice((("+", "Subtract"), ("-", "Add")))
    right = a * x + b if sign == "+" else a * x - b
    steps = (f"{undo} {b} on both sides: {a}{letter} = {a * x}.", f"Divide both sides by {a}: {letter} = {x}.")
    return Problem(f"Solve {a}{letter} {sign} {b} = {right} for {letter}.", steps, f"{letter} = {x}")


def percentage(rng: random.Random) -> Problem:
    """Some percent of a number, by way of one percent."""
    percent, base = rng.randint(2, 98), rng.randint(2, 90) * 100
    steps = (
        f"1 percent of {base} is {base} / 100 = {base // 100}.",
        f"{percent} * {base // 100} = {percent * base // 100}.",
    )
    return Problem(f"What is {percent} percent of {base}?", steps, str(percent * base // 100))


def greatest_common_divisor(rng: random.Random) -> Problem:
    """Euclid's algorithm."""
    common = rng.randint(2, 24)
    a, b = sorted((common * rng.randint(2, 40), common * rng.randint(2, 40)), reverse=True)
    steps, x, y = [], a, b
    while y:
        steps.append(f"{x} = {x // y} * {y} + {x % y}.")
        x, y = y, x % y
    steps.append(f"The last divisor is {x}.")
    return Problem(f"Find the greatest common divisor of {a} and {b}.", tuple(steps), str(x))


def least_common_multiple(rng: random.Random) -> Problem:
    """The product over the greatest common divisor."""
    a, b = rng.sample(range(6, 90), 2)
    divisor = math.gcd(a, b)
    steps = (
        f"The greatest common divisor of {a} and {b} is {divisor}.",
        f"{a} / {divisor} = {a // divisor}.",
        f"{a // divisor} * {b} = {a // divisor * b}.",
    )
    return Problem(f"Find the least common multiple of {a} and {b}.", steps, str(math.lcm(a, b)))


def sequence_term(rng: random.Random) -> Problem:
    """A later term of an arithmetic sequence."""
    first, step, n = rng.randint(1, 60), rng.randint(2, 25), rng.randint(8, 40)
    shown = ", ".join(str(first + step * i) for i in range(4))
    steps = (
        f"The difference is {first + step} - {first} = {step}.",
        f"Term {n} is {first} + {n - 1} * {step} = {first} + {(n - 1) * step}.",
        f"The sum is {first + (n - 1) * step}.",
    )
    return Problem(
        f"The sequence {shown} goes on in the same way. What is term {n}?", steps, str(first + (n - 1) * step)
    )


def rectangle(rng: random.Random) -> Problem:
    """Area or perimeter."""
    a, b = rng.randint(3, 99), rng.randint(3, 99)
    steps: tuple[str, ...]
    if rng.random() < 0.5:
        steps = (f"The area is length times width: {a} * {b} = {a * b}.",)
        return Problem(f"A rectangle is {a} cm long and {b} cm wide. What is its area?", steps, f"{a * b} square cm")
    steps = (f"Half of the perimeter is {a} + {b} = {a + b}.", f"Twice that is 2 * {a + b} = {2 * (a + b)}.")
    return Problem(f"A rectangle is {a} cm long and {b} cm wide. What is its perimeter?", steps, f"{2 * (a + b)} cm")


def shopping(rng: random.Random) -> Problem:
    """Two goods, and the change."""
    name, (first, second) = rng.choice(_NAMES), rng.sample(_GOODS, 2)
    n, p, m, q = rng.randint(2, 9), rng.randint(2, 19), rng.randint(2, 9), rng.randint(2, 19)
    total = n * p + m * q
    paid = (total // 50 + 1) * 50
    steps = (
        f"The {first} cost {n} * {p} = {n * p} dollars.",
        f"The {second} cost {m} * {q} = {m * q} dollars.",
        f"Together that is {n * p} + {m * q} = {total} dollars.",
        f"The change is {paid} - {total} = {paid - total} dollars.",
    )
    goods = f"{n} {first} for {p} dollars each and {m} {second} for {q} dollars each"
    return Problem(
        f"{name} buys {goods} and pays with {paid} dollars. How much change is due?", steps, f"{paid - total} dollars"
    )


def travel(rng: random.Random) -> Problem:
    """Distance, speed and time: one of the three is asked for."""
    what, speed, hours = rng.choice(_TRAVELLERS), rng.randint(8, 140), rng.randint(2, 14)
    distance = speed * hours
    match rng.randrange(3):
        case 0:
            steps = (f"Distance is speed times time: {speed} * {hours} = {distance}.",)
            return Problem(
                f"A {what} moves at {speed} km per hour for {hours} hours. How far does it go?", steps, f"{distance} km"
            )
        case 1:
            steps = (f"Time is distance divided by speed: {distance} / {speed} = {hours}.",)
            return Problem(
                f"A {what} moves at {speed} km per hour. How long does it take for {distance} km?",
                steps,
                f"{hours} hours",
            )
    steps = (f"Speed is distance divided by time: {distance} / {hours} = {speed}.",)
    return Problem(f"A {what} goes {distance} km in {hours} hours. What is its speed?", steps, f"{speed} km per hour")


def fraction_sum(rng: random.Random) -> Problem:
    """Two fractions over a common denominator, reduced at the end."""
    b, d = rng.sample(range(2, 16), 2)
    a, c = rng.randint(1, b - 1), rng.randint(1, d - 1)
    common = math.lcm(b, d)
    x, y = a * common // b, c * common // d
    total = Fraction(a, b) + Fraction(c, d)
    steps = [
        f"The common denominator is {common}.",
        f"{a}/{b} = {x}/{common} and {c}/{d} = {y}/{common}.",
        f"{x}/{common} + {y}/{common} = {x + y}/{common}.",
    ]
    if total.denominator != common:
        steps.append(f"Divide both by {common // total.denominator}: {total}.")
    return Problem(f"Compute {a}/{b} + {c}/{d} in lowest terms.", tuple(steps), str(total))


def order_of_operations(rng: random.Random) -> Problem:
    """Brackets first, then products, then sums."""
    a, b, c, d = rng.randint(2, 30), rng.randint(2, 30), rng.randint(2, 12), rng.randint(1, 60)
    steps = (
        f"Brackets first: {a} + {b} = {a + b}.",
        f"Then the product: {a + b} * {c} = {(a + b) * c}.",
        f"Then the difference: {(a + b) * c} - {d} = {(a + b) * c - d}.",
    )
    return Problem(f"Compute ({a} + {b}) * {c} - {d}.", steps, str((a + b) * c - d))


def binary(rng: random.Random) -> Problem:
    """A number in base two, by repeated halving."""
    n = rng.randint(9, 1023)
    steps, rest = [], n
    while rest:
        steps.append(f"{rest} = 2 * {rest // 2} + {rest % 2}.")
        rest //= 2
    steps.append("Read the remainders from the last to the first.")
    return Problem(f"Write {n} in base 2.", tuple(steps), f"{n:b}")


def mean(rng: random.Random) -> Problem:
    """The mean of a few numbers, always whole."""
    count, average = rng.randint(3, 6), rng.randint(40, 120)
    values = [average + rng.randint(-7, 7) for _ in range(count - 1)]
    values.append(count * average - sum(values))
    total = " + ".join(map(str, values))
    steps = (f"The sum is {total} = {sum(values)}.", f"There are {count} numbers: {sum(values)} / {count} = {average}.")
    return Problem(f"What is the mean of {', '.join(map(str, values))}?", steps, str(average))


def prime_factors(rng: random.Random) -> Problem:
    """Trial division."""
    n = rng.randint(24, 2400)
    steps, rest, factors, divisor = [], n, [], 2
    while divisor * divisor <= rest:
        if rest % divisor == 0:
            steps.append(f"{rest} / {divisor} = {rest // divisor}.")
            factors.append(divisor)
            rest //= divisor
        else:
            divisor += 1
    factors.append(rest)
    steps.append(f"{rest} is prime.")
    return Problem(f"Write {n} as a product of primes.", tuple(steps), " * ".join(map(str, factors)))


def sum_and_difference(rng: random.Random) -> Problem:
    """Two unknowns from their sum and their difference."""
    larger, smaller = sorted(rng.sample(range(5, 200), 2), reverse=True)
    total, difference = larger + smaller, larger - smaller
    steps = (
        f"Twice the larger number is {total} + {difference} = {total + difference}.",
        f"The larger number is {total + difference} / 2 = {larger}.",
        f"The smaller number is {total} - {larger} = {smaller}.",
    )
    question = f"Two numbers have the sum {total} and the difference {difference}. What are they?"
    return Problem(question, steps, f"{larger} and {smaller}")


KINDS: tuple[Callable[[random.Random], Problem], ...] = (
    addition,
    subtraction,
    multiplication,
    division,
    linear_equation,
    percentage,
    greatest_common_divisor,
    least_common_multiple,
    sequence_term,
    rectangle,
    shopping,
    travel,
    fraction_sum,
    order_of_operations,
    binary,
    mean,
    prime_factors,
    sum_and_difference,
)
"""Every kind of problem; documents take them with equal chances."""


def generate(seed: int, part: int, characters: int) -> list[str]:
    """Problems of about the given total length; the part number makes pieces that differ, for parallel work."""
    rng = random.Random(f"mathematics {seed} {part}")
    texts, length = [], 0
    while length < characters:
        texts.append(rng.choice(KINDS)(rng).text())
        length += len(texts[-1])
    return texts


def question_of(text: str) -> str:
    """The question of a document: what must not be in two splits."""
    return text.split("\nSolution:", 1)[0].removeprefix("Problem: ")


def _number(rng: random.Random) -> int:
    digits = rng.randint(2, 5)
    return rng.randint(10 ** (digits - 1), 10**digits - 1)
