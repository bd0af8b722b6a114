"""How fast a model writes in its engine on the machine at hand: figures of that machine, and of no other.

In:  an engine (Teacher protocol) and prompts. Out: `Speed`, and `speed_facts`: numbers by name.

    tokens_per_s        completion tokens / second while all prompts are answered at once, their reading included
    first_token_s       from a request, alone in the engine and its prompt not seen before, to its first token
    first_call_s        the same to the end of its first valid call: first_token_s + its further tokens x seconds a token

The two times are medians over the timed prompts; `<name>_p95` is their 95th percentile. A model that never calls takes for
ever, and is not left out.
"""

from __future__ import annotations

import math
import os
import platform
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from teacher_serving.types import Teacher


class Timing(NamedTuple):
    """One prompt, asked alone."""

    first_token_s: float
    token_s: float  # each token after the first; 0 where there was none


class Speed(NamedTuple):
    """What the process of an engine measured."""

    timings: list[Timing]  # of the timed prompts, in order
    seconds: float  # for all prompts at once
    machine: str


def time_prompts(engine: Teacher, prompts: pa.Table) -> list[Timing]:
    """Ask one prompt after the other, after a warm-up. They must be new to the engine, which keeps what it has read."""
    if not prompts.num_rows:
        return []
    backwards = prompts.slice(0, 1).select(["uid"]).append_column("prompt_ids", [[prompts["prompt_ids"][0].as_py()[::-1]]])
    engine.generate(backwards)  # as long as the first one, and the beginning of none
    timings = []
    for row in range(prompts.num_rows):
        prompt = prompts.slice(row, 1)
        only_first = prompt.append_column("max_tokens", pa.array([1], pa.int32()))
        first_token_s, _ = _timed(engine, only_first)
        again_s, _ = _timed(engine, only_first)  # with the prompt read, as in the next request
        whole_s, num_tokens = _timed(engine, prompt)
        timings.append(Timing(first_token_s, max(whole_s - again_s, 0.0) / max(num_tokens - 1, 1)))
    return timings


def _timed(engine: Teacher, prompt: pa.Table) -> tuple[float, int]:
    """Seconds and tokens of one request."""
    began = time.perf_counter()
    answer = engine.generate(prompt)
    return time.perf_counter() - began, len(answer["output_ids"][0].values)


def speed_facts(speed: Speed, num_tokens: int, first_call_tokens: Sequence[float]) -> dict[str, float]:
    """The numbers above.

    Args:
        num_tokens: that all prompts were answered with.
        first_call_tokens: of the timed prompts, tokens until the first valid call, or infinity; empty: they need none.

    >>> speed = Speed([Timing(0.5, 0.1), Timing(0.3, 0.2)], 2.0, "")
    >>> speed_facts(speed, 100, [11, float("inf")])["first_call_s"]
    1.5
    """
    facts = {"tokens_per_s": num_tokens / speed.seconds}
    times = {"first_token_s": [timing.first_token_s for timing in speed.timings]}
    if first_call_tokens:
        pairs = zip(speed.timings, first_call_tokens, strict=True)
        times["first_call_s"] = [
            math.inf if math.isinf(tokens) else timing.first_token_s + (tokens - 1) * timing.token_s
            for timing, tokens in pairs
        ]
    for name, values in times.items():
        if values:
            middle, late = np.quantile(values, (0.5, 0.95), method="inverted_cdf")  # of an infinite one nothing is a mean
            facts |= {name: float(middle), f"{name}_p95": float(late)}
    return facts


def describe_machine(device: str, threads: int) -> str:
    """The hardware that an engine in this process computes on.

    >>> describe_machine("cpu", 1).startswith("1 of ")
    True
    """
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return f"{threads} of {os.cpu_count()} cores, {name[1] if name else platform.machine()}"
