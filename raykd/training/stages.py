"""Four stages, one loop: what tells kd, process, answer and qat apart, and how one run hands its student to the next.

In:  the config of a run, with `init.from` the run (or checkpoint) before.
Out: the config with the student found there; `<run>/manifest.json`, by which a later stage knows what it is given.

    kd       prompts, teacher online        every loss                                student.model
    process  the same                       with those on tool use (process_share)    after kd
    answer   answers after tool results     likelihood, kd                            after kd, process
    qat      any                            self_kd, kd or both, on int8 arithmetic   after kd, process, answer

A stage of data: `answer_generation.py` selects the answers. A stage of the student: `quantization.py` makes it INT8.
Raises HandoverError with what was found, what was expected and what to change, before anything loads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raykd.code_version import code_version
from raykd.config import Config, StudentConfig
from raykd.stage_config import StageName
from raykd.student.heads import heads_in
from raykd.training.checkpoint import HEADS, MANIFEST, STATE, STUDENT, find_checkpoint, sha256, verify, write_json
from raykd.vocabulary import backend_of, student_tokenizer
from teacher_serving.identity import vocabulary_fingerprint

AFTER: Mapping[StageName, tuple[StageName, ...]] = {
    "kd": ("kd",),
    "process": ("kd", "process"),
    "answer": ("kd", "process", "answer"),
    "qat": ("kd", "process", "answer"),
}
"""The stages whose student each may go on from."""

HEAD_LOSSES = {"halt": ("halt", "halt_ponder"), "self_evaluation": ("self_evaluation",)}
"""Heads that are handed on, and the losses that train them. Projections are made anew: they belong to one teacher."""


class HandoverError(ValueError):
    """The student of the stage before cannot be taken over."""


@dataclass(frozen=True)
class Manifest:
    """What a run was and what it left: `<run>/manifest.json`."""

    stage: StageName
    code: str  # version and hash of raykd's files
    config: str  # sha256 of the run's config.yaml
    data: dict[str, str]  # fingerprints of prompts and of offline files
    teacher: str  # fingerprint: model, tokenizer, settings
    student: dict[str, Any]  # the `student` section with which the line of stages began
    vocabulary: str  # fingerprint of the student's tokenizer
    parent: dict[str, str] | None  # run, stage, checkpoint and its sha256; None: the line begins here
    checkpoint: str | None = None  # name of the last checkpoint; None: the run is not finished
    checkpoint_sha256: str | None = None  # of that checkpoint's own manifest, which has the hash of every file


@dataclass(frozen=True)
class Parent:
    """A checkpoint to go on from; `manifest` is None where only its weights are taken (init.mode=init)."""

    checkpoint: Path
    sha256: str
    manifest: Manifest | None

    @property
    def identity(self) -> dict[str, str]:
        stage = self.manifest.stage if self.manifest else _read(self.checkpoint / STATE)["config"].get("stage", "kd")
        run, name = self.checkpoint.parent.parent, self.checkpoint.name
        return {"run": str(run), "stage": stage, "checkpoint": name, "sha256": self.sha256}


def resolve(config: Config) -> tuple[Config, Parent | None]:
    """The config with the student of the run in `init.from`, and that parent; the config itself without one."""
    if config.init.from_ is None:
        fresh = config.student.random_weights or config.student.layers is not None
        if config.stage != "kd" and fresh:
            raise HandoverError(
                f"stage={config.stage} with a student that has learned nothing yet (student.random_weights or "
                f"student.layers): set init.from to a run of stage {' or '.join(AFTER[config.stage])}, or student.model to "
                "a trained model"
            )
        return config, None
    parent = find_parent(config)
    found = StudentConfig(model=str(parent.checkpoint / STUDENT), attention=config.student.attention)
    if parent.manifest is None:
        found = found.model_copy(update={"new_tokens": config.student.new_tokens})
    else:
        _check_student(config.student, found, parent.manifest)
        _check_heads(config, parent.checkpoint)
    return Config.model_validate(config.model_dump() | {"student": found.model_dump()}), parent


def find_parent(config: Config) -> Parent:
    """The checkpoint that `init.from` means, its files checked against their hashes."""
    checkpoint = find_checkpoint(Path(config.init.from_ or ""))
    if checkpoint is None:
        raise HandoverError(
            f"init.from={config.init.from_}: found no checkpoint there, expected a run folder or a checkpoint of one (a "
            "plain Hugging Face model goes into student.model)"
        )
    checkpoint = checkpoint.absolute()
    verify(checkpoint)
    own = sha256(checkpoint / MANIFEST)
    if config.init.mode == "init":
        return Parent(checkpoint, own, None)
    run = checkpoint.parent.parent
    manifest = read_manifest(run)
    if manifest is None or manifest.checkpoint is None:
        raise HandoverError(
            f"init.from={config.init.from_}: that run is not finished (no checkpoint in {run / MANIFEST}): finish it with "
            "--resume, or take its weights alone with init.mode=init"
        )
    if manifest.stage not in AFTER[config.stage]:
        raise HandoverError(
            f"stage={config.stage} after stage={manifest.stage} ({run}): expected a run of stage "
            f"{' or '.join(AFTER[config.stage])} in init.from, or init.mode=init, which takes the weights alone"
        )
    if manifest.checkpoint_sha256 != own or manifest.checkpoint != checkpoint.name:
        raise HandoverError(
            f"{checkpoint} is not what its run handed on: {run / MANIFEST} names {manifest.checkpoint} with sha256 "
            f"{manifest.checkpoint_sha256}, found {own}. Bring it back, finish the run with --resume, or take the "
            "weights alone with init.mode=init"
        )
    if (found := sha256(run / "config.yaml")) != manifest.config:
        raise HandoverError(
            f"{run / 'config.yaml'} is not the config that the run finished with (sha256 {found}, expected "
            f"{manifest.config}): bring it back, or take the weights alone with init.mode=init"
        )
    return Parent(checkpoint, own, manifest)


def _check_student(given: StudentConfig, found: StudentConfig, manifest: Manifest) -> None:
    """The `student` section is that of the line's first stage (or, in a saved config, the checkpoint itself)."""
    if given == found:
        return
    now, then = given.model_dump(mode="json"), manifest.student
    differing = {name: (then.get(name), now[name]) for name in now if name != "attention" and now[name] != then.get(name)}
    if differing:
        listed = "; ".join(f"student.{name} was {old!r}, now {new!r}" for name, (old, new) in differing.items())
        raise HandoverError(
            f"the stage before has another student: {listed}. Use its values, or init.mode=init, which ignores them"
        )
    tokenizer = student_tokenizer(given.tokenizer_folder, given.new_tokens)
    if (vocabulary := vocabulary_fingerprint(backend_of(tokenizer))) != manifest.vocabulary:
        raise HandoverError(
            f"the tokenizer in {given.tokenizer_folder} has changed since the stage before (fingerprint {vocabulary}, then "
            f"{manifest.vocabulary}): its ids may mean other tokens; bring its files back"
        )


def _check_heads(config: Config, checkpoint: Path) -> None:
    """Every head that a loss trains comes with the checkpoint."""
    found = heads_in(checkpoint / HEADS)
    for head, losses in HEAD_LOSSES.items():
        wanting = [name for name in losses if name in config.loss.weights]
        if wanting and head not in found:
            raise HandoverError(
                f"loss.{wanting[0]} trains the head {head!r}, which {checkpoint} lacks (it has {sorted(found)}): train it "
                "in the stage before too, set the loss to 0, or start its heads anew with init.mode=init"
            )


def handed_over(config: Config) -> Path | None:
    """The checkpoint whose heads a run begins with; None without a stage before."""
    return Path(config.student.model).parent if config.init.from_ is not None and config.init.mode == "stage" else None


def begin_manifest(given: Config, config: Config, run: Path, parent: Parent | None, facts: Mapping[str, Any]) -> None:
    """Say in the run folder what begins, or that it goes on.

    `given`: the config before `resolve`; `facts`: data, teacher and vocabulary of `Manifest`. Raises HandoverError when the
    run began from another parent.
    """
    began, line = read_manifest(run), parent.manifest if parent else None
    identity = parent.identity if parent else None
    if began is not None and began.parent != identity:
        raise HandoverError(
            f"{run} began from {began.parent}, now init.from is {identity}: the stage before has changed; remove {run} to "
            "begin again, or bring the earlier checkpoint back"
        )
    student = line.student if line else given.student.model_dump(mode="json")
    manifest = Manifest(config.stage, code_version(), sha256(run / "config.yaml"), student=student, parent=identity, **facts)
    write_json(run / MANIFEST, asdict(manifest))


def finish_manifest(run: Path, checkpoint: Path) -> None:
    """Say in the run folder that the run is done: from here on a later stage may take its student over."""
    manifest = read_manifest(run)
    assert manifest is not None, f"{run} has no manifest: begin_manifest comes first"
    ended = {"checkpoint": checkpoint.name, "checkpoint_sha256": sha256(checkpoint / MANIFEST)}
    write_json(run / MANIFEST, asdict(manifest) | ended)


def read_manifest(run: Path) -> Manifest | None:
    """What a run says of itself; None where it does not (it has not begun, or is of an earlier version)."""
    return Manifest(**_read(run / MANIFEST)) if (run / MANIFEST).is_file() else None


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
