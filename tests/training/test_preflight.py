"""raykd/training/preflight.py: what cannot work is refused with a reason before anything loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from raykd.cli import load_config
from raykd.config import Config
from raykd.training.preflight import check, check_disk, num_steps, print_summary
from raykd.training.resources import check_resources
from raykd.vocabulary import compare_vocabularies, student_tokenizer
from tests.completion_server import completion_server


@pytest.fixture
def base(tmp_path: Path, tiny_model_path: Path) -> list[str]:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "hello"}) + "\n")
    return [
        "teacher.kind=hf",
        f"teacher.model={tiny_model_path}",
        f"student.model={tiny_model_path}",
        f"data.prompts={prompts}",
        f"run.dir={tmp_path / 'runs'}",
    ]


def configured(base: list[str], *overrides: str) -> Config:
    return load_config([], [*base, *overrides])


def test_a_run_that_can_work_passes_and_is_counted(base: list[str]):
    plan = check(configured(base))
    assert plan.teacher.vocab_size == plan.student_vocab_size
    assert plan.student_size.parameters > 0
    check_resources(configured(base), {"CPU": 8})


def test_what_a_teacher_behind_an_api_gives_is_in_the_summary_before_anything_starts(
    base: list[str], tiny_model_path: Path, capsys, monkeypatch
):
    monkeypatch.setattr("teacher_serving.http_calls.BACKOFF_S", 0.0)
    with completion_server() as server:
        teacher = {"kind": "http", "address": server.address, "model": "tiny", "tokenizer": str(tiny_model_path), "top_k": 8}
        options = [option for option in base if not option.startswith("teacher.")]

        def configured(*overrides: str, **changes) -> Config:
            return load_config([], [*options, f"teacher={json.dumps({**teacher, **changes})}", *overrides])

        def summary(config: Config) -> str:
            print_summary(config, check(config), numbers=None, cluster=None)
            return " ".join(capsys.readouterr().out.replace("│", " ").split())

        config = configured()
        assert check(config).teacher.max_model_len == 64  # as the server says
        assert f"tiny at {server.address} gives top-3 of the 8 asked for" in summary(config)
        assert "text alone: sequence-level distillation" in summary(configured("loss={kd: 0, ce_teacher: 1}", top_k=0))
        with pytest.raises(ValueError, match=r"loss.kd=1 and teacher.top_k=0: .*loss.kd=0, loss.ce_teacher above 0"):
            configured(top_k=0)
        with pytest.raises(ValueError, match=r"ce_teacher_target=argmax and teacher.top_k=0"):
            configured("loss={kd: 0, ce_teacher: 1, ce_teacher_target: argmax}", top_k=0)
        with pytest.raises(ValueError, match=r"does not score given text .*data.completions=teacher"):
            check(configured("data.completions=recorded"))
        check_resources(config, {"CPU": 2})
    with pytest.raises(ValueError, match="does not answer: .*start the server, or set teacher.address"):
        check(configured(max_model_len=64))


def test_other_vocabularies_are_refused_with_the_numbers(base: list[str], tiny_model_path: Path, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(tiny_model_path, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["strange"] = vocabulary.pop(list(vocabulary)[-1])
    tokenizer["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    number = check(configured(base)).student_vocab_size
    words = rf"have different vocabularies: {number} and {number} tokens, {number - 1} of the teacher's are.*lacks 1 tokens"
    with pytest.raises(ValueError, match=words):
        check(configured(base, f"student.model={other}"))


SENTINELS = "student.new_tokens={<bot>: start of thought, <eot>: '', <slot>: ''}"
STAGES = ["latent.stages=[{steps: 1, slots: 2, probability: 1}]", "loss.ce_teacher=1"]


def test_a_student_may_have_more_tokens_than_its_teacher_and_gets_rows_for_them(base: list[str], tmp_path: Path):
    plain, more = check(configured(base)), check(configured(base, SENTINELS))
    assert more.student_vocab_size == -(-(plain.student_vocab_size + 3) // 64) * 64
    new_rows = more.student_vocab_size - plain.student_vocab_size
    assert more.student_size.parameters == plain.student_size.parameters + 64 * new_rows
    full = ["loss.kd_support=full", "teacher.hidden_layers=[1]"]
    check(configured(base, SENTINELS, *full))
    check(configured(base, *full, "loss.kd_divergence=reverse_kl"))
    with pytest.raises(ValueError, match=r"kd_divergence=reverse_kl .*of 3 more tokens.* the divergence is infinite"):
        check(configured(base, SENTINELS, *full, "loss.kd_divergence=reverse_kl"))


def test_tokens_that_only_the_tokenizer_has_are_rows_to_add_or_a_mistake(
    base: list[str], tiny_model_path: Path, tmp_path: Path
):
    folder = tmp_path / "tokenizer"
    student_tokenizer(tiny_model_path, ["<bot>", "<eot>"]).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"2 tokens have no row, such as \['<bot>', '<eot>'\].* in student.new_tokens"):
        check(configured(base, f"student.tokenizer={folder}"))
    check(configured(base, f"student.tokenizer={folder}", SENTINELS))


@pytest.mark.parametrize(
    ("overrides", "missing"),
    [(STAGES, r"latent\.begin is '<bot>'"), (["loss.caws_compliance=1"], r"latent\.begin is '<bot>'")],
)
def test_tokens_that_losses_and_stages_need_are_asked_for_and_not_added_in_silence(
    base: list[str], overrides: list[str], missing: str
):
    with pytest.raises(ValueError, match=rf"{missing}, which the tokenizer .* does not have: add it to student.new_tokens"):
        check(configured(base, *overrides))
    check(configured(base, *overrides, SENTINELS))
    if overrides is STAGES:
        with pytest.raises(ValueError, match=r"latent\.slot is '<slot>'"):
            check(configured(base, *overrides, "student.new_tokens={<bot>: '', <eot>: ''}"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["loss.kd_support=full", "teacher.hidden_layers=[0]"], r"kd_support=full.*add 1 to teacher\.hidden_layers"),
        (["loss.intermediate_layer=1", "teacher.hidden_layers=[5]"], r"hidden_layers=\[5\].*has 2 layers"),
        (["loss.intermediate_layer=1", "teacher.hidden_layers=[1]", "loss.layer_map={0: 0}"], "layer_map compares with"),
    ],
)
def test_hidden_layers_that_a_loss_needs_are_checked(base: list[str], overrides: list[str], words: str):
    with pytest.raises(ValueError, match=words):
        check(configured(base, *overrides))
    check(configured(base, "loss.kd_support=full", "loss.intermediate_layer=1", "teacher.hidden_layers=[0, 1]"))


def test_an_lm_head_smaller_than_the_tokenizer_is_refused(base: list[str], tiny_model_path: Path, tmp_path: Path):
    other = tmp_path / "narrow"
    shutil.copytree(tiny_model_path, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(ValueError, match="LM head has 100 rows"):
        check(configured(base, f"student.model={other}"))


def test_a_student_with_a_shorter_context_than_the_teacher_is_refused(
    base: list[str], tiny_model_path: Path, tmp_path: Path
):
    other = tmp_path / "short"
    shutil.copytree(tiny_model_path, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    with pytest.raises(ValueError, match="teacher.max_model_len=64"):
        check(configured(base, f"student.model={other}"))
    check(configured(base, f"student.model={other}", "teacher.max_model_len=64"))


def test_an_end_of_turn_token_that_the_teacher_never_writes_is_refused_where_a_loss_looks_at_it(
    base: list[str], tiny_model_path: Path, tmp_path: Path
):
    other = tmp_path / "other-end"
    shutil.copytree(tiny_model_path, other)
    file = other / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "<|endoftext|>"}))
    check(configured(base, f"student.model={other}"))
    with pytest.raises(ValueError, match=r"loss.length_aware looks at '<\|endoftext\|>'.*ends its turns with .*im_end"):
        check(configured(base, f"student.model={other}", "loss.length_aware=1"))


def test_large_vocabularies_are_compared_once(base: list[str], monkeypatch: pytest.MonkeyPatch):
    compared = []

    def compare(*tokenizers):
        compared.append(tokenizers)
        return compare_vocabularies(*tokenizers)

    monkeypatch.setattr("raykd.training.preflight.compare_vocabularies", compare)
    check(configured(base, "loss.length_aware=1"))
    assert len(compared) == 1


def test_positions_whose_states_depend_on_the_length_of_the_batch_do_not_count(
    base: list[str], tiny_model_path: Path, tmp_path: Path
):
    other = tmp_path / "longrope"
    shutil.copytree(tiny_model_path, other)
    config = json.loads((other / "config.json").read_text())
    factors = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16, "original_max_position_embeddings": 32}
    rope = config["rope_parameters"] | {"rope_type": "longrope", "factor": 64.0, **factors}
    (other / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    with pytest.raises(ValueError, match="the student has 32 positions, the teacher up to"):
        check(configured(base, f"student.model={other}"))


def test_missing_prompts_and_models_are_named(base: list[str]):
    with pytest.raises(ValueError, match="data.prompts=/nowhere: nothing there"):
        check(configured(base, "data.prompts=/nowhere"))
    with pytest.raises(ValueError, match="data.held_out=/nowhere: nothing there"):
        check(configured(base, "data.held_out=/nowhere"))
    with pytest.raises(ValueError, match="/nowhere"):
        check(configured(base, "teacher.model=/nowhere"))
    with pytest.raises(ValueError, match="student.model"):
        check(configured(base, "student.model=/nowhere", "student.tokenizer=/nowhere"))


def test_an_empty_prompt_file_is_refused_before_anything_starts(base: list[str], tmp_path: Path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"data\.prompts: .*empty\.jsonl is empty"):
        check(configured(base, f"data.prompts={tmp_path / 'empty.jsonl'}"))


def test_a_k_larger_than_the_vocabulary_is_refused_though_the_head_has_padding_rows(
    base: list[str], student_path: Path, tmp_path: Path
):
    padded = tmp_path / "padded"
    shutil.copytree(student_path, padded)
    config = json.loads((padded / "config.json").read_text())
    (padded / "config.json").write_text(json.dumps(config | {"vocab_size": 128, "max_position_embeddings": 64}))
    models = [f"teacher.model={padded}", f"student.model={padded}", "student.random_weights=true"]
    with pytest.raises(ValueError, match="top_k=100 is more than the vocabulary's 64 tokens"):
        check(configured(base, *models, "teacher.top_k=100"))
    assert check(configured(base, *models, "teacher.top_k=64")).student_vocab_size == 128
    with pytest.raises(ValueError, match="top_k=200 is larger than the vocabulary of .*: 128 tokens"):
        check(configured(base, *models, "teacher.top_k=200"))


def test_more_than_the_cluster_has_is_refused_with_the_arithmetic(base: list[str]):
    with pytest.raises(ValueError, match="reserves 7.25 CPUs .* the cluster has 4"):
        check_resources(configured(base, "train.num_workers=6"), {"CPU": 4})
    with pytest.raises(ValueError, match=r"reserves 4.25 CPUs \(workers 3,.* the cluster has 4"):
        check_resources(configured(base, "train.num_workers=6", "train.min_workers=3"), {"CPU": 4})
    check_resources(configured(base, "train.num_workers=6", "train.min_workers=2"), {"CPU": 4})
    with pytest.raises(ValueError, match="reserves 2 GPUs .* the cluster has 0"):
        check_resources(configured(base, "train.num_workers=2", "train.use_gpu=true"), {"CPU": 64})
    with pytest.raises(ValueError, match="reserves 4 GPUs .*teachers 4.* the cluster has 1"):
        check_resources(configured(base, "teacher.num_replicas=4"), {"CPU": 64, "GPU": 1})


@pytest.fixture
def offline(tmp_path: Path) -> str:
    (tmp_path / "rows.jsonl").touch()
    return f"data.offline=[{{path: {tmp_path / 'rows.jsonl'}, weight: 2}}]"


def test_offline_files_alone_need_no_room_for_a_teacher_and_beside_prompts_readers_of_their_own(
    base: list[str], offline: str
):
    many = "teacher.num_replicas=50"
    check_resources(configured(base, offline, "data.prompts=null", many), {"CPU": 1.25})
    with pytest.raises(ValueError, match=r"reserves 51.5 CPUs \(workers 1, teachers 50, extractors 0.5\)"):
        check_resources(configured(base, offline, many), {"CPU": 1.25})


def test_missing_offline_files_are_named(base: list[str], offline: str):
    check(configured(base, offline))
    with pytest.raises(ValueError, match="data.offline: no file '/nowhere'"):
        check(configured(base, "data.offline=[{path: /nowhere}]"))
    with pytest.raises(ValueError, match=r"data.held_out \(without data.prompts\): no file '/nowhere'"):
        check(configured(base, offline, "data.prompts=null", "data.held_out=/nowhere"))


def test_the_summary_says_what_is_mixed(base: list[str], offline: str, capsys: pytest.CaptureFixture[str]):
    config = configured(base, offline, "train.sequences_per_step=8")
    print_summary(config, check(config), numbers={"prompts": 300, "offline": 100}, cluster=None)
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "prompts 300 for training in an epoch, 75.0% of every step (6 sequences)" in text
    assert "offline rows 100 for training in an epoch, 25.0% of every step (2 sequences)" in text
    assert "2 x /" in text
    assert "50 = 1 epochs x 50" in text
    alone = configured(base, offline, "data.prompts=null")
    print_summary(alone, check(alone), numbers=None, cluster=None)
    text = capsys.readouterr().out
    assert "counted when the run starts" in text
    assert "none is started" in text
    assert "teacher output" not in text


def test_collecting_needs_no_room_for_train_workers(base: list[str]):
    config = configured(base, "train.num_workers=6")
    check_resources(config, {"CPU": 4}, with_workers=False)
    with pytest.raises(ValueError, match="reserves 1.25 CPUs .workers 0,.* the cluster has 1"):
        check_resources(config, {"CPU": 1}, with_workers=False)


def test_too_little_disk_is_refused(base: list[str], monkeypatch: pytest.MonkeyPatch):
    nearly_full = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: nearly_full)
    plan = check(configured(base))
    with pytest.raises(ValueError, match="GiB free"):
        check_disk(configured(base), plan)


@pytest.mark.parametrize(
    ("overrides", "steps"), [([], 4), (["train.epochs=2"], 8), (["train.epochs=2", "train.max_steps=5"], 5)]
)
def test_the_number_of_steps_follows_from_prompts_and_epochs(base: list[str], overrides: list[str], steps: int):
    assert num_steps(configured(base, "train.sequences_per_step=32", *overrides), num_rows=100) == steps


def test_the_summary_shows_config_arithmetic_and_resources(base: list[str], capsys: pytest.CaptureFixture[str]):
    config = configured(base, "train.num_workers=2", "loss.tool_name=0.5")
    print_summary(config, check(config), numbers={"prompts": 100}, cluster={"CPU": 8})
    text = capsys.readouterr().out
    for word in ("sequences_per_step: 32", "32 sequences = 2 workers x 16", "4 = 1 epochs x 4", "0.5 x tool_name", "CPUs"):
        assert word in text
