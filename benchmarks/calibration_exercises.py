"""The default calibration set's computed part: exercises whose every number is worked out by the code that writes it down.

`computed()` yields conversations, always the same, on any machine.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from datetime import date, timedelta
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

from calibration_tools import TOOLS, Conversation, as_harmony

Item = TypeVar("Item")


class Dice:
    """Numbers that look random and are the same everywhere, whatever the version of Python."""

    def __init__(self, seed: int) -> None:
        self.state = seed

    def below(self, n: int) -> int:
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (self.state >> 33) % n

    def between(self, low: int, high: int) -> int:
        return low + self.below(high - low + 1)

    def of(self, items: Sequence[Item]) -> Item:
        return items[self.below(len(items))]

    def some(self, items: Sequence[Item], count: int) -> list[Item]:
        left = list(items)
        return [left.pop(self.below(len(left))) for _ in range(count)]


NAMES = ["Amara", "Björn", "Chen Wei", "Dolores", "Emeka", "Fatima", "Giulia", "Haruto", "Ingrid", "Jamal", "Kateryna"]
NAMES += ["Léa", "Mateus", "Ngozi", "Oskar", "Priya", "Quang", "Rania", "Søren", "Tomás"]
CITIES = [
    "Zürich",
    "Nairobi",
    "São Paulo",
    "Osaka",
    "Kraków",
    "Montréal",
    "Jaipur",
    "Lagos",
    "Tromsø",
    "Hanoi",
    "Izmir",
]
GOODS = [
    "copper wire",
    "oak board",
    "printer paper",
    "green tea",
    "roof tile",
    "glass jar",
    "LED lamp",
    "bicycle chain",
]
Three = tuple[str, str, str]


def product(dice: Dice) -> Three:
    a, b = dice.between(123, 9876), dice.between(23, 987)
    parts = [(int(digit) * 10**i) for i, digit in enumerate(reversed(str(b))) if digit != "0"]
    lines = [f"{a} × {part} = {a * part}" for part in parts]
    check = f"Check modulo 9: {a % 9} · {b % 9} ≡ {a * b % 9}, and {a * b} mod 9 = {a * b % 9}. Good."
    ask = dice.of(["What is {} times {}?", "Compute {} × {}.", "Multiply {} by {} without a calculator."])
    return ask.format(a, b), "\n".join([*lines, f"Sum: {a * b}", check]), f"**{a} × {b} = {a * b:,}**"


def euclid(dice: Dice) -> Three:
    common = dice.between(2, 30)
    a, b = common * dice.between(20, 200), common * dice.between(20, 200)
    x, y, u, v, lines, p, q = 1, 0, 0, 1, [], a, b
    while q:
        lines.append(f"{p} = {p // q} · {q} + {p % q}")
        x, y, u, v, p, q = u, v, x - p // q * u, y - p // q * v, q, p % q
    answer = f"gcd({a}, {b}) = {p}, and {p} = ({x})·{a} + ({y})·{b}."
    lines.append(
        f"The remainder is zero, so the divisor {p} is it. Going back: {x}·{a} = {x * a}, {y}·{b} = {y * b}; sum {p}."
    )
    return f"Write the greatest common divisor of {a} and {b} as a combination of the two.", "\n".join(lines), answer


def quadratic(dice: Dice) -> Three:
    a, r, s = dice.between(1, 4), dice.between(-9, 9), dice.between(-9, 9)
    b, c = -a * (r + s), a * r * s
    shown = f"{a if a > 1 else ''}x^2 {'+' if b >= 0 else '-'} {abs(b)}x {'+' if c >= 0 else '-'} {abs(c)} = 0"
    disc = b * b - 4 * a * c
    think = (
        f"Discriminant: ({b})² − 4·{a}·({c}) = {disc} = {math.isqrt(disc)}². x = ({-b} ± {math.isqrt(disc)})/{2 * a}."
    )
    roots = sorted({r, s})
    said = f"x = {roots[0]}" + (f" or x = {roots[1]}" if len(roots) > 1 else " (a double root)")
    left = f"{a if a > 1 else ''}(x {'-' if r >= 0 else '+'} {abs(r)})(x {'-' if s >= 0 else '+'} {abs(s)})"
    return f"Solve \\({shown}\\).", think, f"\\[{left} = 0\\]\nso {said}."


def system(dice: Dice) -> Three:
    x, y = dice.between(-12, 12), dice.between(-12, 12)
    a, b, c = dice.between(1, 9), dice.between(1, 9), dice.between(1, 9)
    d = dice.between(1, 9)
    d += a * d == b * c  # a singular matrix would have no single answer
    e, f, det = a * x + b * y, c * x + d * y, a * d - b * c
    think = f"det = {a}·{d} − {b}·{c} = {det}\nx = ({e}·{d} − {b}·{f})/{det} = {e * d - b * f}/{det} = {x}\n"
    think += f"y = ({a}·{f} − {e}·{c})/{det} = {a * f - e * c}/{det} = {y}"
    return f"Solve {a}x + {b}y = {e} and {c}x + {d}y = {f}.", think, f"x = {x}, y = {y}"


def power(dice: Dice) -> Three:
    base, exponent, modulus = dice.between(2, 50), dice.between(50, 999), dice.between(11, 199)
    lines, value, bits = [f"{exponent} = {exponent:b} in binary"], 1, f"{exponent:b}"
    for bit in bits:
        value = value * value % modulus * (base if bit == "1" else 1) % modulus
        lines.append(f"bit {bit}: square{' and multiply' if bit == '1' else ''} → {value}")
    return f"What is {base}^{exponent} mod {modulus}?", "\n".join(lines), f"{base}^{exponent} ≡ {value} (mod {modulus})"


def fractions(dice: Dice) -> Three:
    a, b = (Fraction(dice.between(1, 30), dice.between(2, 24)) for _ in range(2))
    low = math.lcm(a.denominator, b.denominator)
    one, two = a.numerator * low // a.denominator, b.numerator * low // b.denominator
    think = f"Common denominator {low}: {a} = {one}/{low}, {b} = {two}/{low}. {one} + {two} = {one + two}."
    return f"Add {a} and {b}.", think, f"$$\\frac{{{one}}}{{{low}}} + \\frac{{{two}}}{{{low}}} = {a + b}$$"


def statistics(dice: Dice) -> Three:
    values = [dice.between(0, 60) for _ in range(dice.of([5, 7, 9]))]
    ordered, n = sorted(values), len(values)
    mean = Fraction(sum(values), n)
    variance = sum((v - mean) ** 2 for v in values) / n
    think = f"Sorted: {ordered}. n = {n}, sum = {sum(values)}, sum of squares = {sum(v * v for v in values)}."
    rows = [("mean", float(mean)), ("median", ordered[n // 2]), ("variance", float(variance))]
    table = "| measure | value |\n| --- | ---: |\n" + "\n".join(f"| {name} | {value:.3f} |" for name, value in rows)
    return f"Mean, median and population variance of {', '.join(map(str, values))}, as a table.", think, table


def weekday(dice: Dice) -> Three:
    start = date(dice.between(1950, 2049), dice.between(1, 12), dice.between(1, 28))
    days = dice.between(40, 900)
    end = start + timedelta(days)
    names = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
    think = f"{days} = {days // 7}·7 + {days % 7}, so the weekday moves on by {days % 7}: "
    think += f"{names[start.weekday()]} → {names[end.weekday()]}. The date itself: {end.isoformat()}."
    ask = f"{start.isoformat()} was a {names[start.weekday()]}. What day and date is {days} days later?"
    return ask, think, f"{names[end.weekday()]}, {end.isoformat()}"


def bases(dice: Dice) -> Three:
    n = dice.between(300, 65535)
    lines, left = [], n
    while left:
        lines.append(f"{left} / 16 = {left // 16}, remainder {left % 16} ({left % 16:X})")
        left //= 16
    return f"Show {n} in hexadecimal and binary.", "\n".join(lines), f"`0x{n:X}` and `0b{n:b}`"


def units(dice: Dice) -> Three:
    gallons, fahrenheit = dice.between(2, 40), dice.between(-20, 110)
    miles = gallons * dice.between(17, 52) + dice.between(0, 16)
    km, litres, celsius = miles * 1.609344, gallons * 3.785411784, (fahrenheit - 32) / 1.8
    think = f"{miles} · 1.609344 = {km:.3f}; {gallons} · 3.785411784 = {litres:.3f}; ({fahrenheit} − 32)/1.8 = {celsius:.2f}"
    found = {"distance_km": round(km, 1), "fuel_l": round(litres, 1), "temperature_c": round(celsius, 1)}
    found["l_per_100km"] = round(litres / km * 100, 2)
    ask = f"A car went {miles} miles on {gallons} US gallons at {fahrenheit} °F. Metric, as one line of JSON, with l/100 km."
    return ask, think, json.dumps(found)


def interest(dice: Dice) -> Three:
    capital, rate, years = 100 * dice.between(10, 400), Fraction(dice.between(2, 16), 2), dice.between(3, 6)
    rows, value = [], Fraction(capital)
    for year in range(1, years + 1):
        gain = value * rate / 100
        rows.append(f"{year},{float(value):.2f},{float(gain):.2f},{float(value + gain):.2f}")
        value += gain
    think = f"Factor {float(1 + rate / 100):.3f} a year; after {years} years {float(value / capital):.6f}."
    ask = f"{capital} at {float(rate):.1f} % a year, interest added yearly: a CSV of the first {years} years."
    return ask, think, "```csv\nyear,begin,interest,end\n" + "\n".join(rows) + "\n```"


def records(dice: Dice) -> Three:
    people = [
        {"name": name, "city": dice.of(CITIES), "age": dice.between(19, 88), "member": bool(dice.below(2))}
        for name in dice.some(NAMES, 3)
    ]
    said = " ".join(
        f"{p['name']}, {p['age']}, lives in {p['city']} and is {'a' if p['member'] else 'not a'} member."
        for p in people
    )
    form = dice.of(["JSON", "YAML", "XML", "HTML"])
    think = f"{len(people)} people; fields name, city, age, member. {form} was asked for, nothing else."
    if form == "JSON":
        shown = json.dumps(people, ensure_ascii=False, indent=2)
    elif form == "YAML":
        shown = "\n".join(
            f"- name: {p['name']}\n  city: {p['city']}\n  age: {p['age']}\n  member: {str(p['member']).lower()}"
            for p in people
        )
    elif form == "XML":
        rows = (f'  <person age="{p["age"]}" member="{str(p["member"]).lower()}" city="{p["city"]}">' for p in people)
        inner = "\n".join(f"{row}{p['name']}</person>" for row, p in zip(rows, people, strict=True))
        shown = f'<?xml version="1.0" encoding="UTF-8"?>\n<people>\n{inner}\n</people>'
    else:
        cells = "\n".join("  <tr>" + "".join(f"<td>{value}</td>" for value in p.values()) + "</tr>" for p in people)
        shown = f"<table>\n  <tr><th>name</th><th>city</th><th>age</th><th>member</th></tr>\n{cells}\n</table>"
    return f"{said} Put this into {form}.", think, f"```{form.lower()}\n{shown}\n```"


def query(dice: Dice) -> Three:
    rows = [(good, dice.between(1, 90), dice.between(2, 400) / 4, dice.of(CITIES[:4])) for good in dice.some(GOODS, 6)]
    rows += [(rows[i][0], dice.between(1, 90), rows[i][2], dice.of(CITIES[:4])) for i in range(3)]
    base = sqlite3.connect(":memory:")
    base.execute("CREATE TABLE stock (item TEXT, pieces INTEGER, price REAL, place TEXT)")
    base.executemany("INSERT INTO stock VALUES (?, ?, ?, ?)", rows)
    text = dice.of(
        [
            "SELECT place, SUM(pieces) FROM stock GROUP BY place ORDER BY 2 DESC, place;",
            "SELECT item, SUM(pieces * price) AS worth FROM stock GROUP BY item HAVING worth > 500 ORDER BY worth DESC, item;",
            "SELECT place, COUNT(DISTINCT item), MAX(price) FROM stock GROUP BY place ORDER BY place;",
        ]
    )
    found = base.execute(text).fetchall()
    shown = "\n".join(" | ".join(map(str, row)) for row in found) or "(no rows)"
    table = "item,pieces,price,place\n" + "\n".join(",".join(map(str, row)) for row in rows)
    think = f"{len(rows)} rows in, {len(found)} out. " + "; ".join(f"{row[0]}: {row[1]}" for row in found)
    return f"Table stock:\n\n{table}\n\nWhat does this return?\n\n```sql\n{text}\n```", think, f"```\n{shown}\n```"


def collatz(dice: Dice) -> Three:
    n, name = dice.between(5, 60), dice.of(["Python", "C", "JavaScript", "Rust"])
    code = {
        "Python": f"n = {n}\nsteps = 0\nwhile n != 1:\n    n = n // 2 if n % 2 == 0 else 3 * n + 1\n    steps += 1\nprint(steps)",
        "C": f"#include <stdio.h>\nint main(void) {{\n    long n = {n};\n    int steps = 0;\n    for (; n != 1; steps++)\n"
        '        n = n % 2 ? 3 * n + 1 : n / 2;\n    printf("%d\\n", steps);\n    return 0;\n}',
        "JavaScript": f"let n = {n}, steps = 0;\nwhile (n !== 1) {{\n"
        "  n = n % 2 === 0 ? n / 2 : 3 * n + 1;\n  steps++;\n}\nconsole.log(steps);",
        "Rust": f"fn main() {{\n    let mut n: u64 = {n};\n    let mut steps = 0;\n    while n != 1 {{\n"
        '        n = if n % 2 == 0 { n / 2 } else { 3 * n + 1 };\n        steps += 1;\n    }\n    println!("{steps}");\n}',
    }[name]
    path = [n]
    while path[-1] != 1:
        path.append(path[-1] // 2 if path[-1] % 2 == 0 else 3 * path[-1] + 1)
    ask = f"What does this {name} program print?\n\n```{name.lower()}\n{code}\n```"
    return ask, " → ".join(map(str, path)), f"`{len(path) - 1}`: the number of steps from {n} to 1."


def sorting(dice: Dice) -> Three:
    values, lines = [dice.between(1, 99) for _ in range(7)], []
    left = list(values)
    for i in range(1, len(left)):
        j = i
        while j and left[j - 1] > left[j]:
            left[j - 1], left[j], j = left[j], left[j - 1], j - 1
        lines.append(f"{i}. {left[j]} goes to place {j}: {left}")
    return (
        f"Show insertion sort on {values} step by step.",
        "\n".join(lines),
        f"After {len(lines)} insertions: `{left}`",
    )


PRICES: dict[str, list[str]] = json.loads(
    (Path(__file__).parent / "calibration_texts" / "prices.json").read_text("utf-8")
)
"""By language: what a kilogram costs and how much so many cost, and the answer."""


def price(dice: Dice, language: str) -> Three:
    one, count = dice.between(12, 90), dice.between(3, 48)
    ask, answer = PRICES[language]
    tens, ones = count // 10 * 10, count % 10
    steps = f"{one} × {count} = {one} × {tens} + {one} × {ones} = {one * tens} + {one * ones} = {one * count}"
    return ask.format(one, count), steps, answer.format(one * count)


def log(dice: Dice) -> Three:
    """A long document, and questions whose answers are counted."""
    services, levels = ["auth", "billing", "search", "mailer"], ["INFO", "INFO", "INFO", "WARN", "ERROR"]
    notes = {"INFO": "request served", "WARN": "slow upstream, retrying", "ERROR": "connection reset by peer"}
    clock, lines, entries = dice.between(0, 40_000), [], []
    for _ in range(dice.between(45, 70)):
        clock += dice.between(1, 300)
        service, level, ms = dice.of(services), dice.of(levels), dice.between(3, 2400)
        entries.append((service, level, ms))
        stamp = f"{clock // 3600:02}:{clock // 60 % 60:02}:{clock % 60:02}"
        lines.append(f"{stamp} {level:<5} [{service}] {notes[level]} id={dice.below(2**32):08x} ms={ms}")
    counts = {s: {lv: sum(e[:2] == (s, lv) for e in entries) for lv in ("INFO", "WARN", "ERROR")} for s in services}
    slow = max(range(len(entries)), key=lambda i: entries[i][2])
    think = "Count by service: " + "; ".join(f"{s}: {counts[s]}" for s in services)
    table = "\n".join(f"| {s} | " + " | ".join(str(n) for n in counts[s].values()) + " |" for s in services)
    answer = f"| service | INFO | WARN | ERROR |\n| --- | ---: | ---: | ---: |\n{table}\n\nSlowest: `{lines[slow]}`"
    return "Count the levels by service, and show the slowest line.\n\n" + "\n".join(lines), think, answer


def tool_talk(dice: Dice, number: int) -> Conversation:
    """A tool call, in turn: as a chat that waits for its result, as one that is answered, and in harmony form."""
    city, name, good = dice.of(CITIES), dice.of(NAMES), dice.of(GOODS)
    amount, day = dice.between(20, 2000), date(2025, dice.between(1, 12), dice.between(1, 28))
    low, wind = dice.between(-8, 24), dice.between(2, 70)
    rate = Fraction(dice.between(50, 150), 100)
    paid = float(amount * rate)
    orders = [{"id": dice.between(10000, 99999), "item": good, "status": "open", "total": amount / 4}]
    asked, thought, tool, arguments, result, answer = dice.of(
        [
            (f"Will I need a coat in {city} tomorrow?", "Tomorrow means two days of forecast.", "get_weather",
             {"city": city, "days": 2}, {"city": city, "forecast": [{"low": low + 2, "high": low + 9},
              {"low": low, "high": low + 7, "wind_kmh": wind}]}, f"Tomorrow {low} to {low + 7} °C in {city}, wind {wind} km/h. "
             + ("Take a coat." if low < 12 else "No coat needed.")),
            (f"How much is {amount} CHF in USD?", "The rate is not known to me; the tool has it.", "convert_currency",
             {"amount": amount, "from": "CHF", "to": "USD"}, {"amount": paid, "rate": float(rate)},
             f"{amount} CHF are {paid:.2f} USD, at a rate of {float(rate):.2f}."),
            (f"Does {name} have open orders since {day}?", "One call with status open.", "search_orders",
             {"customer": name, "since": str(day), "status": ["open"]}, orders,
             f"Yes, one: no. {orders[0]['id']}, {good}, {amount / 4:.2f}."),
            (f"Put a call with {name} on {day} at 14:30, half an hour.", "14:30 in UTC, as the calendar has it; 30 minutes.",
             "create_event", {"title": f"Call with {name}", "start": f"{day}T14:30:00+00:00", "minutes": 30,
              "guests": [name]}, {"ok": True, "event": f"ev-{amount}"}, f"Done: {day}, 14:30 to 15:00 UTC, with {name}."),
            (f"Tell {name} that the {good} has arrived.", "Not urgent.", "send_message",
             {"to": name, "text": f"The {good} has arrived.", "urgent": False}, {"delivered": True}, f"{name} has been told."),
        ]
    )  # fmt: skip
    others = [TOOLS[t] for t in sorted(dice.some([t for t in TOOLS if t != tool], 2))]
    head = {
        "domain": "tools",
        "language": "en",
        "reasoning_effort": dice.of(["low", "medium", "high"]),
        "date": str(day),
    }
    head["tools"] = [TOOLS[tool], *others]
    if number % 3 == 2:
        sections = [
            ("user", None, asked),
            ("analysis", None, thought),
            ("call", f"functions.{tool}", json.dumps(arguments, ensure_ascii=False)),
        ]
        sections += [("result", f"functions.{tool}", json.dumps(result, ensure_ascii=False)), ("final", None, answer)]
        return head | as_harmony(sections)
    call = {"type": "function", "function": {"name": tool, "arguments": arguments}}
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "thinking": thought, "tool_calls": [call]}]
    if number % 3 == 1:
        messages += [{"role": "tool", "content": result}, {"role": "assistant", "content": answer}]
    return head | {"messages": messages}


EXERCISES: tuple[tuple[str, int, Callable[[Dice], Three]], ...] = (
    ("mathematics", 9, product), ("mathematics", 7, euclid), ("mathematics", 8, quadratic), ("mathematics", 7, system),
    ("mathematics", 6, power), ("mathematics", 6, fractions), ("mathematics", 6, statistics), ("mathematics", 5, weekday),
    ("mathematics", 5, bases), ("structured", 7, units), ("structured", 6, interest), ("structured", 16, records),
    ("code", 9, query), ("code", 10, collatz), ("code", 5, sorting), ("documents", 5, log),
)  # fmt: skip


def computed() -> Iterator[Conversation]:
    dice = Dice(20250805)

    def talk(domain: str, language: str, three: Three) -> Conversation:
        ask, think, answer = three
        said = {"role": "assistant", "thinking": think, "content": answer}
        effort = dice.of(["low", "medium", "medium", "high"])
        messages = [{"role": "user", "content": ask}, said]
        return {"domain": domain, "language": language, "reasoning_effort": effort, "messages": messages}

    for domain, count, exercise in EXERCISES:
        yield from (talk(domain, "en", exercise(dice)) for _ in range(count))
    for _ in range(2):
        yield from (talk("mathematics", language, price(dice, language)) for language in PRICES)
    yield from (tool_talk(dice, number) for number in range(36))
