"""raykd/config.py and raykd/cli.py: what a user writes becomes one validated Config, or one clear message."""

from __future__ import annotations

import copy
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from pydantic import BaseModel

from raykd.cli import ConfigError, connect_ray, load_config, load_configs, open_run, parse, parse_words
from raykd.config import Config
from raykd.config_errors import members
from raykd.loss_config import LOSSES

ROOT = Path(__file__).parents[1]

MINIMAL = {
    "teacher": {"kind": "hf", "model": "teacher"},
    "student": {"model": "student"},
    "data": {"prompts": "prompts.jsonl"},
}


def write(path: Path, content: object) -> str:
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.fixture
def minimal(tmp_path: Path) -> str:
    return write(tmp_path / "minimal.yaml", MINIMAL | {"run": {"dir": str(tmp_path / "runs")}})


def test_files_merge_deeply_and_overrides_win(tmp_path: Path, minimal: str):
    second = write(tmp_path / "b.yaml", {"train": {"epochs": 2, "betas": [0.8, 0.9]}, "loss": {"kd": 2}})
    config = load_config([minimal, second], ["train.learning_rate=3e-3", "loss.tool_name=0.5"])
    assert (config.train.epochs, config.train.betas, config.train.learning_rate) == (2, (0.8, 0.9), 3e-3)
    assert config.loss.weights == {"kd": 2.0, "tool_name": 0.5}
    assert config.teacher.tokenizer_folder == "teacher"


def test_config_files_and_overrides_share_one_option(minimal: str):
    config, args = parse(["--config", minimal, "run.seed=7", "--plan", "train.epochs=3"], "test", "--plan")
    assert (config.run.seed, config.train.epochs, args.plan) == (7, 3, True)


def test_the_resolved_config_is_itself_a_valid_config(tmp_path: Path, minimal: str):
    config = load_config([minimal])
    folder = open_run(config)
    assert load_config([folder / "config.yaml"]) == config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epoch=2", ["command line", "train.epoch", "did you mean 'epochs'"]),
        ("trian.epochs=2", ["trian", "did you mean 'train'"]),
        ("teacher.modle=x", ["teacher.modle", "did you mean 'model'"]),
        ("train.epochs=two", ["command line", "train.epochs", "'two'"]),
        ("train.epochs=0", ["train.epochs", "0", "greater than or equal to 1"]),
        ("data.completions=human", ["data.completions", "'human'", "teacher", "recorded"]),
        ("loss.kd=-1", ["loss.kd", "-1"]),
        ("loss.kd=0", ["every loss weight is 0"]),
        ("loss.ce_truth=1", ["loss.ce_truth=1.0", "data.completions=teacher"]),
        ("loss.kd_temperature=2", ["loss.kd_temperature=2", "topk_tail", "topk_renorm"]),
        ("loss={kd_divergence: reverse_kl, kd_support: topk_zero}", ["reverse_kl", "topk_zero", "infinite"]),
        ("loss.kd_support=full", ["loss.kd_support=full", "teacher.hidden_layers=[]"]),
        ("loss.intermediate_layer=0.5", ["loss.intermediate_layer=0.5", "teacher.hidden_layers=[]"]),
        ("latent.mode=continuous", ["latent.mode=continuous", "no effect", "latent.stages"]),
        ("latent.loops=2", ["latent.loops=2", "latent.mode=mask", "no effect"]),
        (
            "latent={mode: continuous, loops: 7, stages: [{until_step: 3, steps: 1, slots: 5, probability: 1}, "
            "{steps: 2, slots: 3, probability: 1}]}",
            ["latent.loops=7", "at most 6 slots", "latent.loops=6"],
        ),
        ("rollouts.clip=0.3", ["rollouts.clip=0.3", "rollouts.every=1", "has no effect"]),
        ("rollouts.prompts_per_step=2", ["rollouts.prompts_per_step=2", "no other loss looks at the student's own answers"]),
        ("train.head_learning_rate=0.1", ["train.head_learning_rate=0.1", "'halt'", "no head_learning_rate"]),
        ("loss={kd_entropy: token, kd: 0, ce_teacher: 1}", ["loss.kd_entropy=token", "loss.kd=0"]),
        ("loss={kd_entropy: run, kd_support: full}", ["loss.kd_entropy=run", "loss.kd_support=full"]),
        ("train.num_workers=64", ["train.sequences_per_step=32", "train.num_workers=64"]),
        ("train={num_workers: 2, min_workers: 2}", ["train.min_workers=2", "train.num_workers=2", "leave min_workers out"]),
        ("teacher.kind=oracle", ["teacher", "oracle"]),
    ],
)
def test_a_bad_option_is_named_with_its_value_and_the_way_out(minimal: str, override: str, words: list[str]):
    with pytest.raises(ConfigError) as error:
        load_config([minimal], [override])
    for word in words:
        assert word in str(error.value)


OFFLINE = "data.offline=[{path: rows.jsonl, weight: 2}]"
ALONE = [OFFLINE, "data.prompts=null"]


@pytest.mark.parametrize(
    "overrides",
    [
        [OFFLINE],
        [OFFLINE, "loss.ce_truth=1"],
        [OFFLINE, "loss.ce_teacher=1", "data.completions=recorded"],
        [OFFLINE, "data.completions=recorded", "data.on_long_prompt=truncate_left", "data.teacher_cache=cache"],
        [*ALONE, "loss={ce_truth: 1, ce_teacher: 1}"],
        [*ALONE, "loss.kd_support=full", "teacher.hidden_layers=[1]"],
    ],
)
def test_prompts_offline_files_and_both_together_serve_the_losses_that_their_rows_may_have(
    minimal: str, overrides: list[str]
):
    config = load_config([minimal], overrides)
    assert config.data.offline[0].weight == 2
    assert config.data.prompts == (None if overrides[:2] == ALONE else "prompts.jsonl")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.prompts=null"], ["data.prompts and data.offline: found neither"]),
        ([*ALONE, "data.completions=recorded"], ["data.completions=recorded without data.prompts", "no effect"]),
        ([*ALONE, "data.on_long_prompt=truncate_left"], ["data.on_long_prompt=truncate_left without data.prompts"]),
        ([*ALONE, "data.teacher_cache=cache"], ["data.teacher_cache=cache without data.prompts"]),
        ([*ALONE, "loss.intermediate_layer=1"], ["loss.intermediate_layer=1", "or those of the offline rows"]),
        (
            [
                "loss={ce_teacher: 1, policy_gradient: 1}",
                "rollouts.prompts_per_step=1",
                "latent={mode: continuous, loops: 2, stages: [{steps: 2, slots: 2, probability: 1}]}",
            ],
            ["latent.loops=2 with spans of 4 slots and rollouts", "set latent.loops=4"],
        ),
        (["data.offline=[{path: a, weight: 0}]"], ["data.offline.0.weight", "greater than 0"]),
    ],
)
def test_what_several_options_together_cannot_mean_is_named(minimal: str, overrides: list[str], words: list[str]):
    with pytest.raises(ConfigError) as error:
        load_config([minimal], overrides)
    for word in words:
        assert word in str(error.value)


def test_an_unknown_key_names_its_file(tmp_path: Path, minimal: str):
    second = write(tmp_path / "typo.yaml", {"loss": {"kdd": 1}})
    with pytest.raises(ConfigError, match=r"typo\.yaml: loss\.kdd: no such option; did you mean 'kd'"):
        load_config([minimal, second])


def test_a_missing_option_and_a_missing_file_are_named(tmp_path: Path, minimal: str):
    with pytest.raises(ConfigError, match=r"student\.model: is missing"):
        load_config([write(tmp_path / "c.yaml", MINIMAL | {"student": {}})])
    with pytest.raises(ConfigError, match=r"found no file 'nowhere\.yaml'"):
        load_config(["nowhere.yaml"])


def test_a_section_written_twice_is_refused(tmp_path: Path, minimal: str):
    """YAML would take the last and forget the first."""
    file = tmp_path / "twice.yaml"
    file.write_text("train:\n  epochs: 2\ndata: &d\n  shuffle: true\ntrain:\n  use_gpu: false\n")
    with pytest.raises(ConfigError, match=r"(?s)twice\.yaml: not YAML: .*found twice.*'train'"):
        load_config([minimal, file])


def test_relative_paths_that_exist_become_absolute(tmp_path: Path, minimal: str, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "prompts.jsonl").touch()
    (tmp_path / "rows.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    assert load_config([minimal], [OFFLINE]).data.offline[0].path == str(tmp_path / "rows.jsonl")
    assert load_config([minimal]).data.prompts == str(tmp_path / "prompts.jsonl")
    assert load_config([minimal]).student.model == "student"  # not a folder here: a name is left as it is


def test_a_run_folder_is_not_used_twice_by_accident(minimal: str):
    open_run(load_config([minimal]))
    with pytest.raises(ConfigError, match="--resume"):
        open_run(load_config([minimal]))
    open_run(load_config([minimal], ["train.log_every=1"]), resume=True)  # changes nothing that is learned
    with pytest.raises(ConfigError, match=r"train\.learning_rate: the run has 0\.0001, now 0\.5"):
        open_run(load_config([minimal], ["train.learning_rate=0.5"]), resume=True)


def test_resuming_a_run_that_never_started_is_refused(minimal: str):
    with pytest.raises(ConfigError, match="--resume: found no"):
        open_run(load_config([minimal]), resume=True)


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_a_cluster_that_does_not_answer_is_one_sentence_at_once(minimal: str, form: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as deaf:  # has a port and does not listen
        deaf.bind(("127.0.0.1", 0))
        address = form.format(deaf.getsockname()[1])
        expected = f"no Ray cluster answers at '{address}' .*refused.*: start one, or leave out ray.address and RAY_ADDRESS"
        with pytest.raises(ConfigError, match=expected):
            connect_ray(load_config([minimal], [f"ray.address={address}"]))
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ConfigError, match=expected):
            connect_ray(load_config([minimal]))


def test_every_option_is_documented_and_only_config_has_defaults():
    def walk(model: type[BaseModel], path: str) -> None:
        for name, field in model.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                walk(inner, f"{path}{name}.")
            elif path:
                assert field.description, f"{path}{name} has no explanation"

    walk(Config, "")


PIPELINE = {"pipeline": [{"stage": "kd"}, {"stage": "process", "loss": {"tool_name": 1.0}}, {"stage": "qat"}]}


def test_a_pipeline_is_a_config_for_each_stage_and_each_goes_on_from_the_one_before(tmp_path: Path, minimal: str):
    pipeline = write(tmp_path / "pipeline.yaml", PIPELINE)
    kd, process, qat = load_configs([minimal, pipeline], ["run.name=x", "train.epochs=3"])
    assert [config.run.name for config in (kd, process, qat)] == ["x-kd", "x-process", "x-qat"]
    assert [config.init.from_ for config in (kd, process, qat)] == [
        None,
        str(tmp_path / "runs" / "x-kd"),
        str(tmp_path / "runs" / "x-process"),
    ]
    assert {config.train.epochs for config in (kd, process, qat)} == {3}
    assert process.loss.tool_name == 1.0
    assert qat.loss.tool_name == 0.0, "what a stage has of its own is its own"
    before = load_configs([minimal, pipeline], ["run.name=x", "init.from=earlier", "init.mode=init"])
    assert [Path(config.init.from_ or "").name for config in before] == ["earlier", "x-kd", "x-process"]
    assert [config.init.mode for config in before] == ["init", "stage", "stage"], "what is given is for the first stage"
    with pytest.raises(ConfigError, match="a pipeline of 3 stages"):
        load_config([minimal, pipeline])


def test_errors_of_a_pipeline_name_the_stage(tmp_path: Path, minimal: str):
    wrong = write(tmp_path / "wrong.yaml", {"pipeline": [{"stage": "kd"}, {"stage": "qat", "trian": {}}]})
    with pytest.raises(ConfigError, match=r"stage 2 of the pipeline: trian: no such option; did you mean 'train'"):
        load_configs([minimal, wrong])
    twice = write(tmp_path / "twice.yaml", {"pipeline": [{"stage": "kd"}, {"stage": "kd"}]})
    with pytest.raises(ConfigError, match="two stages have the run.name 'run-kd'"):
        load_configs([minimal, twice])
    with pytest.raises(ConfigError, match="pipeline is no list of stages"):
        load_configs([minimal, write(tmp_path / "no.yaml", {"pipeline": {"stage": "kd"}})])


def test_a_file_includes_others_relative_to_itself(tmp_path: Path, minimal: str):
    (tmp_path / "more").mkdir()
    first = write(tmp_path / "more" / "first.yaml", {"include": ["../minimal.yaml"], "train": {"epochs": 2}})
    config = load_config([write(tmp_path / "b.yaml", {"include": ["more/first.yaml"], "run": {"seed": 5}})])
    assert (config.train.epochs, config.run.seed, config.teacher.tokenizer_folder) == (2, 5, "teacher")
    with pytest.raises(ConfigError, match="includes itself"):
        load_config([write(Path(first), {"include": ["first.yaml"]})])
    with pytest.raises(ConfigError, match="expected a list of files"):
        load_config([write(tmp_path / "c.yaml", {"include": "minimal.yaml"})])


def test_init_from_is_written_as_it_is_read(tmp_path: Path, minimal: str):
    config = load_config([minimal], ["init.from=somewhere"])
    assert config.model_dump()["init"]["from"] == str(Path("somewhere").absolute())
    with pytest.raises(ConfigError, match=r"init\.form: no such option; did you mean 'from'"):
        load_config([minimal], ["init.form=somewhere"])


def test_steps_and_simulate_are_short_for_options(minimal: str):
    short = {"--steps": "train.max_steps", "--simulate": "simulate"}
    words, _ = parse_words(["--config", minimal, "--steps", "7", "--simulate", "step"], "test", short=short)
    config = load_config(*words)
    assert config.train.max_steps == 7
    assert config.simulates("step")
    assert not config.simulates("teacher")
    assert load_config([minimal], ["simulate=both"]).simulates("teacher")


def test_stand_ins_are_for_the_command_that_trains(minimal: str):
    with pytest.raises(ConfigError, match=r"simulate=both: .* raykd.train alone"):
        parse(["--config", minimal, "simulate=both"], "test")
    with pytest.raises(ConfigError, match=r"simulate=teacher without data.prompts: no teacher is asked"):
        load_config([minimal], ["simulate=teacher", "data={prompts: null, offline: [{path: rows.jsonl}]}"])


def options(model: type[BaseModel]) -> Iterator[tuple[type[BaseModel], str]]:
    """Every option of a section and of the sections in it, with the class that has it."""
    for name, field in model.model_fields.items():
        inner = members(field.rebuild_annotation())
        if not inner:
            yield model, name
        for section in inner:
            yield from options(section)


def test_every_option_is_read_by_something_beside_the_configuration():
    """An option that nothing reads would be accepted and change nothing."""
    folders = (ROOT / folder for folder in ("raykd", "teacher_serving"))
    sources = [path for folder in folders for path in folder.rglob("*.py") if not path.stem.endswith("config")]
    text = "\n".join(path.read_text() for path in sources)
    losses = set(LOSSES) | {"kind"}  # by getattr over LOSSES; what tells teachers apart
    unread = {
        f"{section.__name__}.{name}"
        for section, name in options(Config)
        if name not in losses and not re.search(rf"\.{re.escape(name)}\b", text)
    }
    assert unread <= OF_CONFIG_ALONE


OF_CONFIG_ALONE = {
    # applied where weights are put together, in raykd/loss_config.py
    "LossConfig.process_share",
    "LossConfig.code_mode_positive_weight",
    "LossConfig.code_mode_negative_weight",
    "LossConfig.early_tool_ce_weight",
    "LossConfig.early_tool_prior_weight",
    "TuneConfig.num_trials",  # behind the property `total`
    # behind properties of teacher_serving/config.py: num_threads, gpus_per_actor
    "HfTeacherConfig.threads",
    "SimulatedTeacherConfig.threads",
    "HfTeacherConfig.num_gpus",
    "SimulatedTeacherConfig.num_gpus",
    "VllmTeacherConfig.threads",
    "VllmTeacherConfig.num_gpus",
}


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_key_of_a_shipped_file_acts(file: Path, tmp_path: Path):
    """With another value of any key the config is another one, or is refused."""
    base = [ROOT / "configs" / "qwen3_8b_to_0.6b.yaml"] if file.stem in STAGE_FILES else []
    base += [ROOT / "configs" / "demo.yaml"] if file.stem == "demo_all" else []
    beside = ["teacher.model=t", "student.model=s"] if file.stem == "kd_recipe" else []
    whole = yaml.safe_load(file.read_text())
    included = [str(file.parent / name) for name in whole.pop("include", [])]
    before = load_configs([*base, *included, write(tmp_path / "whole.yaml", whole)], beside)
    for path in key_paths(whole):
        changed = copy.deepcopy(whole)
        *parents, last = path
        section = changed
        for part in parents:
            section = section[part]
        section[last] = other_than(section[last])
        try:
            after = load_configs([*base, *included, write(tmp_path / "changed.yaml", changed)], beside)
        except ConfigError:
            continue
        assert after != before, f"{file.name}: {path} changes nothing"


STAGE_FILES = ("process_supervision", "answer_generation", "quant_qat_int8")


def other_than(value: Any) -> Any:
    """Another value of the same type, as far as there is one."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return value / 2 or 0.5 if isinstance(value, float) else value + 1
    return value[:-1] or "x"


def key_paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to all leaves of nested mappings and lists of mappings."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        leaf = not isinstance(inner, dict) and not (isinstance(inner, list) and inner and isinstance(inner[0], dict))
        yield from [(*path, key)] if leaf else key_paths(inner, (*path, key))
