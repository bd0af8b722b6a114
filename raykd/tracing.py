"""Where metrics go, and the one line that a user watches.

In:  `Tracer.log(step, metrics)` from the rank-0 train worker: numbers by name, already on the host.
Out: `<run>/metrics.jsonl` (always), Ray's metrics, TensorBoard files, Weights & Biases, the console; `read_metrics` reads
     the first back, `ProgressDisplay` follows it in the driver.

metrics.jsonl is strict JSON, one object a line, appended. A value that is not finite is written as null (and left out of the
other sinks): it shows that the metric was there and was no number. A run that goes on from a checkpoint writes an entry with
the restored step alone; entries of later steps before it stay in the file but are superseded, and `read_metrics` drops them.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import ray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from raykd.ray_metrics import RayMetrics

Metrics = Mapping[str, float | int | None]

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


# --- sinks: each is made with its folder, takes a step's numbers, and is closed -------------------------------------------


class Sink(Protocol):
    """A place where numbers go. `metrics` holds finite numbers, and None for those that were not."""

    def log(self, step: int, metrics: Metrics) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """metrics.jsonl: one line per entry, on disk as soon as `log` returns."""

    def __init__(self, run_folder: Path) -> None:
        path = run_folder / METRICS_FILE
        _drop_torn_line(path)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Metrics) -> None:
        entry = {"step": step, "time": round(time.time(), 3), **metrics}
        self._file.write(json.dumps(entry, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    """TensorBoard event files. Entries of steps after `start_step` that an earlier attempt wrote are hidden."""

    def __init__(self, run_folder: Path, config: Mapping[str, Any], start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import; the driver never needs it

        folder = run_folder / TENSORBOARD_FOLDER
        purge_step = start_step + 1 if folder.exists() else None
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)
        self._writer.add_text("config", "```json\n" + json.dumps(config, indent=2, default=str) + "\n```")

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Weights & Biases. Offline (WANDB_MODE=offline) it needs no account and writes into `<run>/wandb`.

    The step is a metric of its own: W&B's internal step may not go back, which a resumed run does.
    """

    def __init__(self, run_folder: Path, project: str, config: Mapping[str, Any]) -> None:
        import wandb  # slow to import; only runs that ask for it pay

        id_file = run_folder / "wandb_id.txt"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        offline = os.environ.get("WANDB_MODE") == "offline"
        self._run = wandb.init(
            project=project,
            name=run_folder.name,
            id=id_file.read_text(encoding="utf-8").strip(),
            resume=None if offline else "allow",  # offline runs cannot be looked up; syncing joins them by id
            dir=str(run_folder),
            config=dict(config),
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log({"step": step, **{name: value for name, value in metrics.items() if value is not None}})

    def close(self) -> None:
        self._run.finish()


class RaySink:
    """Gauges among Ray's metrics, `raykd_<name>`. Of a process of Ray's it is always one of the sinks."""

    def __init__(self, run_folder: Path, config: Mapping[str, Any]) -> None:
        self._metrics = RayMetrics(run_folder.name, str(config.get("stage", "kd")))

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in {"step": step, **metrics}.items():
            if value is not None:
                self._metrics.set(name, value)

    def close(self) -> None:
        self._metrics.close()


class ConsoleSink:
    """One plain line per entry."""

    def __init__(self, console: Console, num_steps: int | None = None) -> None:
        self._console = console
        self._num_steps = num_steps

    def log(self, step: int, metrics: Metrics) -> None:
        self._console.print(summary_line({"step": step, **metrics}, self._num_steps), highlight=False, soft_wrap=True)

    def close(self) -> None:
        pass


class Tracer:
    """Hands every step's numbers to the sinks. A context manager; one per run, in the rank-0 worker."""

    def __init__(
        self,
        run_folder: Path | str,
        *,
        config: Mapping[str, Any] | None = None,
        tensorboard: bool = False,
        wandb_project: str | None = None,
        console: Console | None = None,
        start_step: int = 0,
    ) -> None:
        """Open the sinks.

        `config` is the resolved configuration (shown by TensorBoard and W&B). `start_step` is the step of the restored
        checkpoint: where metrics of later steps exist they are superseded by what is logged from now on.
        """
        folder = Path(run_folder)
        folder.mkdir(parents=True, exist_ok=True)
        jsonl = JsonlSink(folder)
        jsonl.log(start_step, {})
        self._sinks: list[Sink] = [jsonl]
        if ray.is_initialized():
            self._sinks.append(RaySink(folder, config or {}))
        if tensorboard:
            self._sinks.append(TensorBoardSink(folder, config or {}, start_step))
        if wandb_project is not None:
            self._sinks.append(WandbSink(folder, wandb_project, config or {}))
        if console is not None:
            self._sinks.append(ConsoleSink(console))

    def log(self, step: int, metrics: Metrics) -> None:
        """Write one entry. Numbers only; a number that is not finite is recorded as null.

        Raises TypeError for a value that is no Python number (a tensor here would hide a device sync).
        """
        finite = {name: _finite(name, value) for name, value in metrics.items()}
        for sink in self._sinks:
            sink.log(step, finite)

    def close(self) -> None:
        while self._sinks:
            self._sinks.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _finite(name: str, value: float | int | None) -> float | int | None:
    if value is None or isinstance(value, bool | int):
        return value
    if not isinstance(value, float):
        raise TypeError(
            f"metric {name!r} is a {type(value).__name__}; expected a Python number: convert it once, where the step's "
            "numbers are brought to the host"
        )
    return float(value) if math.isfinite(value) else None


def _drop_torn_line(path: Path) -> None:
    """Cut off a last line without newline: its writer died in the middle of it."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        data = file.read()
        if not data.endswith(b"\n"):
            file.truncate(data.rfind(b"\n") + 1)


# --- reading back ---------------------------------------------------------------------------------------------------------


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """Read a metrics.jsonl: one dict per step, ascending; what a later attempt superseded is left out.

    Entries of one step (training, validation) are merged, the last value of a name counts. An entry of an earlier step than
    the one before it means that the run went on from there: later steps read so far are dropped. A last line without newline
    is still being written and is left out. Raises FileNotFoundError, and ValueError with the line for anything that is not
    a JSON object with an integer `step`.
    """
    by_step: dict[int, dict[str, Any]] = {}
    last = -1
    for entry in _entries(Path(path)):
        step = entry["step"]
        if step < last:
            by_step = {kept: value for kept, value in by_step.items() if kept <= step}
        by_step.setdefault(step, {}).update(entry)
        last = step
    return [by_step[step] for step in sorted(by_step) if by_step[step].keys() - {"step", "time"}]


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                yield _parse_entry(line, f"{path}:{number}")


def _parse_entry(line: bytes, where: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        entry = json.loads(line, parse_constant=refuse)
    except ValueError as error:
        raise ValueError(f"{where}: not a strict JSON line ({error}); remove it or restore the file") from error
    if not isinstance(entry, dict) or type(entry.get("step")) is not int:
        raise ValueError(f"{where}: expected an object with an integer 'step', found {line[:80]!r}; remove the line")
    return entry


# --- what the user watches ------------------------------------------------------------------------------------------------


def summary_line(entry: Mapping[str, Any], num_steps: int | None = None, eta_seconds: float | None = None) -> str:
    """One entry of metrics.jsonl in words: steps, ETA, throughput, waits, loss, accuracy on tool names.

    >>> summary_line({"step": 20, "loss/total": 0.51234, "wait/teacher_s": 0.25}, num_steps=100, eta_seconds=75)
    'step 20/100 | ETA 1:15 | waited for teacher 0.25 s | loss 0.5123'
    """
    parts = [f"step {entry['step']}" + (f"/{num_steps}" if num_steps else "")]
    if eta_seconds is not None:
        parts.append("ETA " + _clock(eta_seconds))
    parts += [words(entry[key]) for key, words in _WORDS.items() if entry.get(key) is not None]
    return " | ".join(part for part in parts if part)


_WORDS = {
    "speed/teacher_tokens_per_s": lambda x: f"teacher {_compact(x)} tok/s",
    "speed/student_tokens_per_s": lambda x: f"student {_compact(x)} tok/s",
    "wait/teacher_s": lambda x: f"waited for teacher {x:.2f} s",
    "wait/trainer_s": lambda x: f"for trainer {x:.2f} s",
    "loss/total": lambda x: f"loss {x:.4g}",
    "accuracy/tool_name": lambda x: f"tool names {100 * x:.1f} %",
    "validation/loss/total": lambda x: f"held-out loss {x:.4g}",
    "validation/loss/kd": lambda x: f"held-out kd {x:.4g}",
    "validation/accuracy/tool_name": lambda x: f"held-out tool names {100 * x:.1f} %",
    "skipped_steps": lambda x: f"{x} steps skipped" if x else "",
}


def _compact(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class ProgressDisplay:
    """Follows metrics.jsonl in a thread of the driver: one progress bar on a terminal, one line per entry elsewhere.

    A context manager around the whole run. `num_steps` None: the number of steps is unknown, no ETA. Entries that are in
    the file at the start belong to an earlier attempt and only set the bar's start.
    """

    POLL_SECONDS = 0.5

    def __init__(self, run_folder: Path | str, num_steps: int | None, console: Console | None = None) -> None:
        self._path = Path(run_folder) / METRICS_FILE
        self._num_steps = num_steps
        self._console = console or Console()
        self._offset = self._path.stat().st_size if self._path.exists() else 0
        self._shown: dict[str, Any] = {"step": 0}
        self._pace: tuple[int, float] | None = None  # first step and time seen since the last (re)start
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)
        self._bar = Progress(BarColumn(bar_width=20), TextColumn("{task.description}", markup=False), console=self._console)
        self._task = self._bar.add_task("waiting for the first step", total=num_steps)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar.start()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self.poll()
        if self._console.is_terminal:
            self._bar.stop()

    def _follow(self) -> None:
        while not self._stop.wait(self.POLL_SECONDS):
            self.poll()

    def poll(self) -> None:
        """Show the entries that were completed since the last call."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                self._show(_parse_entry(line, str(self._path)))

    def _show(self, entry: dict[str, Any]) -> None:
        step = entry["step"]
        restarted = entry.keys() <= {"step", "time"}
        if restarted or self._pace is None:
            self._pace = (step, entry["time"])
        eta = self._eta(step, entry["time"])
        if self._console.is_terminal:
            # Validation entries come in between: what they lack stays on show.
            self._shown.update(entry)
            text = summary_line(self._shown, self._num_steps, eta)
            self._bar.update(self._task, completed=step, description=text)
        elif not restarted:
            self._console.print(summary_line(entry, self._num_steps, eta), highlight=False, soft_wrap=True)

    def _eta(self, step: int, now: float) -> float | None:
        """Seconds to the last step at the pace since the last (re)start; None while there is no pace."""
        assert self._pace is not None, "the pace is set before it is used"
        first_step, first_time = self._pace
        if self._num_steps is None or step <= first_step:
            return None
        return (self._num_steps - step) * (now - first_time) / (step - first_step)


def quiet_ray() -> dict[str, str]:
    """Switch Ray Data's and Ray Train's own progress noise off, unless the user's environment says otherwise.

    Call before ray.data is imported. Returns the environment variables, for the runtime environment of the workers. Ray
    Train's controller takes its level from `RunConfig(logging_config=LoggingConfig(log_level="WARNING"))` besides.
    """
    wanted = {
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_DATA_LOG_LEVEL": "WARNING",
    }
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return {name: os.environ[name] for name in wanted}
