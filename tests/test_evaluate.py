import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
import yaml

from raykd.config import Config
from raykd.demo.corpus import write_prompts
from raykd.demo.offline import generate_rows
from raykd.evaluate import _split_models, find_model, main, print_results
from raykd.evaluation.models import ModelFiles
from raykd.evaluation.report import write_report
from raykd.evaluation.results import load_completions, load_results
from raykd.evaluation.runner import evaluate
from raykd.sample_config import LatentConfig
from raykd.stage_config import QuantizationConfig
from raykd.student.heads import make_heads, save_heads
from tests.conftest import save_tiny_model
from tests.moved_ids import save_moved
from tests.training.tiny_run import make_config, make_rows, run, save_student


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


def write_drafts(path: Path) -> None:
    rows = [row for row in generate_rows(12, 0, "held_out") if row["id"].endswith("refinement")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.vllm
@pytest.mark.ray
@pytest.mark.slow
def test_every_model_is_judged_on_the_same_prompts_through_the_engine(
    tmp_path, settings, tiny_model_path, ray_cluster, capsys
):
    """The judged student is the teacher itself, so that what must come out is known; it also has heads, untrained ones."""
    folder = tmp_path / "runs" / "judged" / "report"
    save_heads(make_heads(64, {"halt": 1.0, "self_evaluation": 1.0}), tmp_path / "heads.safetensors")
    write_drafts(tmp_path / "drafts.jsonl")
    settings["evaluate"] |= {"refinements": str(tmp_path / "drafts.jsonl"), "max_refined": 2, "num_timed": 2}
    config = Config.model_validate(settings)
    results = evaluate(config, {"student": ModelFiles(tiny_model_path, tmp_path / "heads.safetensors")}, folder)
    teacher, student, untrained = (results.models[name] for name in ("teacher", "student", "untrained"))

    assert student.metrics["kl"].value == pytest.approx(0.0, abs=1e-3)
    assert student.metrics["top1_agreement"].value > 0.98  # half-precision scores may tie
    assert student.metrics["perplexity"].value == pytest.approx(teacher.metrics["perplexity"].value, rel=1e-3)
    assert untrained.metrics["kl"].value > 0.1
    assert untrained.metrics["perplexity"].value > student.metrics["perplexity"].value
    assert student.fingerprint == teacher.fingerprint != untrained.fingerprint
    assert "kl" not in teacher.metrics
    assert teacher.metrics["call_decision"].num_prompts == results.data["num_prompts"] == 6
    assert all(model.metrics["caws_compliance"].num_prompts == 6 for model in results.models.values())
    assert all(model.metrics["first_call_tokens"].value == math.inf for model in results.models.values())  # random models

    weights = (tiny_model_path / "model.safetensors").stat().st_size
    assert all(model.facts["weight_bytes"] == weights for model in results.models.values())
    for model in results.models.values():
        assert model.facts["tokens_per_s"] > 0
        assert 0 < model.facts["first_token_s"] <= model.facts["first_token_s_p95"] < math.inf
        assert model.facts["first_call_s"] == math.inf
        assert " cores, " in model.machine
    assert student.metrics["halt_oracle_loops"].num_prompts == results.data["refinements"]["num_rows"] == 4
    assert {"halt_auc", "halt_ece", "halt_brier", "halt_loops", "refine_loops", "self_evaluation_ece"} <= set(
        student.metrics
    )
    assert student.metrics["refine_loops"].num_prompts == 2
    assert not any(name.startswith(("halt", "refine")) for name in {**teacher.metrics, **untrained.metrics})

    rows = load_completions(folder)
    assert all(row["completions"]["teacher"] == row["completions"]["student"] for row in rows)
    assert any(row["completions"]["teacher"] != row["completions"]["untrained"] for row in rows)
    assert load_results(folder) == results
    assert not (folder / "made").exists()

    print_results(results)
    printed = capsys.readouterr().out
    for words in ("untrained", "halting: AUC", "tokens a second", "∞"):
        assert words in printed
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
    moved = ModelFiles(tmp_path / "moved")
    models = {"student": moved, "int8": ModelFiles(tmp_path / "moved", quantization=QuantizationConfig())}
    results = evaluate(Config.model_validate(settings), models, tmp_path / "report")
    metrics = results.models["student"].metrics
    assert metrics["kl"].value == pytest.approx(0.0, abs=1e-3)
    assert metrics["perplexity"].value == pytest.approx(results.models["teacher"].metrics["perplexity"].value, rel=1e-3)
    assert results.models["untrained"].metrics["kl"].value > 0.1
    int8 = results.models["int8"]  # of stage qat: the folder has its float weights, but it is judged as INT8
    assert metrics["kl"].value + 1e-4 < int8.metrics["kl"].value < 0.1
    assert int8.facts["weight_bytes"] < 0.65 * results.models["student"].facts["weight_bytes"]
    assert int8.path == results.models["student"].path
    assert int8.fingerprint != results.models["student"].fingerprint
    rows = load_completions(tmp_path / "report")
    assert all(row["completions"]["teacher"] == row["completions"]["student"] for row in rows)
    assert any(row["completions"]["teacher"] != row["completions"]["untrained"] for row in rows)


def test_a_run_without_a_checkpoint_is_refused_before_anything_starts(tmp_path, settings):
    with pytest.raises(ValueError, match="found no checkpoint"):
        main(command_line(tmp_path, settings))


def test_a_model_that_is_not_there_is_refused_before_anything_starts(tmp_path, settings):
    with pytest.raises(ValueError, match=r"'student': found no Hugging Face model in .*nowhere"):
        evaluate(Config.model_validate(settings), {"student": ModelFiles(tmp_path / "nowhere")}, tmp_path)
    settings["teacher"]["model"] = str(tmp_path / "no-teacher")
    with pytest.raises(ValueError, match="no model folder"):
        evaluate(Config.model_validate(settings), {}, tmp_path)


def test_a_model_with_another_vocabulary_is_refused(tmp_path, settings, demo_tokenizer):
    path = save_tiny_model(tmp_path / "other", demo_tokenizer, seed=0)
    tokenizer = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["added_tokens"][-1]["special"] = not tokenizer["added_tokens"][-1]["special"]
    (path / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(ValueError, match="different vocabularies"):
        evaluate(Config.model_validate(settings), {"student": ModelFiles(path)}, tmp_path)


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
        evaluate(Config.model_validate(settings), {"student": ModelFiles(tiny_model_path)}, tmp_path / "out")


def test_without_held_out_prompts_nothing_is_judged(tmp_path, settings, tiny_model_path):
    settings["data"]["held_out"] = None
    with pytest.raises(ValueError, match=r"data\.held_out is not set"):
        evaluate(Config.model_validate(settings), {"student": ModelFiles(tiny_model_path)}, tmp_path / "out")


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


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a run of four steps with a halt head, with checkpoints after steps 2 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    save_student(folder / "student")
    config = make_config(folder / "student", loss={"halt": 0.1}, train={"checkpoint_every": 2})
    run(config, folder / "run", [make_rows(32)])
    return folder / "run"


def change_config(checkpoint: Path, **sections) -> None:
    """Change the config in state.json, and its hash in the manifest with it."""
    state = json.loads((checkpoint / "state.json").read_text())
    state["config"] |= sections
    content = json.dumps(state).encode()
    (checkpoint / "state.json").write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_a_run_is_its_newest_checkpoint_and_brings_its_heads(trained, tiny_model_path):
    checkpoints = trained / "checkpoints"
    newest, older = (checkpoints / f"checkpoint-{step}" for step in (4, 2))
    assert find_model(trained) == ModelFiles(newest / "student", newest / "heads.safetensors")
    assert find_model(older) == ModelFiles(older / "student", older / "heads.safetensors")
    assert find_model(newest / "student") == ModelFiles(newest / "student")  # a plain folder, without what lies beside it
    assert find_model(tiny_model_path) == ModelFiles(tiny_model_path)


def test_a_model_is_found_without_its_optimizer(trained, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-4"
    shutil.copytree(trained / "checkpoints" / "checkpoint-4", checkpoint)
    (checkpoint / "optimizer.safetensors").unlink()
    assert find_model(tmp_path / "run") == ModelFiles(checkpoint / "student", checkpoint / "heads.safetensors")


def test_a_checkpoint_of_stage_qat_is_int8_once_its_layers_are(trained):
    checkpoint = trained / "checkpoints" / "checkpoint-2"
    stages = [{"steps": 1, "slots": 2, "probability": 0.5}]
    change_config(checkpoint, stage="qat", quantization={"symmetric_activations": False}, latent={"stages": stages})
    found = find_model(checkpoint)
    assert found.quantization == QuantizationConfig(symmetric_activations=False)
    assert found.precision == "float32"
    assert found.latent == LatentConfig.model_validate({"stages": stages})
    change_config(checkpoint, quantization={"start_step": 2})
    assert find_model(checkpoint).quantization is None


def test_a_damaged_checkpoint_is_refused(trained):
    with (trained / "checkpoints" / "checkpoint-4" / "heads.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"heads\.safetensors has .* bytes, the manifest says"):
        find_model(trained)


def test_refinements_without_a_head_to_judge_are_refused(tmp_path, settings, tiny_model_path):
    write_drafts(tmp_path / "drafts.jsonl")
    settings["evaluate"]["refinements"] = str(tmp_path / "drafts.jsonl")
    with pytest.raises(ValueError, match="none of student has a halt or a self-evaluation head: train with loss.halt"):
        evaluate(Config.model_validate(settings), {"student": ModelFiles(tiny_model_path)}, tmp_path / "out")
