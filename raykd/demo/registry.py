"""The tools of the demo world: JSON Schemas short enough for a tiny model's prompt, and functions that answer calls.

In: a tool's name and its arguments. Out: the tool's result as a JSON string, the same on every machine and every day.
Together the schemas cover strings, unicode, integers, floats, booleans, enums, arrays, a nested object and optional
arguments.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

CONDITIONS = ("sunny", "cloudy", "rainy", "snowy", "windy", "foggy")
CURRENCIES = ("USD", "EUR", "GBP", "JPY", "CHF", "INR")
LANGUAGES = ("french", "german", "spanish", "japanese")
ROOMS = ("kitchen", "bedroom", "office", "bathroom")
TRANSLATIONS = {
    "good morning": ("bonjour", "guten Morgen", "buenos días", "おはよう"),
    "thank you": ("merci", "danke schön", "gracias", "ありがとう"),
    "see you tomorrow": ("à demain", "bis morgen", "hasta mañana", "また明日"),
    "the soup is hot": ("la soupe est chaude", "die Suppe ist heiß", "la sopa está caliente", "スープが熱い"),
    "where is the station": ("où est la gare", "wo ist der Bahnhof", "dónde está la estación", "駅はどこ"),
    "happy birthday": ("joyeux anniversaire", "alles Gute", "feliz cumpleaños", "誕生日おめでとう"),
}


@dataclass(frozen=True)
class Tool:
    """One tool: what the model is told (`name`, `description`, `parameters`) and what a call returns.

    `answer(arguments, draw)` makes the result; `draw(n)` is an integer in [0, n) fixed by the call. `errors` are the
    messages with which about one call in eight fails.
    """

    name: str
    description: str
    parameters: dict[str, Any]
    answer: Callable[[dict[str, Any], Callable[[int], int]], dict[str, Any]]
    errors: tuple[str, ...]


def _object(required: int, **properties: dict[str, Any]) -> dict[str, Any]:
    """An object schema whose first `required` properties must be given."""
    return {"type": "object", "properties": properties, "required": list(properties)[:required]}


_STRING, _INTEGER, _NUMBER, _BOOLEAN = ({"type": t} for t in ("string", "integer", "number", "boolean"))


def _enum(values: tuple[str, ...]) -> dict[str, Any]:
    return {"type": "string", "enum": list(values)}


def _array(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _translation(arguments: dict[str, Any]) -> str:
    """From the phrase book; a text it does not know comes back unchanged."""
    phrases = TRANSLATIONS.get(arguments["text"])
    return phrases[LANGUAGES.index(arguments["language"])] if phrases else arguments["text"]


TOOLS: tuple[Tool, ...] = (
    Tool(
        "get_weather",
        "Weather of a city",
        _object(1, city=_STRING, unit=_enum(("celsius", "fahrenheit"))),
        lambda a, draw: {"temperature": draw(35) - 5, "condition": CONDITIONS[draw(6)]},
        ("city not found", "no weather data"),
    ),
    Tool(
        "convert_currency",
        "Convert money",
        _object(3, amount=_NUMBER, source=_enum(CURRENCIES), target=_enum(CURRENCIES)),
        lambda a, draw: {"converted": draw(90000) / 100},
        ("rate not available",),
    ),
    Tool(
        "sum_numbers",
        "Add numbers",
        _object(1, numbers=_array(_NUMBER)),
        lambda a, draw: {"sum": round(sum(a["numbers"]), 6)},
        ("calculator is busy",),
    ),
    Tool(
        "search_flights",
        "Find a flight",
        _object(2, origin=_STRING, destination=_STRING, max_price=_INTEGER, direct=_BOOLEAN),
        lambda a, draw: {"flight": f"{('LX', 'BA', 'QF', 'AZ')[draw(4)]}{100 + draw(900)}", "price": 60 + draw(900)},
        ("no flight found", "airport is closed"),
    ),
    Tool(
        "book_table",
        "Book a restaurant",
        _object(3, restaurant=_STRING, guests=_INTEGER, time=_STRING, outdoor=_BOOLEAN),
        lambda a, draw: {"booking": f"R{1000 + draw(9000)}"},
        ("no table free", "restaurant is closed"),
    ),
    Tool(
        "send_message",
        "Send a text message",
        _object(2, recipient=_STRING, text=_STRING, urgent=_BOOLEAN),
        lambda a, draw: {"message": f"M{1000 + draw(9000)}"},
        ("recipient not found",),
    ),
    Tool(
        "create_event",
        "Add to the calendar",
        _object(2, title=_STRING, date=_STRING, guests=_array(_STRING)),
        lambda a, draw: {"event": f"E{100 + draw(900)}"},
        ("calendar is full", "date not valid"),
    ),
    Tool(
        "translate_text",
        "Translate a text",
        _object(2, text=_STRING, language=_enum(LANGUAGES)),
        lambda a, draw: {"translation": _translation(a)},
        ("language not available",),
    ),
    Tool(
        "set_thermostat",
        "Heat a room",
        _object(2, room=_enum(ROOMS), degrees=_NUMBER),
        lambda a, draw: {"minutes": 2 + draw(58)},
        ("room not connected",),
    ),
    Tool(
        "order_item",
        "Order from the shop",
        _object(3, item=_STRING, quantity=_INTEGER, address=_object(2, street=_STRING, city=_STRING)),
        lambda a, draw: {"order": f"A{1000 + draw(9000)}", "days": 1 + draw(9)},
        ("item is sold out", "address not found"),
    ),
    Tool(
        "get_stock_price",
        "Price of a share",
        _object(1, symbol=_STRING),
        lambda a, draw: {"price": draw(50000) / 100},
        ("symbol not found", "market is closed"),
    ),
    Tool(
        "play_music",
        "Play an artist",
        _object(1, artist=_STRING, volume=_INTEGER, shuffle=_BOOLEAN),
        lambda a, draw: {"songs": 2 + draw(80)},
        ("artist not found",),
    ),
)
_BY_NAME = {tool.name: tool for tool in TOOLS}


def openai_tool(name: str) -> dict[str, Any]:
    """The tool in the OpenAI form, as a chat template takes it."""
    tool = _BY_NAME[name]
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


def openai_tools(names: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """The named tools (default: all of them) in the OpenAI form, in the order asked for."""
    return [openai_tool(name) for name in (tuple(_BY_NAME) if names is None else names)]


def call_tool(name: str, arguments: dict[str, Any]) -> str:
    """Run a tool. Returns a JSON object as text: its result, or {"error": reason} when the call fails.

    The result is fixed by a hash of the call; nothing else (no clock, no state) enters. `arguments` must satisfy the
    tool's schema. An unknown tool is an error of the call, as a model may invent one.
    """
    tool = _BY_NAME.get(name)
    if tool is None:
        return json.dumps({"error": f"no tool named {name}"}, ensure_ascii=False)
    key = json.dumps([name, arguments], ensure_ascii=False, sort_keys=True).encode()
    state = int.from_bytes(hashlib.sha256(key).digest(), "big")

    def draw(n: int) -> int:
        nonlocal state
        state, value = divmod(state, n)
        return value

    failed = draw(8) == 0
    result = {"error": tool.errors[draw(len(tool.errors))]} if failed else tool.answer(arguments, draw)
    return json.dumps(result, ensure_ascii=False)
