"""What a run takes of the cluster, and whether the cluster has it: CPUs, GPUs, nodes with the labels of its pools.

In:  Config; the resources and the labels of the nodes, as Ray tells them. Out: ValueError before anything starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rich.table import Table

from raykd.config import Config
from teacher_serving.connect import resolve_device


class ResourceError(ValueError):
    """The cluster does not have what the run takes."""


@dataclass(frozen=True)
class Resources:
    """Logical CPUs, or GPUs, that the run reserves."""

    workers: float
    teachers: float
    extractors: float

    @property
    def together(self) -> float:
        return self.workers + self.teachers + self.extractors


def reserved(config: Config, *, has_gpu: bool) -> dict[str, Resources]:
    """CPUs and GPUs that the run reserves at most; `has_gpu`: whether the cluster has any (for device=auto).

    Without prompts there is no teacher.
    """
    train, data = config.train, config.data
    teacher = resolve_device(config.teacher, has_gpu=has_gpu)
    replicas = (teacher.max_replicas or teacher.num_replicas) if data.prompts else 0
    kinds = bool(data.prompts) + bool(data.offline)
    return {
        "CPU": Resources(
            workers=train.num_workers * train.cpus_per_worker,
            teachers=replicas * teacher.num_cpus,
            extractors=kinds * data.num_extractors * data.extractor_cpus,
        ),
        "GPU": Resources(
            workers=train.num_workers if train.use_gpu else 0, teachers=replicas * teacher.gpus_per_actor, extractors=0
        ),
    }


def check_resources(config: Config, cluster: Mapping[str, float], *, with_workers: bool = True) -> None:
    """Compare what is reserved, with train workers (the fewest that an elastic run takes) or without, with what the cluster
    has. Errors: ResourceError."""
    fewest = (config.train.min_workers or config.train.num_workers) if with_workers else 0
    for name, needed in reserved(config, has_gpu=cluster.get("GPU", 0) > 0).items():
        needed = replace(needed, workers=needed.workers * fewest / config.train.num_workers)
        available = cluster.get(name, 0.0)
        if needed.together > available:
            raise ResourceError(
                f"the run reserves {needed.together:g} {name}s (workers {needed.workers:g}, teachers {needed.teachers:g}, "
                f"extractors {needed.extractors:g}), the cluster has {available:g}: lower train.num_workers, "
                "teacher.num_replicas or what each of them reserves, or add nodes"
            )


def check_labels(config: Config, nodes: Sequence[Mapping[str, str]], *, with_workers: bool = True) -> None:
    """Every pool that is placed by labels finds a node; `nodes`: the labels of each. Errors: ResourceError."""
    pools = {"teacher": config.teacher.node_labels if config.data.prompts else None}
    pools |= {"train": config.train.node_labels} if with_workers else {}
    for section, wanted in pools.items():
        if wanted and not any(wanted.items() <= labels.items() for labels in nodes):
            text = ",".join(f"{name}={value}" for name, value in wanted.items())
            raise ResourceError(
                f"{section}.node_labels={wanted}: none of the {len(nodes)} nodes has these labels: start some with "
                f"`ray start --labels {text}`, or leave them out ({section}.node_labels=null)"
            )


def resources_table(config: Config, cluster: Mapping[str, float] | None) -> Table:
    """What the run reserves, beside what the cluster has; None: no cluster is running."""
    table = Table(box=None)
    for column in ("", "train workers", "teachers", "extractors", "together", "cluster has"):
        table.add_column(column, justify="right" if column else "left")
    for name, needed in reserved(config, has_gpu=bool(cluster and cluster.get("GPU"))).items():
        has = "no cluster is running" if cluster is None else f"{cluster.get(name, 0):g}"
        table.add_row(
            f"{name}s", f"{needed.workers:g}", f"{needed.teachers:g}", f"{needed.extractors:g}", f"{needed.together:g}", has
        )
    return table
