"""The demo world's answers to tool results, a row each: what stage answer learns.

In:  how many, seed, side. Out: rows of `input` and `target` (raykd/data/answer_generation.py), or a JSONL file
(`python -m raykd.demo.answers --out FILE --answers N --seed S --split SIDE`).
"""

from collections.abc import Iterator
from itertools import count, islice
from typing import Any

from raykd.demo.corpus import generate
from raykd.demo.write import write_rows

BATCH = 256


def generate_answers(num: int, seed: int, split: str) -> Iterator[dict[str, Any]]:
    """`num` rows (`id`, `input`, `target`) of prompts that end with a tool result, each with its gold answer.

    The prompts are those of `corpus.generate` with the seeds from 1000 * (seed + 1) on: other ones than the demo trains on.
    """
    rows = (row for further in count() for row in generate(BATCH, 1000 * (seed + 1) + further, split))
    for row in islice((row for row in rows if row["messages"][-1]["role"] == "tool"), num):
        *history, result = row["messages"]
        given = {"tools": row["tools"], "history": history, "tool_result": result["content"]}
        yield {"id": row["id"], "input": given, "target": row["gold_answer"]}


def main(argv: list[str] | None = None) -> None:
    """Write a JSONL file of answers to tool results."""
    write_rows(generate_answers, argv, module="answers", description=main.__doc__, unit="answers", default=2000)


if __name__ == "__main__":
    main()
