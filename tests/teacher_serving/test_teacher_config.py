"""A teacher's options refuse what cannot work."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from teacher_serving.access import BudgetConfig
from teacher_serving.config import HfTeacherConfig, HttpTeacherConfig, TeacherConfig, VllmTeacherConfig
from teacher_serving.connect import resolve_device


def test_kind_chooses_the_teacher():
    adapter = TypeAdapter(TeacherConfig)
    assert isinstance(adapter.validate_python({"kind": "vllm", "model": "m"}), VllmTeacherConfig)
    assert isinstance(adapter.validate_python({"kind": "hf", "model": "m"}), HfTeacherConfig)
    api = {"kind": "http", "address": "https://host/v1", "model": "m", "tokenizer": "t"}
    assert isinstance(adapter.validate_python(api), HttpTeacherConfig)
    with pytest.raises(ValidationError, match="kind"):
        adapter.validate_python({"kind": "oracle", "model": "m"})


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"topk": 5}, "topk"),
        ({"top_k": 257}, "top_k"),
        ({"sampling": {"top_p": 0.9}}, "temperature"),
        ({"num_replicas": 3, "max_replicas": 2}, "max_replicas"),
        ({"device": "cpu", "num_gpus": 1}, "num_gpus"),
        ({"device": "cpu", "tensor_parallel_size": 2}, "tensor_parallel_size"),
        ({"num_gpus": 1, "tensor_parallel_size": 2}, "tensor_parallel_size"),
        ({"hidden_layers": (3,), "tensor_parallel_size": 2}, "hidden_layers=.3. with tensor_parallel_size=2"),
    ],
)
def test_what_cannot_work_is_refused_by_name(options: dict, word: str):
    with pytest.raises(ValidationError, match=word):
        VllmTeacherConfig(model="m", **options)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"address": "localhost:8000"}, "expected http://HOST:PORT/v1"),
        ({"address": "http://me:secret@localhost/v1"}, "address of localhost holds credentials"),
        ({"api_key_env": "sk-me:secret"}, "api_key_env is no name of an environment variable"),
        ({"budget": {"max_cost": 5}}, "max_cost=5 with prompt_price=None and completion_price=None"),
        ({"hidden_layers": (1,)}, "hidden_layers"),
    ],
)
def test_what_an_api_cannot_be_is_refused_by_name(options: dict, word: str):
    with pytest.raises(ValidationError, match=word) as caught:
        HttpTeacherConfig.model_validate({"address": "http://localhost:8000/v1", "model": "m", "tokenizer": "t", **options})
    assert "me:secret" not in caught.value.errors()[0]["msg"]


@pytest.mark.parametrize("layers", [(1, 0), (0, 0), (-1,)])
def test_hidden_layers_are_named_once_and_in_order(layers: tuple[int, ...]):
    assert HfTeacherConfig(model="m", hidden_layers=(0, 3)).hidden_layers == (0, 3)
    with pytest.raises(ValidationError, match="rising order"):
        HfTeacherConfig(model="m", hidden_layers=layers)


def test_an_actor_asks_for_the_gpus_its_engine_spreads_over_and_for_none_on_the_cpu():
    config = VllmTeacherConfig(model="m", tensor_parallel_size=4)
    assert resolve_device(config, has_gpu=True).gpus_per_actor == 4
    assert resolve_device(HfTeacherConfig(model="m"), has_gpu=True).gpus_per_actor == 1
    assert resolve_device(VllmTeacherConfig(model="m"), has_gpu=False).gpus_per_actor == 0
    assert resolve_device(VllmTeacherConfig(model="m", num_gpus=0.5), has_gpu=True).gpus_per_actor == 0.5
    with pytest.raises(ValidationError, match="cuda"):
        resolve_device(config, has_gpu=False)


def test_every_option_is_explained():
    for model in (VllmTeacherConfig, HfTeacherConfig, HttpTeacherConfig, BudgetConfig):
        unexplained = [name for name, field in model.model_fields.items() if not field.description and name != "kind"]
        assert not unexplained
