"""configs/cluster/: files for KubeRay and Ray's cluster launcher that fit the run which they are for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from rich.console import Console

from raykd.cli import load_config
from raykd.config import Config
from raykd.training.flow import balanced, flow_panels
from raykd.training.resources import check_labels, check_resources
from teacher_serving.config import VllmTeacherConfig

FOLDER = Path(__file__).parents[2] / "configs" / "cluster"
LAUNCHER_SCHEMA = Path(ray.autoscaler.__file__).parent / "ray-schema.json"


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config([FOLDER / "qwen3_32b_to_1.7b.yaml"])


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text())


def pools_of_kuberay() -> list[tuple[int, dict[str, str], float]]:
    """Nodes, labels and GPUs a node of each group of workers."""
    groups = read("kuberay.yaml")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    containers = [group["template"]["spec"]["containers"][0] for group in groups]
    gpus = [float(container["resources"]["limits"]["nvidia.com/gpu"]) for container in containers]
    return [(group["replicas"], group["labels"], number) for group, number in zip(groups, gpus, strict=True)]


def pools_of_launcher() -> list[tuple[int, dict[str, str], float]]:
    types = read("aws.yaml")["available_node_types"]
    assert {types[name]["node_config"]["InstanceType"] for name in ("teacher", "trainer")} == {"p5.48xlarge"}
    return [(types[name]["min_workers"], types[name]["labels"], 8.0) for name in ("teacher", "trainer")]


@pytest.mark.parametrize("pools", [pools_of_kuberay(), pools_of_launcher()], ids=["kuberay", "aws"])
def test_the_run_fits_the_pools_that_are_started_for_it(config: Config, pools: list[tuple[int, dict[str, str], float]]):
    nodes = [labels for number, labels, _ in pools for _ in range(number)]
    total = sum(number * gpus for number, _, gpus in pools)
    check_labels(config, nodes)
    check_resources(config, {"GPU": total, "CPU": 64.0 * len(nodes)})
    in_pool = {labels["pool"]: number * gpus for number, labels, gpus in pools}
    teacher = config.teacher
    assert isinstance(teacher, VllmTeacherConfig)
    assert in_pool["teacher"] == teacher.num_replicas * teacher.tensor_parallel_size
    assert in_pool["trainer"] == config.train.num_workers
    found = balanced(config, int(total))
    assert (found.teachers, found.workers) == (teacher.num_replicas, config.train.num_workers)


def test_the_job_of_kuberay_runs_this_config_on_the_ray_that_is_installed():
    job = read("kuberay.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["spec"]["entrypoint"].endswith("raykd.train --config /opt/raykd/configs/cluster/qwen3_32b_to_1.7b.yaml")
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == ray.__version__
    yaml.safe_load(job["spec"]["runtimeEnvYAML"])


def test_the_launchers_file_is_one_by_rays_schema():
    jsonschema.validate(read("aws.yaml"), json.loads(LAUNCHER_SCHEMA.read_text()))
    wrong = read("aws.yaml")
    wrong["available_node_types"]["teacher"]["label"] = wrong["available_node_types"]["teacher"].pop("labels")
    with pytest.raises(jsonschema.ValidationError, match="label"):
        jsonschema.validate(wrong, json.loads(LAUNCHER_SCHEMA.read_text()))


def test_a_cluster_without_the_pool_is_told_apart_before_work_starts(config: Config):
    words = r"train\.node_labels=.*none of the 2 nodes.*ray start --labels pool=trainer"
    with pytest.raises(ValueError, match=words):
        check_labels(config, [{"pool": "teacher"}, {"ray.io/node-id": "1"}])
    check_labels(config, [{"pool": "teacher"}], with_workers=False)
    with pytest.raises(ValueError, match=r"teacher\.node_labels=null"):
        check_labels(config, [{"pool": "trainer"}])


def test_the_plan_of_the_run_shows_both_pools_at_the_configs_rates(config: Config):
    console = Console(width=160, record=True)
    console.print(*flow_panels(config))
    assert "engines that feed 8 workers: 16; the config has 14" in " ".join(console.export_text().split())
