import json
from pathlib import Path

import pytest
import yaml

from raykd.config import Config
from raykd.demo.corpus import write_prompts
from raykd.evaluate import _split_models, main, print_results
from raykd.evaluation.report import write_report
from raykd.evaluation.results import load_completions, load_results
from raykd.evaluation.runner import evaluate
from tests.conftest import save_tiny_model
from tests.moved_ids import save_moved


@pytest.fixture
def settings(tmp_path, tiny_model_path) -> dict:
    write_prompts(tmp_path / "held_out.jsonl", 12, 0, "held_out")
    return {
        "run": {"name": "judged", "dir": str(tmp_path / "runs"), "seed": 1},  # tiny_model_path is of seed 0
        "teacher": {
            "kind": "vllm",
            "model": str(tiny_model_path),
            "top_k": 32,
            "dtype": "float32",
            "max_model_len": 1024,
            "max_num_seqs": 8,
            "kv_cache_memory_bytes": 64 << 20,
            "device": "cpu",
        },
        "student": {"model": str(tiny_model_path), "random_weights": True},
        "data": {"prompts": str(tmp_path / "train.jsonl"), "held_out": str(tmp_path / "held_out.jsonl")},
        "evaluate": {"max_tokens": 16, "max_prompts": 6, "num_bootstrap": 50},
    }


def command_line(tmp_path: Path, settings: dict) -> list[str]:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return ["--config", str(path)]


@pytest.mark.vllm
@pytest.mark.ray
@pytest.mark.slow
def test_every_model_is_judged_on_the_same_prompts_through_the_engine(
    tmp_path, settings, tiny_model_path, ray_cluster, capsys
):
    """The judged student is the teacher itself, so that what must come out is known."""
    folder = tmp_path / "runs" / "judged" / "report"
    config = Config.model_validate(settings)
    results = evaluate(config, {"student": tiny_model_path}, folder)
    teacher, student, untrained = (results.models[name] for name in ("teacher", "student", "untrained"))

    assert student.metrics["kl"].value == pytest.approx(0.0, abs=1e-3)
    assert student.metrics["top1_agreement"].value > 0.98  # half-precision scores may tie
    assert student.metrics["perplexity"].value == pytest.approx(teacher.metrics["perplexity"].value, rel=1e-3)
    assert untrained.metrics["kl"].value > 0.1
    assert untrained.metrics["perplexity"].value > student.metrics["perplexity"].value
    assert student.fingerprint == teacher.fingerprint != untrained.fingerprint
    assert "kl" not in teacher.metrics
    assert teacher.metrics["call_decision"].num_prompts == results.data["num_prompts"] == 6

    rows = load_completions(folder)
    assert all(row["completions"]["teacher"] == row["completions"]["student"] for row in rows)
    assert any(row["completions"]["teacher"] != row["completions"]["untrained"] for row in rows)
    assert load_results(folder) == results
    assert not (folder / "untrained").exists()

    print_results(results)
    assert "untrained" in capsys.readouterr().out
    assert write_report(tmp_path / "runs" / "judged", 3).is_file()


@pytest.mark.ray
def test_a_student_under_other_ids_is_asked_and_judged_in_its_own(tmp_path, settings, tiny_model_path, ray_cluster):
    """It is the teacher itself, its ids shuffled; the untrained student has more tokens than the teacher."""
    settings["teacher"] = {
        "kind": "hf",
        "model": str(tiny_model_path),
        "dtype": "float32",
        "top_k": 32,
        "max_model_len": 1024,
        "device": "cpu",
        "sampling": {"stop_token_ids": list(range(0, 1000, 9))},  # a random model never writes its real end token
    }
    settings["student"]["new_tokens"] = {"<bot>": "start of thought"}
    settings["evaluate"]["max_prompts"] = 3
    save_moved(tmp_path / "moved", tiny_model_path, extra=())
    results = evaluate(Config.model_validate(settings), {"student": tmp_path / "moved"}, tmp_path / "report")
    metrics = results.models["student"].metrics
    assert metrics["kl"].value == pytest.approx(0.0, abs=1e-3)
    assert metrics["perplexity"].value == pytest.approx(results.models["teacher"].metrics["perplexity"].value, rel=1e-3)
    assert results.models["untrained"].metrics["kl"].value > 0.1
    rows = load_completions(tmp_path / "report")
    assert all(row["completions"]["teacher"] == row["completions"]["student"] for row in rows)
    assert any(row["completions"]["teacher"] != row["completions"]["untrained"] for row in rows)


def test_a_run_without_a_checkpoint_is_refused_before_anything_starts(tmp_path, settings):
    with pytest.raises(ValueError, match="found no checkpoint"):
        main(command_line(tmp_path, settings))


def test_a_model_that_is_not_there_is_refused_before_anything_starts(tmp_path, settings):
    with pytest.raises(ValueError, match=r"'student': found no Hugging Face model in .*nowhere"):
        evaluate(Config.model_validate(settings), {"student": tmp_path / "nowhere"}, tmp_path)
    settings["teacher"]["model"] = str(tmp_path / "no-teacher")
    with pytest.raises(ValueError, match="no model folder"):
        evaluate(Config.model_validate(settings), {}, tmp_path)


def test_a_model_with_another_vocabulary_is_refused(tmp_path, settings, demo_tokenizer):
    path = save_tiny_model(tmp_path / "other", demo_tokenizer, seed=0)
    tokenizer = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["added_tokens"][-1]["special"] = not tokenizer["added_tokens"][-1]["special"]
    (path / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(ValueError, match="different vocabularies"):
        evaluate(Config.model_validate(settings), {"student": path}, tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "nothing there"),
        ("", "is empty"),
        ('{"messages": 3}\n', "1 of 1 held-out rows"),
        ('{"prompt": "x", "gold_calls": {"name": "f"}}\n', "gold_calls is dict .*, expected a list of calls"),
        ('{"prompt": "x", "gold_calls": [{"arguments": {}}]}\n', "expected .* or {name, arguments}"),
        ('{"prompt": "x", "gold_calls": [{"name": "f", "arguments": "?"}]}\n', "found arguments '.', expected an object"),
        ('{"prompt": "x", "gold_values": {"a": 1}}\n', "gold_values is dict, expected a list"),
        (f'{{"prompt": "{"word " * 2000}"}}\n', "expected at most 1008"),
    ],
)
def test_held_out_prompts_that_cannot_be_used_are_an_error_and_no_number(
    tmp_path, settings, tiny_model_path, content, reason
):
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    settings["data"]["held_out"] = str(path)
    with pytest.raises(ValueError, match=reason):
        evaluate(Config.model_validate(settings), {"student": tiny_model_path}, tmp_path / "out")


def test_without_held_out_prompts_nothing_is_judged(tmp_path, settings, tiny_model_path):
    settings["data"]["held_out"] = None
    with pytest.raises(ValueError, match=r"data\.held_out is not set"):
        evaluate(Config.model_validate(settings), {"student": tiny_model_path}, tmp_path / "out")


@pytest.mark.parametrize("word", ["folder", "=folder", "student=x"])
def test_models_are_named_on_the_command_line(tmp_path, settings, word):
    with pytest.raises(ValueError, match=r"--models: "):
        main([*command_line(tmp_path, settings), "--models", word])


def test_models_and_overrides_come_in_any_order():
    argv = ["--models", "a=x", "b=y", "run.name=n", "--config", "c.yaml", "train.epochs=2", "--models", "c=z/0.5"]
    models, rest = _split_models(argv)
    assert list(models.items()) == [("a", Path("x")), ("b", Path("y")), ("c", Path("z/0.5"))]
    assert rest == ["--config", "c.yaml", "train.epochs=2", "run.name=n"]


def test_a_report_of_nothing_is_refused(tmp_path, settings):
    with pytest.raises(ValueError, match="found no run"):
        main([*command_line(tmp_path, settings), "--report-only"])
    (tmp_path / "runs" / "judged").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"neither metrics\.jsonl nor"):
        main([*command_line(tmp_path, settings), "--report-only"])
