"""The demo world in code mode: the same task done by a short TypeScript program, and by direct tool calls.

In:  how many tasks, seed, side ("train" or "held_out"). Out: a pair of responses per task, as rows for `data.offline`
(fields: raykd/data/offline_fields.py), dictionaries or a JSONL file
(`python -m raykd.demo.code_mode --out FILE --tasks N --seed S`).

A program calls tools as `await tools.<name>({ ... })`, one after the other, and returns what the user is told; only that
comes back, so the tool results themselves never take room in the context. Programs use no more of TypeScript than
`run_program` understands. Tasks need two tools or more whose calls succeed.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from raykd.demo.corpus import SCENES, fitting_dialogue, seeded, spoken_fields
from raykd.demo.registry import call_tool, openai_tool, openai_tools
from raykd.demo.write import write_rows

_TYPES = {"string": "string", "integer": "number", "number": "number", "boolean": "boolean"}
_NAMES = ("first", "second", "third")
_CALL = re.compile(r"^const (\w+) = await tools\.(\w+)\((.*)\);$", re.MULTILINE)
_RETURN = re.compile(r"^return `(.*)`;$", re.MULTILINE)
_FIELD = re.compile(r"\$\{(\w+)\.(\w+)\}")


def typescript_api(names: Sequence[str]) -> str:
    """The named tools as a TypeScript declaration of `tools`."""
    lines = []
    for name in names:
        function = openai_tool(name)["function"]
        lines += [f"  // {function['description']}", f"  {name}(args: {_type(function['parameters'])}): Promise<any>;"]
    return "declare const tools: {\n" + "\n".join(lines) + "\n};"


def _type(schema: dict[str, Any]) -> str:
    """A JSON Schema of the registry as a TypeScript type."""
    if "enum" in schema:
        return " | ".join(json.dumps(value, ensure_ascii=False) for value in schema["enum"])
    if schema["type"] == "array":
        return f"{_type(schema['items'])}[]"
    if schema["type"] == "object":
        required = schema["required"]
        fields = (f"{name}{'' if name in required else '?'}: {_type(inner)}" for name, inner in schema["properties"].items())
        return f"{{ {'; '.join(fields)} }}"
    return _TYPES[schema["type"]]


def program(calls: Sequence[dict[str, Any]]) -> str:
    """Code that makes the calls in order and returns the sentences in which their results are told."""
    lines, sentences = [], []
    for variable, call in zip(_NAMES, calls, strict=False):
        arguments = json.dumps(call["arguments"], ensure_ascii=False)
        lines.append(f"const {variable} = await tools.{call['name']}({arguments});")
        answer = SCENES[call["name"]].answer
        results = {name: f"${{{variable}.{name}}}" for name in re.findall(r"\{(\w+)\}", answer)}
        sentences.append(answer.format(**results | spoken_fields(call["arguments"])))
    return "\n".join([*lines, f"return `{' '.join(sentences)}`;"])


def run_program(code: str) -> str:
    """What a program returns. Raises ValueError where it is not of the form that `program` writes."""
    results = {variable: json.loads(call_tool(name, json.loads(a))) for variable, name, a in _CALL.findall(code)}
    returned = _RETURN.search(code)
    if returned is None or len(results) != code.count("await "):
        raise ValueError(f"expected `const x = await tools.name({{...}});` and `return`, found:\n{code}")
    return _FIELD.sub(lambda field: str(results[field[1]][field[2]]), returned[1])


def generate_pairs(num_tasks: int, seed: int, split: str) -> Iterator[dict[str, Any]]:
    """`num_tasks` rows whose `teacher_text` is the assistant's turn in code and whose `rejected_text` is the one with calls.

    split: "train" or "held_out". Both are as the demo's chat template writes them. A row also has `id`, `messages`, `tools`,
    `response_source`, and the `answer` that the program returns.
    """
    rng = seeded(seed, split)
    for index in range(1, num_tasks + 1):
        dialogue, offered = fitting_dialogue(rng, "tool_result", split, (2, 4))
        while len(dialogue.calls) < 2:
            dialogue, offered = fitting_dialogue(rng, "tool_result", split, (2, 4))
        system = {"role": "system", "content": f"Tools may be called from TypeScript:\n{typescript_api(offered)}"}
        code = program(dialogue.calls)
        calls = (json.dumps(call, ensure_ascii=False) for call in dialogue.calls)
        yield {
            "id": f"{split}-{seed}-{index}",
            "tools": openai_tools(offered),
            "messages": [system, {"role": "user", "content": dialogue.text}],
            "teacher_text": f"```ts\n{code}\n```",
            "rejected_text": "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls),
            "response_source": "gold",
            "answer": run_program(code),
        }


def main(argv: list[str] | None = None) -> None:
    """Write a JSONL file of code-mode pairs."""
    write_rows(generate_pairs, argv, module="code_mode", description=main.__doc__, unit="tasks", default=500)


if __name__ == "__main__":
    main()
