"""The demo world's conversations, made from a seed: prompts with gold answers, or whole conversations to learn from.

In: how many, seed, side ("train" or "held_out"). Out: rows as dictionaries in the OpenAI messages form, or JSONL files
(`python -m raykd.demo.corpus --out DIR --train N --held-out M --seed S`).

A hash of the user's words decides the side, so no request is on both. Six kinds of rows, by what the next assistant
turn must do: `no_tool` answer directly, `no_fitting_tool` decline, `one_call`, `two_calls`, `tool_result` answer with
the values a tool returned, `tool_error` report a failed call.
"""

import argparse
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raykd.demo.registry import CURRENCIES, LANGUAGES, ROOMS, TRANSLATIONS, call_tool, openai_tools

# Every kind with its share of the rows.
KINDS = {
    "no_tool": 0.10,
    "no_fitting_tool": 0.12,
    "one_call": 0.30,
    "two_calls": 0.20,
    "tool_result": 0.20,
    "tool_error": 0.08,
}
# The same for whole conversations. Whether the tool that a request needs is among those offered is the last thing a
# model learns: it takes many requests that must be declined, and some prompts that offer a single tool.
TEACHING_KINDS = KINDS | {"no_fitting_tool": 0.60}
HELD_OUT_SHARE = 0.1

CITIES = (
    *("Paris", "London", "Berlin", "Zürich", "Kraków", "Oslo", "Lima", "Cairo", "Delhi", "Toronto", "Madrid", "Rome"),
    *("Vienna", "Dublin", "Lisbon", "Sydney", "Málaga", "Reykjavík", "Boston", "Seoul", "Athens", "東京", "Łódź"),
    *("Hanoi", "São Paulo", "New York"),
)
NAMES = (
    *("Ana", "Ben", "Chloé", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kofi", "Lena", "Mei"),
    *("Noah", "Olga", "Pablo", "Søren", "Tara", "Yuki", "Zoë"),
)
RESTAURANTS = ("Roma", "Café Luna", "Le Jardin", "Sakura", "El Toro", "Blue Door", "Čili", "Bella", "Taj", "Old Mill")
ARTISTS = ("Björk", "Nina Simone", "Queen", "Sigur Rós", "Adele", "Beyoncé", "Mozart", "Prince", "Abba", "Radiohead")
SYMBOLS = ("AAPL", "MSFT", "NVDA", "TSLA", "AMZN", "ORCL", "INTC", "NFLX", "SAP", "IBM")
ITEMS = ("coffee beans", "green tea", "red pens", "candles", "batteries", "blue mugs", "notebooks", "light bulbs")
STREETS = ("Main Street", "Oak Avenue", "Rue Verte", "Hill Road", "Lake View", "Bahnhofstraße")
SUBJECTS = ("the train", "dinner", "the meeting", "the package", "my car", "the report", "our flight", "the game")
STATES = ("is late", "is ready", "is cancelled", "was great 🎉", "is on time", "starts now", "is lost", "is over")
EVENT_ADJECTIVES = ("team", "project", "family", "budget", "yearly", "school")
EVENT_NOUNS = ("lunch", "review", "dinner", "meeting", "party", "call")
CAPITALS = {
    "France": "Paris",
    "England": "London",
    "Germany": "Berlin",
    "Norway": "Oslo",
    "Peru": "Lima",
    "Egypt": "Cairo",
    "Spain": "Madrid",
    "Italy": "Rome",
    "Austria": "Vienna",
    "Ireland": "Dublin",
    "Portugal": "Lisbon",
    "Greece": "Athens",
}
OPENERS = ("", "Hi! ", "Hello, ", "Please help: ", "Quick question: ")


@dataclass(frozen=True)
class Scene:
    """How people ask for one tool and how its result is told.

    `sample(rng)` gives the required arguments; `requests` are paraphrases with the arguments as fields. `options` maps
    an optional argument to (its sampler, its clause); a clause is said only when the argument is given. `answer` has the
    arguments and the result's values as fields, `purpose` completes "I have no tool to …".
    """

    sample: Callable[[random.Random], dict[str, Any]]
    requests: tuple[str, ...]
    answer: str
    purpose: str
    options: tuple[tuple[str, Callable[[random.Random], Any], Callable[[Any], str]], ...] = ()


def _two(rng: random.Random, pool: tuple[str, ...]) -> tuple[str, str]:
    first, second = rng.sample(pool, 2)
    return first, second


def _flag(yes: str, no: str) -> Callable[[bool], str]:
    return lambda value: yes if value else no


def _sample_currency(rng: random.Random) -> dict[str, Any]:
    source, target = _two(rng, CURRENCIES)
    amount = rng.choice((rng.randint(1, 999), rng.randint(11, 9999) / 10))
    return {"amount": amount, "source": source, "target": target}


def _sample_flight(rng: random.Random) -> dict[str, Any]:
    origin, destination = _two(rng, CITIES)
    return {"origin": origin, "destination": destination}


def _sample_numbers(rng: random.Random) -> dict[str, Any]:
    return {"numbers": [rng.randint(1, 99) for _ in range(rng.randint(2, 4))]}


def _sample_table(rng: random.Random) -> dict[str, Any]:
    time = f"{rng.randint(17, 22)}:{rng.choice(('00', '15', '30', '45'))}"
    return {"restaurant": rng.choice(RESTAURANTS), "guests": rng.randint(2, 12), "time": time}


def _sample_message(rng: random.Random) -> dict[str, Any]:
    return {"recipient": rng.choice(NAMES), "text": f"{rng.choice(SUBJECTS)} {rng.choice(STATES)}"}


def _sample_event(rng: random.Random) -> dict[str, Any]:
    title = f"{rng.choice(EVENT_ADJECTIVES)} {rng.choice(EVENT_NOUNS)}"
    return {"title": title, "date": f"2027-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"}


def _sample_order(rng: random.Random) -> dict[str, Any]:
    address = {"street": f"{rng.choice(STREETS)} {rng.randint(1, 99)}", "city": rng.choice(CITIES)}
    return {"item": rng.choice(ITEMS), "quantity": rng.randint(2, 40), "address": address}


SCENES: dict[str, Scene] = {
    "get_weather": Scene(
        lambda rng: {"city": rng.choice(CITIES)},
        ("What is the weather in {city}?", "How is the weather in {city} today?", "Check the weather in {city}."),
        "In {city} it is {temperature} degrees and {condition}.",
        "check the weather",
        (("unit", lambda rng: rng.choice(("celsius", "fahrenheit")), lambda unit: f" Use {unit}."),),
    ),
    "convert_currency": Scene(
        _sample_currency,
        ("Convert {amount} {source} to {target}.", "How much is {amount} {source} in {target}?"),
        "{amount} {source} is {converted} {target}.",
        "convert money",
    ),
    "sum_numbers": Scene(
        _sample_numbers,
        ("Add {numbers}.", "What is the sum of {numbers}?", "Please sum up {numbers}."),
        "The sum is {sum}.",
        "add numbers",
    ),
    "search_flights": Scene(
        _sample_flight,
        ("Find a flight from {origin} to {destination}.", "I want to fly from {origin} to {destination}."),
        "Flight {flight} to {destination} costs {price}.",
        "find flights",
        (
            ("max_price", lambda rng: 10 * rng.randint(8, 90), lambda price: f" Pay at most {price}."),
            ("direct", lambda rng: rng.random() < 0.5, _flag(" Direct only.", " Stops are fine.")),
        ),
    ),
    "book_table": Scene(
        _sample_table,
        ("Book a table at {restaurant} for {guests} at {time}.", "Get us {guests} seats at {restaurant} at {time}."),
        "Your table at {restaurant} is booked, number {booking}.",
        "book a table",
        (("outdoor", lambda rng: rng.random() < 0.5, _flag(" We sit outside.", " We sit inside.")),),
    ),
    "send_message": Scene(
        _sample_message,
        ('Tell {recipient} "{text}".', 'Send "{text}" to {recipient}.', 'Write to {recipient}: "{text}".'),
        "Message {message} went to {recipient}.",
        "send messages",
        (("urgent", lambda rng: rng.random() < 0.5, _flag(" It is urgent.", " It is not urgent.")),),
    ),
    "create_event": Scene(
        _sample_event,
        ('Add "{title}" on {date} to my calendar.', 'Plan "{title}" for {date}.'),
        "Event {event} is in your calendar on {date}.",
        "change your calendar",
        (("guests", lambda rng: rng.sample(NAMES, rng.randint(1, 2)), lambda who: f" Invite {' and '.join(who)}."),),
    ),
    "translate_text": Scene(
        lambda rng: {"text": rng.choice(tuple(TRANSLATIONS)), "language": rng.choice(LANGUAGES)},
        ('Translate "{text}" into {language}.', 'How do you say "{text}" in {language}?', 'Say "{text}" in {language}.'),
        'In {language} it is "{translation}".',
        "translate a text",
    ),
    "set_thermostat": Scene(
        lambda rng: {"room": rng.choice(ROOMS), "degrees": rng.choice((rng.randint(15, 25), rng.randint(15, 25) + 0.5))},
        ("Heat the {room} to {degrees} degrees.", "Make the {room} {degrees} degrees warm."),
        "The {room} will be warm in {minutes} minutes.",
        "heat a room",
    ),
    "order_item": Scene(
        _sample_order,
        ("Order {quantity} {item} to {street} in {city}.", "Ship {quantity} {item} to {street} in {city}."),
        "Order {order} arrives in {days} days.",
        "order things",
    ),
    "get_stock_price": Scene(
        lambda rng: {"symbol": rng.choice(SYMBOLS)},
        ("What is the share price of {symbol}?", "How much is one {symbol} share?", "Check the stock {symbol}."),
        "{symbol} stands at {price}.",
        "look up shares",
    ),
    "play_music": Scene(
        lambda rng: {"artist": rng.choice(ARTISTS)},
        ("Play something by {artist}.", "I want to hear {artist}.", "Put on {artist}."),
        "Playing {songs} songs by {artist}.",
        "play music",
        (
            ("volume", lambda rng: rng.randint(1, 100), lambda volume: f" Volume {volume}."),
            ("shuffle", lambda rng: rng.random() < 0.5, _flag(" Shuffle them.", " Do not shuffle.")),
        ),
    ),
}


def spoken_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Arguments or results as format fields: a nested object contributes its own fields, a list is spoken."""
    spoken: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            spoken |= spoken_fields(value)
        else:
            spoken[name] = " and ".join(map(str, value)) if isinstance(value, list) else value
    return spoken


def _request(rng: random.Random, tool: str) -> tuple[str, dict[str, Any]]:
    """A user's sentence asking for `tool`, and the call it asks for."""
    scene = SCENES[tool]
    arguments = scene.sample(rng)
    text = rng.choice(scene.requests).format(**spoken_fields(arguments))
    for name, sample, clause in scene.options:
        if rng.random() < 0.4:
            arguments[name] = sample(rng)
            text += clause(arguments[name])
    return text, {"name": tool, "arguments": arguments}


def _chat(rng: random.Random) -> tuple[str, str]:
    """A request that needs no tool, and its answer."""
    opener, name, city = rng.choice(OPENERS), rng.choice(NAMES), rng.choice(CITIES)
    match rng.randrange(4):
        case 0:
            return f"{opener}I am {name} from {city}.", f"Nice to meet you, {name} from {city}."
        case 1:
            country = rng.choice(tuple(CAPITALS))
            return f"{opener}What is the capital of {country}?", f"The capital of {country} is {CAPITALS[country]}."
        case 2:
            return f"{opener}Thank you, also from {name} in {city}.", f"You are welcome, greetings to {name}."
        case _:
            first, second = _two(rng, ITEMS)
            return f"{opener}Do you like {first} or {second} more?", f"I like {first} more."


def _told(call: dict[str, Any], result: dict[str, Any]) -> tuple[str, list[Any]]:
    """The sentence that reports a tool's result to the user, and the values of the result it reuses."""
    if "error" in result:
        return f"Sorry, that did not work: {result['error']}.", [result["error"]]
    sentence = SCENES[call["name"]].answer.format(**spoken_fields(call["arguments"]), **result)
    return sentence, list(result.values())


def _is_held_out(text: str) -> bool:
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


@dataclass(frozen=True)
class Dialogue:
    """One request and what follows: `calls` it asks for and their `results`, or else a direct `answer`."""

    kind: str
    text: str
    calls: tuple[dict[str, Any], ...]
    results: tuple[dict[str, Any], ...]
    answer: str


def _draw_dialogue(rng: random.Random, kind: str, offered: Sequence[str]) -> Dialogue | None:
    """A dialogue of this kind under the offered tools; None where the draw does not fit the kind."""
    if kind == "no_tool":
        text, answer = _chat(rng)
        return Dialogue(kind, text, (), (), answer)
    if kind == "no_fitting_tool":
        missing = rng.choice([name for name in SCENES if name not in offered])
        text, _ = _request(rng, missing)
        return Dialogue(kind, text, (), (), f"Sorry, I have no tool to {SCENES[missing].purpose}.")
    num_calls = 2 if kind == "two_calls" or (kind == "tool_result" and rng.random() < 0.25) else 1
    texts, calls = zip(*(_request(rng, rng.choice(offered)) for _ in range(num_calls)), strict=True)
    results = tuple(json.loads(call_tool(call["name"], call["arguments"])) for call in calls)
    failed = any("error" in result for result in results)
    if (kind == "tool_error" and not failed) or (kind == "tool_result" and failed) or calls[1:] == calls[:1]:
        return None
    sentences = [_told(call, result)[0] for call, result in zip(calls, results, strict=True)]
    return Dialogue(kind, " Also: ".join(texts), calls, results, " ".join(sentences))


def fitting_dialogue(rng: random.Random, kind: str, split: str, num_offered: tuple[int, int]) -> tuple[Dialogue, list[str]]:
    """Draw offered tools (at least and at most so many) and a dialogue until the kind and the side are right."""
    while True:
        offered = rng.sample(tuple(SCENES), rng.randint(*num_offered))
        dialogue = _draw_dialogue(rng, kind, offered)
        if dialogue and _is_held_out(dialogue.text) == (split == "held_out"):
            return dialogue, offered


def generate(num: int, seed: int, split: str) -> Iterator[dict[str, Any]]:
    """`num` prompt rows of one side of the world.

    split: "train" or "held_out". A row has `id`, `messages`, `tools` (both OpenAI form) and `kind`; it ends with a user
    or tool message. Its gold fields say what the next assistant turn must be: `gold_calls` (empty: no call),
    `gold_answer` (its text) and `gold_values` (the values of the tool results which that text reuses).
    """
    rng = seeded(seed, split)
    for index in range(num):
        kind = _draw_kind(rng, KINDS)
        dialogue, offered = fitting_dialogue(rng, kind, split, (2, 4))
        user, *rest = messages_of(dialogue)
        row = {"id": f"{split}-{seed}-{index}", "kind": kind, "tools": openai_tools(offered)}
        if kind in ("one_call", "two_calls"):
            yield row | {"messages": [user], "gold_calls": list(dialogue.calls), "gold_answer": "", "gold_values": []}
            continue
        values = [
            value for call, result in zip(dialogue.calls, dialogue.results, strict=True) for value in _told(call, result)[1]
        ]
        gold = {"gold_calls": [], "gold_answer": dialogue.answer, "gold_values": values}
        yield row | {"messages": [user, *rest[:-1]]} | gold


def generate_conversations(num: int, seed: int, split: str, max_requests: int = 3) -> Iterator[dict[str, Any]]:
    """`num` whole conversations (`id`, `messages`, `tools`) of 1 to max_requests requests, assistant turns included."""
    rng = seeded(seed, split)
    for index in range(num):
        dialogue, offered = fitting_dialogue(rng, _draw_kind(rng, TEACHING_KINDS), split, (1, 4))
        messages = messages_of(dialogue)
        for _ in range(rng.randrange(max_requests)):
            further = _draw_dialogue(rng, _draw_kind(rng, TEACHING_KINDS), offered)
            if further and _is_held_out(further.text) == (split == "held_out"):
                messages += messages_of(further)
        yield {"id": f"{split}-{seed}-{index}", "tools": openai_tools(offered), "messages": messages}


def seeded(seed: int, split: str) -> random.Random:
    if split not in ("train", "held_out"):
        raise ValueError(f"split is {split!r}, expected 'train' or 'held_out'")
    return random.Random(f"{seed}/{split}")


def _draw_kind(rng: random.Random, shares: dict[str, float]) -> str:
    return rng.choices(tuple(shares), tuple(shares.values()))[0]


def messages_of(dialogue: Dialogue) -> list[dict[str, Any]]:
    """The dialogue from the user's text to the closing answer, in the OpenAI form."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": dialogue.text}]
    if dialogue.calls:
        functions = [call | {"arguments": json.dumps(call["arguments"], ensure_ascii=False)} for call in dialogue.calls]
        tool_calls = [{"id": f"call_{i}", "type": "function", "function": f} for i, f in enumerate(functions)]
        messages.append({"role": "assistant", "content": None, "tool_calls": tool_calls})
        for i, result in enumerate(dialogue.results):
            content = json.dumps(result, ensure_ascii=False)
            messages.append({"role": "tool", "tool_call_id": f"call_{i}", "content": content})
    return [*messages, {"role": "assistant", "content": dialogue.answer}]


def write_prompts(path: Path, num: int, seed: int, split: str) -> None:
    """Write `num` prompt rows as JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        for row in generate(num, seed, split):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Write train.jsonl and held_out.jsonl."""
    parser = argparse.ArgumentParser(prog="python -m raykd.demo.corpus", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--train", type=int, default=4000, help="number of training prompts")
    parser.add_argument("--held-out", type=int, default=300, help="number of held-out prompts")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    write_prompts(options.out / "train.jsonl", options.train, options.seed, "train")
    write_prompts(options.out / "held_out.jsonl", options.held_out, options.seed, "held_out")


if __name__ == "__main__":
    main()
