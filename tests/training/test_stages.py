"""raykd/training/stages.py: a stage takes over the student of the one before, or says why it does not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from raykd.cli import ConfigError, open_run
from raykd.config import Config
from raykd.student.heads import heads_in
from raykd.student.int8_arithmetic import weight_codes
from raykd.student.quantization import Int8Linear
from raykd.train import as_planned, is_finished
from raykd.training.checkpoint import CheckpointError, latest_checkpoint
from raykd.training.stages import (
    HandoverError,
    begin_manifest,
    find_parent,
    finish_manifest,
    read_manifest,
    resolve,
)
from raykd.vocabulary import backend_of, student_tokenizer
from teacher_serving.identity import vocabulary_fingerprint
from tests.training.tiny_run import make_config, make_rows, run, run_on_two_ranks, weights

HALT = {"kd": 1.0, "ce_teacher": 0.5, "tool_name": 0.25, "halt": 0.1}


def stage(student_path: Path, runs: Path, name: str, parent: str | None = None, **sections: Any) -> Config:
    """Config of a stage `name` whose run has the same name."""
    beginning = {"init": {"from": str(runs / parent)}} if parent else {}
    own = {"stage": name.partition("-")[0], "run": {"name": name, "dir": str(runs)}}
    return make_config(student_path, **own, **beginning, **sections)


def make_run(given: Config, rows: int = 16) -> tuple[Path, Any]:
    """What raykd.train does around `fit`, without Ray: a whole stage on random rows; its folder and its trainer."""
    config, parent = resolve(given)
    folder = open_run(config)
    tokenizer = student_tokenizer(config.student.tokenizer_folder, config.student.new_tokens)
    facts = {"data": {}, "teacher": "f", "vocabulary": vocabulary_fingerprint(backend_of(tokenizer))}
    begin_manifest(given, config, folder, parent, facts)
    trainer, _ = run(config, folder, [make_rows(rows, seed=len(given.run.name))])
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None
    finish_manifest(folder, checkpoint)
    return folder, trainer


@pytest.fixture
def kd(student_path, tmp_path):
    """A finished first stage with a halt head."""
    return make_run(stage(student_path, tmp_path, "kd", loss=HALT))


def test_the_next_stage_begins_with_the_weights_and_heads_of_the_one_before(student_path, tmp_path, kd):
    _, before = kd
    config, parent = resolve(stage(student_path, tmp_path, "process", "kd", loss=HALT))
    assert parent is not None
    assert parent.identity["stage"] == "kd"
    trainer, _ = run(config, tmp_path / "process", [])
    assert trainer.progress.step == 0
    after, expected = weights(trainer), weights(before)
    assert after.keys() == expected.keys()
    assert all(torch.equal(after[name], value) for name, value in expected.items())
    assert not trainer.optimizer.state, "a stage has its own optimizer and schedule"


def test_a_head_that_no_loss_trains_any_more_is_handed_on_as_it_is(student_path, tmp_path, kd):
    _, before = kd
    folder, trainer = make_run(stage(student_path, tmp_path, "process", "kd"))
    name = "heads.halt.weight"
    assert torch.equal(weights(trainer)[name], weights(before)[name])
    assert heads_in((latest_checkpoint(folder) or folder) / "heads.safetensors") == {"halt"}
    resumed, _ = run(resolve(stage(student_path, tmp_path, "process", "kd"))[0], folder, [])
    assert resumed.progress.step == trainer.progress.step
    assert torch.equal(weights(resumed)[name], weights(before)[name])


def test_a_line_of_four_stages_ends_in_int8_and_says_where_it_comes_from(student_path, tmp_path, kd):
    make_run(stage(student_path, tmp_path, "process", "kd"))
    make_run(stage(student_path, tmp_path, "answer", "process"))
    folder, trainer = make_run(stage(student_path, tmp_path, "qat", "answer", loss={"self_kd": 1.0}))
    layers = [module for module in trainer.student.model.modules() if isinstance(module, Int8Linear)]
    assert len(layers) == 14, "seven linear layers in each of two decoder layers"
    manifest, first = read_manifest(folder), read_manifest(tmp_path / "kd")
    assert manifest is not None
    assert first is not None
    assert manifest.parent is not None
    assert (manifest.stage, manifest.parent["stage"]) == ("qat", "answer")
    assert manifest.student == first.student, "what the line began with"
    assert manifest.code == first.code
    # The float weights are what is saved; the codes come from them again, bit for bit, when the run goes on.
    resumed, _ = run(resolve(stage(student_path, tmp_path, "qat", "answer", loss={"self_kd": 1.0}))[0], folder, [])
    again = [module for module in resumed.student.model.modules() if isinstance(module, Int8Linear)]
    for old, new in zip(layers, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(weight_codes(old.weight), weight_codes(new.weight), strict=True))


def test_int8_begins_at_its_step_and_the_float_student_has_no_self_kd_before(student_path, tmp_path, kd):
    given = stage(student_path, tmp_path, "qat", "kd", loss={"kd": 0.0, "ce_teacher": 0.0, "tool_name": 0.0, "self_kd": 1.0})
    given = given.model_copy(update={"quantization": given.quantization.model_copy(update={"start_step": 1})})
    config, _ = resolve(given)
    _, logged = run(config, tmp_path / "qat", [make_rows(32, seed=9)])
    losses = [metrics["loss/self_kd"] for _, metrics in logged if "loss/self_kd" in metrics]
    assert losses[0] == pytest.approx(0.0, abs=1e-6), "in float it is the student it is compared with"
    assert min(losses[1:]) > 1e-5


@pytest.mark.parametrize(
    ("name", "after", "expected"),
    [
        ("kd-2", "process", "run of stage kd"),
        ("process-2", "answer", "stage kd or process"),
        ("qat-2", "qat", "kd or process or answer"),
    ],
)  # fmt: skip
def test_a_stage_after_the_wrong_one_is_refused(student_path, tmp_path, kd, name, after, expected):
    folder, _ = kd
    saved = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(saved | {"stage": after}))
    with pytest.raises(HandoverError, match=expected):
        resolve(stage(student_path, tmp_path, name, "kd"))


def edit_weights(folder: Path) -> None:
    file = next((latest_checkpoint(folder) or folder).glob("student/*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def edit_config(folder: Path) -> None:
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text().replace("epochs: 1", "epochs: 2"))


def edit_checkpoint_and_its_manifest(folder: Path) -> None:
    manifest = (latest_checkpoint(folder) or folder) / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")


def lose_heads(folder: Path) -> None:
    ((latest_checkpoint(folder) or folder) / "heads.safetensors").unlink()


def forget_the_end(folder: Path) -> None:
    saved = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(saved | {"checkpoint": None}))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (edit_weights, "other contents than when it was written"),
        (edit_checkpoint_and_its_manifest, "not what its run handed on"),
        (edit_config, "not the config that the run finished with"),
        (lose_heads, "heads.safetensors is missing"),
        (forget_the_end, "not finished"),
    ],
)
def test_what_was_changed_since_is_refused(student_path, tmp_path, kd, edit, words):
    folder, _ = kd
    edit(folder)
    with pytest.raises((HandoverError, CheckpointError), match=words):
        resolve(stage(student_path, tmp_path, "process", "kd", loss=HALT))


def test_a_head_that_the_stage_before_lacks_is_refused_and_made_anew_where_only_weights_are_taken(student_path, tmp_path):
    make_run(stage(student_path, tmp_path, "kd"))
    wanting = stage(student_path, tmp_path, "process", "kd", loss=HALT)
    with pytest.raises(HandoverError, match="trains the head 'halt', which .* lacks"):
        resolve(wanting)
    fresh = wanting.model_copy(update={"init": wanting.init.model_copy(update={"mode": "init"})})
    config, parent = resolve(fresh)
    assert parent is not None
    assert parent.manifest is None
    trainer, _ = run(config, tmp_path / "process", [])
    assert "halt" in trainer.student.heads


def test_another_student_section_or_tokenizer_is_refused(student_path, tmp_path, kd):
    other = stage(student_path, tmp_path, "process", "kd", student={"new_tokens": {"<bot>": ""}})
    with pytest.raises(HandoverError, match=r"student\.new_tokens was \{\}, now"):
        resolve(other)
    folder, _ = kd
    saved = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(saved | {"vocabulary": "another"}))
    with pytest.raises(HandoverError, match="tokenizer .* has changed since the stage before"):
        resolve(stage(student_path, tmp_path, "process", "kd"))


def test_the_saved_config_of_a_stage_is_itself_a_config_of_it(student_path, tmp_path, kd):
    folder, _ = make_run(stage(student_path, tmp_path, "process", "kd"))
    saved = Config.model_validate(yaml.safe_load((folder / "config.yaml").read_text()))
    assert saved.init.from_ == str(tmp_path / "kd")
    assert resolve(saved)[0] == saved


def test_a_run_whose_parent_has_changed_does_not_go_on(student_path, tmp_path, kd):
    given = stage(student_path, tmp_path, "process", "kd")
    folder, _ = make_run(given)
    config, parent = resolve(given)
    assert parent is not None
    with pytest.raises(HandoverError, match="the stage before has changed"):
        begin_manifest(given, config, folder, replace(parent, sha256="other"), {})


def test_a_folder_without_a_checkpoint_and_an_untrained_student_are_refused(student_path, tmp_path):
    with pytest.raises(HandoverError, match="found no checkpoint there"):
        find_parent(stage(student_path, tmp_path, "process", "nothing"))
    with pytest.raises(HandoverError, match="has learned nothing yet"):
        resolve(stage(student_path, tmp_path, "answer", student={"random_weights": True}))


@pytest.mark.parametrize(
    ("name", "sections", "words"),
    [
        ("kd", {"quantization": {"smoothing": 0.5}}, ["quantization.smoothing", "stage=kd", "no effect"]),
        ("process", {"loss": {"tool_name": 0.0}}, ["stage=process", "none is on tool use"]),
        ("answer", {"data": {"offline": [{"path": "x"}]}}, ["stage=answer", "data.offline"]),
        ("qat", {"quantization": {"start_step": 9}, "train": {"max_steps": 9}}, ["start_step=9", "max_steps=9"]),
        ("kd", {"loss": {"process_share": 0.3, "kd": 0.0, "ce_teacher": 0.0}}, ["process_share=0.3", "tool_name alone"]),
        ("kd", {"init": {"mode": "init"}}, ["init.mode=init", "without init.from"]),
    ],
)
def test_settings_that_do_not_fit_the_stage_are_refused(student_path, name, sections, words):
    values = make_config(student_path).model_dump()
    for key, section in sections.items():
        values[key] = values[key] | section
    with pytest.raises(ValueError, match="stage|loss|init") as caught:
        Config.model_validate(values | {"stage": name})
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_process_share_divides_the_weights_in_the_given_ratios(student_path):
    config = make_config(
        student_path, loss={"kd": 2.0, "ce_teacher": 0.0, "tool_name": 1.0, "json_argument": 3.0, "process_share": 0.2}
    )
    assert config.loss.terms == pytest.approx({"kd": 0.8, "tool_name": 0.05, "json_argument": 0.15})
    assert config.loss.weights == {"kd": 2.0, "tool_name": 1.0, "json_argument": 3.0}


def test_smoothing_folds_once_before_the_first_step_alike_on_two_workers(student_path, tmp_path, kd):
    sections = {"loss": {"self_kd": 1.0}, "train": {"learning_rate": 1e-6}}  # what is seen is the folding
    config, _ = resolve(stage(student_path, tmp_path, "qat", "kd", quantization={"smoothing": 0.5}, **sections))
    rows = make_rows(16, seed=9)
    alone, logged = run(config, tmp_path / "qat", [rows])
    unsmoothed, _ = run(resolve(stage(student_path, tmp_path, "qat-2", "kd", **sections))[0], tmp_path / "2", [rows])
    norm = "model.model.layers.0.input_layernorm.weight"
    assert (weights(alone)[norm] - weights(unsmoothed)[norm]).abs().max() > 0.05
    shares = [[rows.slice(first, 4), rows.slice(first + 8, 4)] for first in (0, 4)]  # of each step's eight rows
    together, _ = run_on_two_ranks(config, tmp_path / "two", shares)
    assert logged[0][1]["loss/self_kd"] < 0.05, "the function is the same, up to INT8"
    for name, value in weights(alone).items():
        torch.testing.assert_close(together[name], value, atol=1e-4, rtol=1e-4, msg=name)
    again, _ = run(config, tmp_path / "qat", [])
    assert torch.equal(weights(again)[norm], weights(alone)[norm]), "a run that goes on is not folded again"


def test_a_stage_in_int8_that_is_resumed_goes_on_bit_for_bit(student_path, tmp_path, kd):
    config, _ = resolve(stage(student_path, tmp_path, "qat", "kd", loss={"self_kd": 1.0}, train={"checkpoint_every": 1}))
    rows = make_rows(32, seed=9)
    whole, _ = run(config, tmp_path / "whole", [rows])
    asked = iter([False, False, True])
    halfway, _ = run(config, tmp_path / "halves", [rows], stop=lambda: next(asked))
    assert halfway.progress.step == 2
    resumed, _ = run(config, tmp_path / "halves", [rows])
    assert resumed.progress.step == whole.progress.step == 4
    assert all(torch.equal(weights(resumed)[name], value) for name, value in weights(whole).items())


def test_a_finished_stage_is_left_alone_also_under_other_settings_of_what_is_shown(student_path, tmp_path):
    given = stage(student_path, tmp_path, "kd")
    folder, _ = make_run(given)
    as_it_was = (folder / "config.yaml").read_text()
    quiet = given.model_copy(update={"tracking": given.tracking.model_copy(update={"progress_bar": False})})
    assert is_finished(quiet)
    assert (folder / "config.yaml").read_text() == as_it_was
    resolve(stage(student_path, tmp_path, "process", "kd"))
    with pytest.raises(ConfigError, match=r"run\.seed: the run has 0, now 7"):
        is_finished(stage(student_path, tmp_path, "kd").model_copy(update={"run": given.run.model_copy(update={"seed": 7})}))
    forget_the_end(folder)
    assert not is_finished(given)


def test_a_stage_is_planned_with_its_own_student_until_the_one_before_has_ended(student_path, tmp_path):
    first = stage(student_path, tmp_path, "kd")
    second = stage(student_path, tmp_path, "process", "kd")
    assert as_planned(second, [first, second]) == second, "there is no run yet"
    folder, _ = make_run(first)
    assert as_planned(second, [first, second]) == resolve(second)[0]
    forget_the_end(folder)
    assert as_planned(second, [first, second]) == second, "a run of this pipeline that is under way"
    with pytest.raises(HandoverError, match="not finished"):
        as_planned(second, [second])
