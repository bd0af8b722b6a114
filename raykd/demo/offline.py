"""The demo world's rows that hold their responses: pairs in code mode, judged refinements, reasoning in steps.

In:  how many, seed, side ("train" or "held_out"). Out: rows for `data.offline` (fields: raykd/data/offline_fields.py), as
dictionaries or as a JSONL file (`python -m raykd.demo.offline --out FILE --rows N --seed S`).

Live prompts (`corpus.py`) give the losses of tool use their data; these rows give it to code_mode_preference, halt,
self_evaluation and the latent curriculum. Text that nobody should imitate has `response_source` "student": only heads learn
from it.
"""

import random
import re
from collections.abc import Iterator
from typing import Any

from raykd.demo.code_mode import generate_pairs
from raykd.demo.corpus import SCENES, Dialogue, fitting_dialogue, messages_of, seeded
from raykd.demo.registry import openai_tools
from raykd.demo.write import write_rows

WISHES = ("Please check that.", "Can you improve your answer?", "Is that all? Try again.")
NO_ANSWER, WRONG_ANSWER, RIGHT_ANSWER = 0, 1, 2
SCORES = (0.1, 0.5, 0.95)
"""Judge's score of a draft by how good it is."""
MAX_LOOPS = 3


def generate_rows(num: int, seed: int, split: str) -> Iterator[dict[str, Any]]:
    """About `num` rows of one side of the world, a third of each kind, in turn."""
    rng = seeded(seed, split)
    pairs = generate_pairs(num // 3, seed, split)
    for index, pair in enumerate(pairs):
        name = f"{split}-{seed}-{index}"
        yield pair
        yield {"id": f"{name}-refinement"} | _refinement(rng, split)
        yield {"id": f"{name}-reasoning"} | _reasoning(rng, split)


def _refinement(rng: random.Random, split: str) -> dict[str, Any]:
    """Drafts of an answer, each judged; it goes on until the cap, or until a right draft has come twice."""
    dialogue, offered = fitting_dialogue(rng, "tool_result", split, (2, 4))
    *before, _ = messages_of(dialogue)
    level, scores, messages = rng.choices((0, 1, 2), (1, 1, 2))[0], [], before
    for loop in range(MAX_LOOPS):
        scores.append(round(SCORES[level] + rng.uniform(-0.02, 0.02), 3))
        draft = {"role": "assistant", "content": _draft(rng, dialogue, level), "loop": loop, "judge_score": scores[-1]}
        messages = [*messages, draft | {"caws_tier": 3, "max_loops": MAX_LOOPS}]
        if len(scores) > 1 and min(scores[-2:]) > 0.9:
            break
        level = min(RIGHT_ANSWER, level + rng.choice((0, 1, 1)))
        if loop < MAX_LOOPS - 1:
            messages = [*messages, {"role": "user", "content": rng.choice(WISHES)}]
    return {"tools": openai_tools(offered), "messages": messages, "response_source": "student"}


def _draft(rng: random.Random, dialogue: Dialogue, level: int) -> str:
    if level == NO_ANSWER:
        return "Sorry, I do not know."
    if level == RIGHT_ANSWER:
        return dialogue.answer
    other_digits = re.sub(r"\d", lambda digit: str((int(digit[0]) + rng.randint(1, 9)) % 10), dialogue.answer)
    return other_digits.replace(" is ", " was ")


def _reasoning(rng: random.Random, split: str) -> dict[str, Any]:
    """A call that two steps of reasoning lead to."""
    dialogue, offered = fitting_dialogue(rng, "one_call", split, (2, 4))
    user, call, *_ = messages_of(dialogue)
    name = dialogue.calls[0]["name"]
    steps = f"Step 1: I am asked to {SCENES[name].purpose}.\nStep 2: The tool is {name}.\n"
    messages = [user | {"content": f"Think first. {dialogue.text}"}, call | {"content": steps}]
    return {"tools": openai_tools(offered), "messages": messages, "response_source": "gold"}


def main(argv: list[str] | None = None) -> None:
    """Write a JSONL file of rows that hold their responses."""
    write_rows(generate_rows, argv, module="offline", description=main.__doc__, unit="rows", default=900)


if __name__ == "__main__":
    main()
