"""INT8 students served by real vLLM engines, beside the arithmetic of training and beside wrong ones. Engines start once."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from raykd.evaluation.serving import (
    ServingError,
    check_engine,
    check_serving,
    refer,
    require_int8_device,
    scores_of,
    serve,
    with_greedy_writing,
)
from raykd.evaluation.serving_report import (
    FLOAT32,
    Floor,
    Gates,
    Referred,
    Served,
    ServingReport,
    compare,
    gates_for,
    int8_gates,
)
from raykd.stage_config import QuantizationConfig
from raykd.student import quantization
from raykd.student.int8_arithmetic import ActivationGrid, Activations
from raykd.student.int8_files import export_int8, int8_names, load_int8_reference
from raykd.student.quantization import StoredInt8Linear
from teacher_serving.config import VllmTeacherConfig
from tests.conftest import DEMO_TEACHER
from tests.int8_model import ASYMMETRIC, SYMMETRIC, outlier_model, recovered_model, text, trained_model

KERNEL = "CPUInt8ScaledMMLinearKernel"
FLOAT_BFLOAT16, INT8_BFLOAT16 = "outliers, float, bfloat16", "outliers, bfloat16"


def sequences() -> list[np.ndarray]:
    """2540 tokens to be compared."""
    return [row.numpy() for row in text()[1][:20]]


def engine(folder: Path, dtype: str = "float32", **changes) -> VllmTeacherConfig:
    settings = {"max_model_len": 256, "max_num_seqs": 32, "kv_cache_memory_bytes": 64 << 20, "device": "cpu"}
    return VllmTeacherConfig.model_validate({"model": str(folder), "dtype": dtype, **settings, **changes})


def save_int8(folder: Path, model: nn.Module, config: QuantizationConfig, dtype: torch.dtype = torch.float32) -> Path:
    export_int8(model, folder, config, dtype=dtype)  # pyright: ignore[reportArgumentType]
    AutoTokenizer.from_pretrained(DEMO_TEACHER).save_pretrained(folder)
    return folder


def save_float(folder: Path, model) -> Path:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO_TEACHER).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("served")
    return {
        "plain": save_int8(path / "plain", trained_model(), SYMMETRIC),
        "plain, asymmetric": save_int8(path / "asymmetric", trained_model(), ASYMMETRIC),
        "outliers": save_int8(path / "outliers", outlier_model(), SYMMETRIC),
        "recovered": save_int8(path / "recovered", recovered_model(), SYMMETRIC),
        INT8_BFLOAT16: save_int8(path / "bfloat16", outlier_model(), SYMMETRIC, torch.bfloat16),
        FLOAT_BFLOAT16: save_float(path / "float", outlier_model()),
    }


@pytest.fixture(scope="module")
def served(folders) -> dict[str, Served]:
    dtypes = {name: "bfloat16" if name.endswith("bfloat16") else "float32" for name in folders}
    return {name: serve(with_greedy_writing(engine(folders[name], dtypes[name])), sequences()) for name in folders}


def report_of(folders: dict[str, Path], served: dict[str, Served], name: str) -> ServingReport:
    dtype = "bfloat16" if name.endswith("bfloat16") else "float32"
    referred = refer(str(folders[name]), dtype, sequences(), served[name].written, 1)
    report = compare(served[name], referred, int8_names(folders[name]), dtype)
    print(f"{name}: mean {report.mean:.2g}, p99 {report.p99:.2g}, max {report.max:.2g}, NLL {report.nll_difference:+.1g}, "
          f"greedy {report.greedy_agreement:.2%}, floor {report.floor}")  # fmt: skip
    return report


def against(served: Served, model: nn.Module) -> ServingReport:
    """A report with another reference."""
    return compare(served, scores_of(model, sequences(), served.written), [], "float32")  # pyright: ignore


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "plain, asymmetric", "outliers", "recovered"])
def test_in_float32_a_student_is_served_as_it_was_trained(folders, served, name):
    report = report_of(folders, served, name)
    assert report.num_tokens >= 2000
    assert report.problems(FLOAT32) == []
    assert report.max <= 0.2


@pytest.mark.vllm
def test_in_bfloat16_it_differs_little_more_than_the_float_student_does(folders, served):
    twin, report = (report_of(folders, served, name) for name in (FLOAT_BFLOAT16, INT8_BFLOAT16))
    assert report.problems(int8_gates("bfloat16", Floor(twin.mean, twin.p99))) == []
    assert twin.int8_layers == twin.kernels == []


@pytest.mark.vllm
def test_every_layer_of_the_policy_runs_on_the_int8_kernel(folders, served):
    names = [name for name, module in trained_model().named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    for name in ("plain", "plain, asymmetric", INT8_BFLOAT16):
        assert served[name].kernels == dict.fromkeys(names, KERNEL)
        assert int8_names(folders[name]) == sorted(names)


def half_steps(x: torch.Tensor, grid: ActivationGrid) -> Activations:
    """The grid of compressed-tensors: 127.5 steps to a side."""
    values = x.float()[:, None]
    scale = values.abs().amax(dim=2, keepdim=True) / 127.5
    return Activations((values / scale).round().clamp(-128, 127).to(torch.int8), scale, torch.zeros_like(scale))


@pytest.mark.vllm
def test_the_gate_rejects_other_arithmetic(folders, served, monkeypatch):
    """Weight-only, an asymmetric grid, and the grid of compressed-tensors, all from the same codes of the weights."""
    model = load_int8_reference(folders["outliers"])
    weight_only = copy.deepcopy(outlier_model())
    asymmetric = load_int8_reference(folders["outliers"])
    for name, module in model.named_modules():
        if isinstance(module, StoredInt8Linear):
            weight_only.get_parameter(f"{name}.weight").data = module.weight * module.weight_scale
            other = asymmetric.get_submodule(name)
            assert isinstance(other, StoredInt8Linear)
            other.grid = ActivationGrid(symmetric=False)
    controls = {"weight only": weight_only, "asymmetric": asymmetric, "float": outlier_model()}
    reports = {name: against(served["outliers"], control) for name, control in controls.items()}
    monkeypatch.setattr(quantization, "activation_codes", half_steps)
    reports["127.5 steps"] = against(served["outliers"], model)
    for name, report in reports.items():
        print(f"{name}: mean {report.mean:.2g}, p99 {report.p99:.2g}, NLL {report.nll_difference:+.2g}")
        assert len(report.problems(FLOAT32)) >= 2, name
        assert report.mean >= 8e-3, name


@pytest.mark.vllm
def test_int8_costs_a_plain_student_next_to_nothing_when_served(served):
    cost = against(served["plain"], trained_model()).nll_difference
    print(f"served NLL rises by {cost:.2g}")
    assert cost <= 1e-3


@pytest.mark.vllm
def test_what_training_recovers_is_recovered_when_served(served):
    """By the mean square of log-probabilities' differences from the float student, which falls with the divergence."""
    own = np.concatenate(scores_of(outlier_model(), sequences(), served["outliers"].written).logprobs)
    before, after = (np.concatenate(served[name].logprobs) - own for name in ("outliers", "recovered"))
    share = 1 - (after**2).mean() / (before**2).mean()
    print(f"served: {share:.1%} recovered; NLL {-before.mean():+.3g} -> {-after.mean():+.3g}")
    assert share >= 0.65


@pytest.mark.vllm
@pytest.mark.parametrize(("name", "limit"), [("plain", 2e-2), ("plain, asymmetric", 1e-3)])
def test_plain_transformers_are_near_but_no_judge(folders, served, name, limit):
    theirs = AutoModelForCausalLM.from_pretrained(folders[name], dtype="auto")
    report = against(served[name], theirs)
    print(f"transformers, {name}: mean {report.mean:.2g}")
    assert report.mean <= limit


@pytest.mark.vllm
@pytest.mark.ray
@pytest.mark.slow
def test_check_serving_starts_engines_of_its_own(folders, tmp_path, ray_cluster):
    """Without outliers, in bfloat16, INT8 is within three times of what two engines differ by in float."""
    int8 = save_int8(tmp_path / "int8", trained_model(), SYMMETRIC, torch.bfloat16)
    twin = save_float(tmp_path / "float", trained_model())
    report = check_serving(engine(int8, "bfloat16"), sequences(), float_folder=twin)
    print(f"plain, bfloat16: mean {report.mean:.2g}, NLL {report.nll_difference:+.1g}, floor {report.floor}")
    assert report.floor is not None
    assert report.problems(Gates(mean=3 * report.floor.mean, nll=1e-3)) == report.problems(gates_for(report)) == []
    assert report.kernels == [KERNEL]
    assert report.num_tokens == 20 * 127
    with pytest.raises(ServingError, match="found no float twin"):
        check_serving(engine(int8, "bfloat16"), sequences())


# --- figures and refusals -------------------------------------------------------------------------------------------------


def test_figures_of_a_report_by_hand():
    served = Served([np.array([-1.0, -2.0]), np.array([-0.5])], [np.array([1, 2])], {"a": "K"})
    referred = Referred([np.array([-1.1, -2.0]), np.array([-0.3])], [np.array([True, False])], Floor(1e-4, 1e-3))
    report = compare(served, referred, ["a", "b"], "float32")
    assert (report.num_tokens, report.greedy_agreement) == (3, 0.5)
    assert (report.mean, report.max) == (pytest.approx(0.1), pytest.approx(0.2))
    assert report.nll == pytest.approx(3.4 / 3)
    assert report.nll_difference == pytest.approx(0.1 / 3)  # served is less likely: 3.5 / 3
    assert (report.float_layers, report.kernels) == (["b"], ["K"])
    assert report.problems(FLOAT32) == [
        "mean difference of log-probabilities: found 0.1, expected at most 0.001",
        "its 99th percentile: found 0.2, expected at most 0.015",
        "difference of the mean likelihood: found 0.033, expected at most 0.0002",
        "greedy agreement: found 50.00%, expected at least 99%",
        "1 INT8 layers are served in float, such as b",
    ]
    assert report.problems(Gates(mean=0.2))[0].startswith("1 INT8 layers")


def test_gates_give_way_to_what_two_right_implementations_differ_by():
    assert int8_gates("float32", Floor(1e-5, 1e-4)) == FLOAT32
    assert int8_gates("float32", Floor(4e-3, 2e-2)) == Gates(8e-3, 4e-2, 4e-4, 0.99)
    assert int8_gates("bfloat16", Floor(5e-3, 3e-2)) == Gates(mean=3e-2, nll=2e-3)


@pytest.mark.vllm
def test_the_noise_floor_is_of_the_size_of_what_is_served(folders, served):
    """One flipped code moves later ones, the floor says how much: here nearly nothing, in deep models more than a gate."""
    report = report_of(folders, served, "outliers")
    assert report.floor is not None
    assert report.floor.mean < 1e-3
    assert report.mean < max(20 * report.floor.mean, 1e-4)


def test_what_cannot_be_compared_is_refused_before_an_engine_starts(folders, tmp_path):
    rows = sequences()[:1]
    shards = save_int8(tmp_path / "shards", trained_model(), QuantizationConfig(activation_shards=2))
    for settings, given, reason in (
        (engine(folders["plain"]), [], "found 0 sequences"),
        (engine(folders["plain"]), [np.array([1])], "each of 2 tokens or more"),
        (engine(folders["plain"], max_model_len=128), rows, "a sequence has 128 tokens, expected fewer than the 128"),
        (engine(folders["plain"], "auto"), rows, "found dtype=auto, expected float32 or bfloat16"),
        (engine(folders["plain"], "bfloat16"), rows, "for an INT8 model that was trained in float32"),
        (engine(shards), rows, "tensor_parallel_size=1 for an INT8 model with activation_shards=2"),
        (engine(folders["plain"], device="cuda", tensor_parallel_size=2), rows, "with activation_shards=1"),
    ):
        with pytest.raises(ServingError, match=reason):
            check_engine(settings, given)
    check_engine(engine(shards, device="cuda", tensor_parallel_size=2), rows)
    config = json.loads((shards / "config.json").read_text())
    del config["max_position_embeddings"]
    (shards / "config.json").write_text(json.dumps(config))
    check_engine(engine(shards, device="cuda", max_model_len=None, tensor_parallel_size=2), rows)  # its context is not known


def test_gpus_without_int8_kernels_and_an_int8_kv_cache_are_refused(folders):
    for capability in ((7, 5), (8, 0), (9, 0)):
        require_int8_device(capability)
    with pytest.raises(ServingError, match=r"compute capability 10.0: vLLM has INT8 kernels \(W8A8\) from Turing to Hopper"):
        require_int8_device((10, 0))
    with pytest.raises(
        ValueError, match="kv_cache_dtype"
    ):  # no option leads to it; on the CPU vLLM would take it and be wrong
        engine(folders["plain"], kv_cache_dtype="int8_per_token_head")
