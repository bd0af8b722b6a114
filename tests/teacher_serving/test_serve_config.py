"""What a shared teacher and its clients may be told, and what their commands say to what cannot work, before Ray starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from ray.serve.config import AutoscalingConfig

from teacher_serving import serve
from teacher_serving.config import RequestConfig, ServedTeacherConfig, VllmTeacherConfig
from teacher_serving.serve_config import ServeConfig
from teacher_serving.yaml_config import load

ROOT = Path(__file__).parents[2]
ENGINE = {"kind": "hf", "model": "m"}


def serve_config(**options: Any) -> ServeConfig:
    return ServeConfig.model_validate({"teacher": ENGINE} | options)


def test_whoever_is_not_on_this_machine_needs_a_key():
    for host in ("127.0.0.1", "::1", "localhost", "127.3.4.5"):
        assert serve_config(host=host).api_key_env is None
    for host in ("0.0.0.0", "::", "10.0.0.3", "node.example.org"):
        with pytest.raises(ValidationError, match=f"host={host} without api_key_env"):
            serve_config(host=host)
        assert serve_config(host=host, api_key_env="KEY").host == host


def test_what_has_no_effect_is_refused():
    with pytest.raises(ValidationError, match="does not ship hidden states"):
        serve_config(teacher=ENGINE | {"hidden_layers": [1]})
    refused: list[tuple[dict[str, Any], str]] = [
        ({}, "expected one of the two"),
        ({"app": "a", "address": "http://h:1"}, "expected one of the two"),
        ({"app": "a", "api_key_env": "KEY"}, "api_key_env=KEY with app=a has no effect"),
        ({"address": "host:8000"}, "expected http://HOST:PORT"),
        ({"app": "a", "weight_version": "2"}, "the service's own config has it"),
        ({"app": "a", "top_k": 0}, "greater than or equal to 1"),
    ]
    for options, words in refused:
        with pytest.raises(ValidationError, match=words):
            ServedTeacherConfig(tokenizer="t", **options)


def test_an_engine_is_added_when_those_there_are_full():
    few = ServeConfig(teacher=VllmTeacherConfig(model="m", max_num_seqs=64, batch_size=16, num_replicas=1, max_replicas=3))
    load_of = serve.scale(few)["autoscaling_config"]
    assert isinstance(load_of, AutoscalingConfig)
    assert (load_of.min_replicas, load_of.max_replicas, load_of.target_ongoing_requests) == (1, 3, 4.0)
    assert serve.scale(ServeConfig(teacher=VllmTeacherConfig(model="m", num_replicas=2))) == {"num_replicas": 2}


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "teacher").glob("*.yaml")), ids=lambda file: file.name)
def test_the_files_for_teachers_are_sound(file: Path):
    config = load(ServeConfig, [str(file)], [])
    assert config.host == "127.0.0.1"
    assert config.teacher.request == RequestConfig(
        top_k=config.teacher.top_k, sampling=config.teacher.sampling, max_model_len=config.teacher.max_model_len
    )


def test_files_and_overrides_make_a_config_or_one_clear_sentence(tmp_path: Path):
    file = tmp_path / "a.yaml"
    file.write_text("teacher: {kind: vllm, model: m, sampling: {max_tokens: 5}}\nport: 9000\n")
    config = load(ServeConfig, [str(file)], ["teacher.sampling.seed=3", "app=big"])
    assert (config.teacher.sampling.max_tokens, config.teacher.sampling.seed, config.app, config.port) == (5, 3, "big", 9000)
    for overrides, words in (
        (["prot=3"], "prot: no such option"),
        (["port=0"], "port: found 0"),
        (["teacher.kind=http"], "kind"),
        (["port={"], "the value is not YAML"),
    ):
        with pytest.raises(ValueError, match=words):
            load(ServeConfig, [str(file)], overrides)
    with pytest.raises(ValueError, match=r"found no file 'b.yaml'"):
        load(ServeConfig, ["b.yaml"], [])


def test_the_command_refuses_before_ray_starts(tmp_path: Path, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serve, "start_ray", lambda config: pytest.fail("Ray was started"))
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    file = tmp_path / "teacher.yaml"
    file.write_text(f"teacher: {{kind: hf, model: {tiny_model_path}}}\n")
    for override, words in (
        ("teacher.model=nowhere", "no model folder at nowhere"),
        ("teacher.top_k=256 teacher.max_model_len=4096", "max_model_len=4096 is longer than the model's 2048"),
        ("api_key_env=NO_SUCH_KEY", "api_key_env=NO_SUCH_KEY, but the environment has no such variable"),
    ):
        with pytest.raises(ValueError, match=words):
            serve.main(["--config", str(file), *override.split()])


def test_addresses_are_urls():
    assert serve.address_of(serve_config(port=81, route="/big")) == "http://127.0.0.1:81/big"
    assert serve.address_of(serve_config(host="::1")) == "http://[::1]:8000"
