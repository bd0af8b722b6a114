"""Faults on purpose, for the crash tests: RAYKD_FAULT="teacher:exit@batch=3;once=/tmp/struck worker:exit@step=5".

In:  the environment variable RAYKD_FAULT, `<component>:<action>@<key>=<number>[;once=<file>]`, several with blanks between
     them; unset: no fault.
Out: Fault.strikes(<key>=value), asked by the component at the place where its fault would happen; the delay of a slow one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "RAYKD_FAULT"


@dataclass(frozen=True)
class Fault:
    """Strikes when `key` reaches `value`; with `once`, the first process to create that file alone is struck."""

    component: str
    action: str
    key: str
    value: int
    once: Path | None = None

    @staticmethod
    def parse(text: str) -> Fault:
        """The fault a text describes. Raises ValueError where it describes none."""
        what, _, once = text.partition(";once=")
        component, colon, rest = what.partition(":")
        action, at, condition = rest.partition("@")
        key, equals, value = condition.partition("=")
        if not (colon and at and equals and value.lstrip("-").isdigit()):
            raise ValueError(f"{VARIABLE}={text!r}; expected <component>:<action>@<key>=<number>[;once=<file>]")
        return Fault(component, action, key, int(value), Path(once) if once else None)

    def strikes(self, **progress: int) -> bool:
        """Whether the fault happens now; the keyword names what is counted, as in `batch=3`."""
        if progress.get(self.key) != self.value:
            return False
        if self.once is None:
            return True
        try:
            self.once.touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def planned_fault(component: str, action: str) -> Fault | None:
    """The fault that the environment plans for this component and action, if any."""
    return next(_planned(component, action), None)


def _planned(component: str, action: str) -> Iterator[Fault]:
    faults = map(Fault.parse, os.environ.get(VARIABLE, "").split())
    return (fault for fault in faults if (fault.component, fault.action) == (component, action))


def planned_delay(component: str) -> float:
    """Seconds by which every call or step of this process is slowed down, as `teacher:slow@ms=500` has it; asked once."""
    return next((fault.value / 1000 for fault in _planned(component, "slow") if fault.strikes(ms=fault.value)), 0.0)
