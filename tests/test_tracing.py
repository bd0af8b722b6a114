import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from raykd.tracing import ProgressDisplay, Tracer, read_metrics, summary_line


def lines(folder: Path) -> list[dict]:
    def refuse(constant):
        raise AssertionError(f"{constant} in strict JSON")

    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def plain_console() -> Console:
    return Console(file=io.StringIO(), width=200)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_every_line_is_strict_json_and_numbers_that_are_not_finite_become_null(tmp_path):
    with Tracer(tmp_path) as tracer:
        tracer.log(1, {"loss/total": 0.5, "loss/kd": float("nan"), "grad_norm": float("inf"), "x": None, "n": 3})
    entry = lines(tmp_path)[-1]
    assert entry["step"] == 1
    assert entry["time"] > 0
    assert (entry["loss/total"], entry["n"]) == (0.5, 3)
    assert entry["loss/kd"] is entry["grad_norm"] is entry["x"] is None


def test_an_entry_is_on_disk_before_the_tracer_is_closed(tmp_path):
    with Tracer(tmp_path) as tracer:
        tracer.log(1, {"loss/total": 0.5})
        assert lines(tmp_path)[-1]["loss/total"] == 0.5


def test_a_tensor_is_refused_instead_of_synchronising_the_device(tmp_path):
    import torch

    with Tracer(tmp_path) as tracer, pytest.raises(TypeError, match="'loss/total' is a Tensor"):
        tracer.log(1, {"loss/total": torch.tensor(0.5)})  # type: ignore[dict-item]  (the mistake)


def test_a_resumed_run_appends_and_its_entries_supersede_those_after_the_restored_step(tmp_path):
    with Tracer(tmp_path) as tracer:
        for step in (10, 20, 30):
            tracer.log(step, {"loss/total": float(step)})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with Tracer(tmp_path, start_step=15) as tracer:
        assert [entry["step"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == [10]
        tracer.log(25, {"loss/total": 2.5})
        tracer.log(30, {"loss/total": 3.0})
    assert (tmp_path / "metrics.jsonl").read_bytes().startswith(before)
    entries = read_metrics(tmp_path / "metrics.jsonl")
    assert [(entry["step"], entry["loss/total"]) for entry in entries] == [(10, 10.0), (25, 2.5), (30, 3.0)]


def test_training_and_validation_entries_of_a_step_are_read_as_one(tmp_path):
    with Tracer(tmp_path) as tracer:
        tracer.log(5, {"loss/kd": 0.1})
        tracer.log(5, {"validation/loss/kd": 0.2})
    (entry,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (entry["loss/kd"], entry["validation/loss/kd"]) == (0.1, 0.2)


def test_a_line_torn_by_a_crash_is_skipped_by_the_reader_and_cut_off_on_resume(tmp_path):
    with Tracer(tmp_path) as tracer:
        tracer.log(1, {"loss/total": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss/tot')
    assert [entry["step"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    with Tracer(tmp_path, start_step=1) as tracer:
        tracer.log(2, {"loss/total": 2.0})
    assert [entry["step"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("line", ['{"step": 1, "x": NaN}', "no json", "[1]", '{"x": 1}'])
def test_a_line_that_is_no_entry_is_reported_with_its_number(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "time": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        read_metrics(path)


def test_tensorboard_files_read_back_with_superseded_steps_hidden(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Tracer(tmp_path, tensorboard=True, config={"run": {"seed": 1}}) as tracer:
        tracer.log(1, {"loss/kd": 0.5, "grad_norm": float("nan")})
        tracer.log(2, {"loss/kd": 9.0})
    with Tracer(tmp_path, tensorboard=True, start_step=1) as tracer:
        tracer.log(2, {"loss/kd": 0.25})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/kd")] == [(1, 0.5), (2, 0.25)]
    assert "grad_norm" not in events.Tags()["scalars"]
    (config,) = events.Tensors("config/text_summary")[-1:]
    assert b"```json" in config.tensor_proto.string_val[0]


def test_wandb_writes_offline_without_an_account(tmp_path):
    script = (
        "import sys; from raykd.tracing import Tracer\n"
        "with Tracer(sys.argv[1], wandb_project='p', config={'run': {'seed': 1}}) as tracer:\n"
        "    tracer.log(3, {'loss/kd': 0.5, 'x': float('nan')})\n"
        "    tracer.log(2, {'loss/kd': 0.25})\n"
    )
    keep = {name: os.environ[name] for name in ("PATH",)}
    environment = {**keep, "WANDB_MODE": "offline", "HOME": str(tmp_path / "home"), "PYTHONPATH": os.getcwd()}
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run")], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    (file,) = (tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb")
    assert (tmp_path / "run" / "wandb_id.txt").read_text() in file.name
    # The transaction log keeps each value as JSON text behind its name, in history and summary; the step may go back.
    logged = re.findall(rb"loss/kd\W{1,4}(0\.\d+)", file.read_bytes())
    assert list(dict.fromkeys(logged)) == [b"0.5", b"0.25"]
    assert b"NaN" not in file.read_bytes()


def test_the_summary_names_steps_throughput_waits_loss_and_accuracy():
    entry = {
        "step": 20,
        "speed/teacher_tokens_per_s": 1234.0,
        "speed/student_tokens_per_s": 987.6,
        "wait/teacher_s": 0.25,
        "wait/trainer_s": 0.0,
        "loss/total": 0.51234,
        "accuracy/tool_name": 0.987,
        "skipped_steps": 0,
        "grad_norm": None,
    }
    assert summary_line(entry, num_steps=100, eta_seconds=3675) == (
        "step 20/100 | ETA 1:01:15 | teacher 1.2k tok/s | student 988 tok/s | waited for teacher 0.25 s | "
        "for trainer 0.00 s | loss 0.5123 | tool names 98.7 %"
    )


def write(folder: Path, *entries: dict) -> None:
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)


def test_without_a_terminal_each_new_entry_is_one_plain_line_with_the_time_left(tmp_path):
    write(tmp_path, {"step": 10, "time": 50.0, "loss/total": 9.0})
    console = plain_console()
    with ProgressDisplay(tmp_path, 100, console) as display:
        write(tmp_path, {"step": 10, "time": 100.0}, {"step": 20, "time": 110.0, "loss/total": 0.5})
        display.poll()
        write(tmp_path, {"step": 40, "time": 130.0, "loss/total": 0.25})
    assert written(console) == "step 20/100 | ETA 1:20 | loss 0.5\nstep 40/100 | ETA 1:00 | loss 0.25\n"


def test_on_a_terminal_there_is_one_bar_that_ends_at_the_last_step(tmp_path):
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
    with ProgressDisplay(tmp_path, 40, console):
        write(tmp_path, {"step": 0, "time": 100.0}, {"step": 20, "time": 110.0, "loss/total": 0.5})
        write(tmp_path, {"step": 20, "time": 111.0, "validation/loss/kd": 0.1})
    assert "step 20/40 | ETA 0:11 | loss 0.5 | held-out kd 0.1" in written(console)
