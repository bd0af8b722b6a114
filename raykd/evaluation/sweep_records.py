"""What a sweep keeps of its trials, and of what the teacher did for them: small JSON files in its folder.

In:  the folder of the sweep: `trials/<n>/trial.json` beside what the run of the trial writes, `teacher.json`.
Out: TrialRecord, TeacherPass; the best of the trials.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from raykd.data.sources import REJECTED_FILE
from raykd.tracing import METRICS_FILE, read_metrics

TRIALS, RECORD, TEACHER = "trials", "trial.json", "teacher.json"
State = Literal["done", "stopped", "failed", "unfinished"]


@dataclass(frozen=True)
class TrialRecord:
    """One trial of a sweep, as its folder tells of it."""

    number: int
    settings: dict[str, Any]  # by path of the option
    state: State = "unfinished"  # stopped: by the scheduler
    message: str = ""  # why it failed
    attempts: int = 0  # times that it was started
    step: int = 0  # of the last value
    value: float | None = None  # the metric as reported last; None: never, or it was no number
    teacher_tokens: int = 0  # that the teacher wrote while this trial ran


@dataclass(frozen=True)
class TeacherPass:
    """What the teacher did for the sweep before the trials began."""

    rows: int  # prompts that it answered
    tokens: int  # of these answers
    cached_rows: int  # answers that were there before


def best_trial(records: Sequence[TrialRecord], mode: str) -> TrialRecord | None:
    """The best of the trials that ran to their end; of the stopped ones where none did; None without a value."""
    for state in ("done", "stopped"):
        valued = [(record.value, record) for record in records if record.state == state and record.value is not None]
        if valued:
            return (min if mode == "min" else max)(valued, key=lambda pair: pair[0])[1]
    return None


def share_rows(sweep: Path, trial: Path) -> None:
    """Give a trial the rows that the sweep has prepared, as hard links, so that it does not prepare them anew."""
    trial.mkdir(parents=True, exist_ok=True)
    for name in ("prompts", "offline"):
        if (sweep / name).is_dir() and not (trial / name).exists():
            shutil.copytree(sweep / name, trial / name, copy_function=os.link)
    if (sweep / REJECTED_FILE).is_file() and not (trial / REJECTED_FILE).exists():
        shutil.copyfile(sweep / REJECTED_FILE, trial / REJECTED_FILE)


def teacher_tokens(run: Path) -> int:
    """Tokens that a teacher wrote while a run trained."""
    entries = read_metrics(run / METRICS_FILE) if (run / METRICS_FILE).exists() else []
    total, last = 0.0, 0
    for entry in entries:
        if "seconds" in entry:
            total += entry["speed/teacher_tokens_per_s"] * entry["seconds"] * (entry["step"] - last)
            last = entry["step"]
    return round(total)


def read_record(folder: Path, number: int) -> TrialRecord:
    """What the folder of a trial says of it."""
    return TrialRecord(**json.loads((folder / TRIALS / str(number) / RECORD).read_text(encoding="utf-8")))


def read_records(folder: Path) -> list[TrialRecord]:
    """All trials of a sweep so far, by number."""
    files = (folder / TRIALS).glob(f"*/{RECORD}")
    return [read_record(folder, number) for number in sorted(int(file.parent.name) for file in files)]


def write_record(folder: Path, record: TrialRecord) -> None:
    """Keep what is known of a trial in its folder."""
    trial = folder / TRIALS / str(record.number)
    trial.mkdir(parents=True, exist_ok=True)
    _write_json(trial / RECORD, asdict(record))


def describe_record(record: TrialRecord, metric: str) -> str:
    """A trial in one line."""
    value = "no value" if record.value is None else f"{metric} {record.value:.5g}"
    options = ", ".join(f"{path}={format_value(value)}" for path, value in record.settings.items())
    return f"{record.state} at step {record.step}, {value}; {options}" + (f"; {record.message}" if record.message else "")


def read_teacher(folder: Path) -> TeacherPass | None:
    """What the teacher did for a sweep so far; None where it has not begun."""
    file = folder / TEACHER
    return TeacherPass(**json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None


def write_teacher(folder: Path, done: TeacherPass) -> None:
    """Keep what the teacher did."""
    _write_json(folder / TEACHER, asdict(done))


def _write_json(path: Path, value: Any) -> None:
    """Whole or not at all: a trial's record is read while another process writes it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False), encoding="utf-8")
    os.replace(temporary, path)


def format_value(value: Any) -> str:
    """A setting as text."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
