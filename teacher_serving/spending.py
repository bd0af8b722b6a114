"""How fast and for how much a teacher behind an API may be asked.

In:  limits per second, a BudgetConfig, what each request may cost at most and what it has cost.
Out: waiting, or BudgetSpentError; a ledger file that the actors of a run, and runs one after the other, go by together.

Everything here belongs to one event loop: nothing is locked.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from teacher_serving.access import BudgetConfig


class BudgetSpentError(Exception):
    """A request was not made: it could pass the budget."""


@dataclass(frozen=True)
class Clock:
    """Time and chance; tests give their own."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    chance: Callable[[], float] = random.random  # in [0, 1)


class Pace:
    """At most so much a second, on average: what comes too early waits for its place in the row."""

    def __init__(self, per_s: float | None, clock: Clock) -> None:
        self._per_s = per_s
        self._clock = clock
        self._free_at = clock.now()

    async def take(self, amount: float) -> None:
        """Wait until so much more may be asked for."""
        if self._per_s is None:
            return
        now = self._clock.now()
        start = max(self._free_at, now)
        self._free_at = start + amount / self._per_s
        if start > now:
            await self._clock.sleep(start - now)

    def give_back(self, amount: float) -> None:
        """So much of what was taken has not been used."""
        if self._per_s is not None:
            self._free_at -= amount / self._per_s


class Spending:
    """Tokens that requests have cost, and those that requests under way may cost, against a budget.

    `ledger`: a file with a line `<prompt tokens> <completion tokens>` for every request, to which several processes append;
    None: this object's own requests count. Requests under way in another process are not seen before they end.
    """

    def __init__(self, budget: BudgetConfig, ledger: Path | None) -> None:
        self._budget = budget
        self._ledger = ledger
        self._position = 0  # bytes of the ledger that are read
        self._spent = (0, 0)  # prompt and completion tokens
        self._reserved = (0, 0)
        self._settled = asyncio.Condition()
        if ledger is not None:
            ledger.parent.mkdir(parents=True, exist_ok=True)

    @property
    def spent(self) -> tuple[int, int]:
        """Prompt and completion tokens, by all that share the ledger."""
        if self._ledger is not None and self._ledger.exists():
            with self._ledger.open("rb") as file:
                file.seek(self._position)
                lines = file.read()
            lines = lines[: lines.rfind(b"\n") + 1]  # another process may be in the middle of one
            self._position += len(lines)
            numbers = [int(number) for number in lines.split()]
            self._spent = (self._spent[0] + sum(numbers[::2]), self._spent[1] + sum(numbers[1::2]))
        return self._spent

    async def reserve(self, prompt: int, completion: int) -> None:
        """Begin a request of at most so many tokens, once it fits the budget whatever those under way will have cost.

        Raises BudgetSpentError where it does not fit even after them.
        """
        async with self._settled:
            while (problem := self._problem(prompt, completion)) is None and self._problem(
                prompt + self._reserved[0], completion + self._reserved[1]
            ):
                await self._settled.wait()
            if problem is not None:
                raise BudgetSpentError(problem)
            self._reserved = (self._reserved[0] + prompt, self._reserved[1] + completion)

    async def settle(self, reserved: tuple[int, int], used: tuple[int, int]) -> None:
        """A request has ended: it had reserved so many prompt and completion tokens, and used so many."""
        async with self._settled:
            self._reserved = (self._reserved[0] - reserved[0], self._reserved[1] - reserved[1])
            if self._ledger is None:
                self._spent = (self._spent[0] + used[0], self._spent[1] + used[1])
            elif any(used):
                with self._ledger.open("ab", buffering=0) as file:  # one write: lines of several processes do not mix
                    file.write(b"%d %d\n" % used)
            self._settled.notify_all()

    def _problem(self, prompt: int, completion: int) -> str | None:
        """What so many tokens more would pass, or None."""
        budget, spent = self._budget, self.spent
        tokens = sum(spent)
        if budget.max_tokens is not None and tokens + prompt + completion > budget.max_tokens:
            return (
                f"{tokens:,} tokens are spent of teacher.budget.max_tokens={budget.max_tokens:,}, and a prompt of {prompt} "
                f"may take {prompt + completion} more; raise it to go on, what is answered is kept"
            )
        if budget.max_cost is None:
            return None
        prices = (budget.prompt_price or 0.0, budget.completion_price or 0.0)
        cost, more = ((a * prices[0] + b * prices[1]) / 1e6 for a, b in (spent, (prompt, completion)))
        if cost + more > budget.max_cost:
            return (
                f"{cost:,.4g} is spent of teacher.budget.max_cost={budget.max_cost:,.4g}, and a prompt of {prompt} tokens "
                f"may cost {more:.2g} more; raise it to go on, what is answered is kept"
            )
        return None
