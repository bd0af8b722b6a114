"""A run's state on disk: whole or not there at all, checked when read, and enough to go on exactly.

In:  a `Snapshot` of the run. Out: `<run>/checkpoints/checkpoint-<step>/`, and the same parts back.

    student/                a plain Hugging Face folder with tokenizer: serve it, evaluate it, train on from it
    heads.safetensors       heads and projections, which are no part of the folder that is served; only where there are any
    optimizer.safetensors   Adam's moments by parameter name
    optimizer/              instead of it where the student is sharded: every worker's shares (torch.distributed.checkpoint)
    rng-<rank>.safetensors  random state of every rank
    ledger.npy              sorted int64 uids of the rows that went into optimizer steps since the run began
    state.json              step, epoch, counters, number of steps of the schedule, config, identity of the teacher
    manifest.json           size and sha256 of all of these; written last

A checkpoint is written into a hidden folder, flushed to disk and renamed; old ones go only after that. Nothing is pickled.
The student is always whole, for whoever reads it next; two thirds of the bytes are the optimizer's, and of these each worker
of a sharded run writes its own and reads, also when there are more or fewer workers by then, no more than its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from raykd.stage_config import QuantizationConfig
from raykd.student.heads import load_heads, save_heads

if TYPE_CHECKING:
    from raykd.student.model import Student  # with it transformers: every process that reads a ledger would wait for it

MANIFEST = "manifest.json"
STATE = "state.json"
LEDGER = "ledger.npy"
OPTIMIZER = "optimizer.safetensors"
SHARDS = "optimizer"
STUDENT = "student"
HEADS = "heads.safetensors"


class CheckpointError(ValueError):
    """A checkpoint cannot be used: what was found in it, what was expected, which one to take instead."""


@dataclass(frozen=True)
class Snapshot:
    """Everything that a run is made of between two steps."""

    student: Student
    tensors: dict[str, Tensor] | None  # of the student by name, where it is sharded
    optimizer: dict[str, Tensor] | Path  # a folder that `optimizer_state.save_shards` has filled
    ledger: np.ndarray  # int64, sorted
    rng: list[dict[str, Tensor]]  # by rank
    state: dict[str, Any]  # JSON; has "step"


def save_checkpoint(run_folder: Path, snapshot: Snapshot, keep: int) -> Path:
    """Publish `checkpoint-<step>` and drop all but the newest `keep`; returns its folder.

    A checkpoint of this step that is already there is left as it is. Errors: CheckpointError when writing fails (a full
    disk); the earlier checkpoints are untouched.
    """
    parent = run_folder / "checkpoints"
    parent.mkdir(parents=True, exist_ok=True)
    final = parent / f"checkpoint-{snapshot.state['step']}"
    temporary = parent / f".writing-{final.name}"
    unfinished = [temporary, snapshot.optimizer] if isinstance(snapshot.optimizer, Path) else [temporary]
    if final.exists():
        _remove(unfinished)
        return final
    for leftover in parent.glob(".*-*"):  # of a process that died while writing or removing
        if leftover not in unfinished[1:]:
            shutil.rmtree(leftover)
    try:
        _write(temporary, snapshot)
        os.rename(temporary, final)
    except (OSError, SafetensorError) as error:
        raise cannot_write(final, error) from error
    finally:
        _remove(unfinished)
    _flush(parent)
    for old in list_checkpoints(run_folder)[:-keep]:
        doomed = parent / f".removing-{old.name}"
        os.rename(old, doomed)
        shutil.rmtree(doomed)
    return final


def _write(folder: Path, snapshot: Snapshot) -> None:
    folder.mkdir()
    snapshot.student.save(folder / STUDENT, _part(snapshot.tensors, "model."))
    if len(snapshot.student.heads):
        save_heads(snapshot.student.heads, folder / HEADS, _part(snapshot.tensors, "heads."))
    if isinstance(snapshot.optimizer, Path):
        os.rename(snapshot.optimizer, folder / SHARDS)
    else:
        save_file(snapshot.optimizer, folder / OPTIMIZER)
    for rank, tensors in enumerate(snapshot.rng):
        save_file(tensors, folder / f"rng-{rank}.safetensors")
    np.save(folder / LEDGER, snapshot.ledger, allow_pickle=False)
    write_json(folder / STATE, snapshot.state)
    for path in folder.rglob("*"):
        _flush(path)
    write_json(folder / MANIFEST, {"files": list_files(folder)})
    _flush(folder / MANIFEST)
    _flush(folder)


def _remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _part(tensors: dict[str, Tensor] | None, prefix: str) -> dict[str, Tensor] | None:
    if tensors is None:
        return None
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def cannot_write(final: Path, error: BaseException) -> CheckpointError:
    """What to say when writing a checkpoint failed."""
    kept = latest_checkpoint(final.parent.parent)
    return CheckpointError(
        f"{final} cannot be written: {error}; {shutil.disk_usage(final.parent).free / 2**20:.0f} MiB are free there. "
        + (f"{kept} is as it was" if kept else "There is no earlier one")
        + ": make room and go on with --resume"
    )


def write_json(path: Path, value: Any) -> None:
    """Write a value whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False), encoding="utf-8")
    os.replace(temporary, path)


def _flush(path: Path) -> None:
    """Have the file or folder on disk, not just in the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def list_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file in a folder and those below, by its path in there: what a manifest says of them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files}


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_checkpoints(run_folder: Path) -> list[Path]:
    """The published checkpoints of a run, oldest first."""
    found = (run_folder / "checkpoints").glob("checkpoint-*")
    return sorted((path for path in found if re.fullmatch(r"checkpoint-\d+", path.name)), key=_step)


def latest_checkpoint(run_folder: Path) -> Path | None:
    """The newest published checkpoint of a run; None before the first. Its contents are not looked at: `verify` does."""
    return max(list_checkpoints(run_folder), key=_step, default=None)


def find_checkpoint(path: Path) -> Path | None:
    """The checkpoint that a path means: itself, or the newest of the run that it is; None where it is neither."""
    return path if (path / STATE).is_file() else latest_checkpoint(path)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def verify(folder: Path, names: Iterable[str] | None = None) -> None:
    """Compare files (all, or just `names`) with the manifest. Errors: CheckpointError with what is wrong."""
    manifest = _read_manifest(folder)
    for name in manifest if names is None else names:
        path = folder / name
        if name not in manifest or not path.is_file():
            raise _refuse(folder, f"{name} is missing")
        expected = manifest[name]
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise _refuse(folder, f"{name} has {size} bytes, the manifest says {expected['bytes']}")
        if sha256(path) != expected["sha256"]:
            raise _refuse(folder, f"{name} has other contents than when it was written (sha256 differs)")


def verify_student(folder: Path) -> None:
    """As `verify`, of the student and its heads alone: two thirds of the bytes are the optimizer's."""
    verify(folder, [name for name in _read_manifest(folder) if name == HEADS or name.startswith(f"{STUDENT}/")])


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _refuse(folder, f"{MANIFEST} cannot be read ({error})") from error


def _refuse(folder: Path, reason: str) -> CheckpointError:
    earlier = [path for path in list_checkpoints(folder.parent.parent) if _step(path) < _step(folder)]
    advice = (
        f"the one before is {earlier[-1]}: remove {folder.name} to go on from there"
        if earlier
        else "there is no earlier one: start the run anew"
    )
    return CheckpointError(f"{folder} is damaged: {reason}; {advice}")


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint, verified."""
    verify(folder, [STATE])
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def trained_quantization(state: dict[str, Any]) -> QuantizationConfig | None:
    """How the student of a checkpoint with this `read_state` was trained in INT8; None: no step was made in INT8."""
    config = state["config"]
    quantization = QuantizationConfig.model_validate(config.get("quantization", {}))
    return quantization if config.get("stage") == "qat" and state["step"] > quantization.start_step else None


def read_ledger(folder: Path | None) -> np.ndarray:
    """Sorted uids [N] int64 that a checkpoint was trained on, verified; empty without a checkpoint."""
    if folder is None:
        return np.empty(0, np.int64)
    verify(folder, [LEDGER])
    return np.load(folder / LEDGER, allow_pickle=False)


def read_rng(folder: Path, rank: int, world_size: int) -> dict[str, Tensor] | None:
    """Random state of a rank; None when the checkpoint is of another number of ranks, where it has no meaning."""
    if len(list(folder.glob("rng-*.safetensors"))) != world_size:
        return None
    return load_file(folder / f"rng-{rank}.safetensors")


def restore_heads(folder: Path, student: Student) -> None:
    """Fill the student's heads from a verified checkpoint. Errors: CheckpointError when it is not of exactly these heads."""
    if not len(student.heads) and not (folder / HEADS).exists():
        return
    try:
        load_heads(student.heads, folder / HEADS)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def take_over_heads(folder: Path, student: Student, names: Iterable[str]) -> None:
    """Fill the student's heads of these names from the verified checkpoint of an earlier stage; the others stay new."""
    chosen = nn.ModuleDict({name: student.heads[name] for name in names})
    if len(chosen):
        prefixes = tuple(f"{name}." for name in chosen)
        tensors = {name: value for name, value in load_file(folder / HEADS).items() if name.startswith(prefixes)}
        chosen.load_state_dict(tensors, strict=True)
