"""The command line of what makes rows: `python -m raykd.demo.<module> --out FILE --<rows> N --seed S --split SIDE`.

In:  a function from how many, seed and side to rows. Out: a JSONL file.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def write_rows(
    generate: Callable[[int, int, str], Iterator[dict[str, Any]]],
    argv: list[str] | None,
    *,
    module: str,
    description: str | None,
    unit: str,
    default: int,
) -> None:
    """Write the rows that the command line asks for; `unit` names what `generate` counts, and so the option."""
    parser = argparse.ArgumentParser(prog=f"python -m raykd.demo.{module}", description=description)
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument(f"--{unit}", dest="num", type=int, default=default, help=f"number of {unit}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("train", "held_out"), default="train")
    options = parser.parse_args(argv)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", encoding="utf-8") as file:
        for row in generate(options.num, options.seed, options.split):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
