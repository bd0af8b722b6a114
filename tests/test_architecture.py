"""The rules of the code base that a machine can check: who imports whom, file sizes, the README's file map."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("raykd", "teacher_serving") for path in (ROOT / folder).rglob("*.py"))

ROWS = {  # lower rows may not import higher ones; row 2's rooms may not import one another, nor row 3's
    0: ("raykd/loss_config.py", "raykd/code_version.py", "raykd/ray_metrics.py"),
    0.5: ("raykd/sample_config.py", "raykd/stage_config.py", "raykd/tune_config.py", "raykd/cluster_config.py"),
    1: ("raykd/types.py", "raykd/config.py", "raykd/vocabulary.py"),
    1.5: ("raykd/config_errors.py",),
    2: ("raykd/data/", "raykd/student/", "raykd/losses/", "raykd/tracing.py", "raykd/demo/", "raykd/cli.py"),
    3: ("raykd/training/", "raykd/evaluation/"),
    4: ("raykd/train.py", "raykd/evaluate.py", "raykd/export.py", "raykd/collect.py"),
    5: ("raykd/tune.py",),  # a sweep begins as collect does, and its trials are runs of train
}
ONLY_IN = {
    "vllm": tuple(f"teacher_serving/vllm_{part}.py" for part in ("engine", "arrays", "states", "kernels")),
    "ray.train": ("raykd/training/distributed.py", "raykd/training/worker.py", "raykd/train.py", "raykd/tune.py"),
    "ray.tune": ("raykd/tune.py",),
    "ray.serve": tuple(f"teacher_serving/{part}.py" for part in ("serve", "gateway", "served_client")),
    "starlette": ("teacher_serving/gateway.py",),
    "optuna": ("raykd/training/search_space.py",),
    "ray.data": (
        "raykd/data/stream.py",
        "raykd/data/lead.py",
        "raykd/data/offline_stream.py",
        "raykd/data/sources.py",
        "teacher_serving/actor.py",
        "raykd/collect.py",
    ),
    "wandb": ("raykd/tracing.py",),
    "tensorboard": ("raykd/tracing.py",),
    "torch.utils.tensorboard": ("raykd/tracing.py",),
    "matplotlib": ("raykd/evaluation/report.py", "raykd/evaluation/sweep_report.py"),  # of a run; of a sweep
}
WITHOUT_RAY_AND_VLLM = (
    "raykd/losses/",
    "raykd/student/",
    "raykd/training/loop.py",
    "raykd/types.py",
    "raykd/config.py",
    "raykd/loss_config.py",
    "raykd/sample_config.py",
    "raykd/stage_config.py",
    "raykd/tune_config.py",
    "raykd/cluster_config.py",
)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[str]:
    """Absolute names of everything a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def file_of(module: str) -> str | None:
    """Path of one of our modules, given the dotted name of it or of something in it."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        base = ROOT.joinpath(*parts[:length])
        if base.with_suffix(".py").exists():
            return name_of(base.with_suffix(".py"))
        if (base / "__init__.py").exists():
            return name_of(base) + "/"
    return None


def room_of(name: str) -> tuple[float, str]:
    for row, rooms in ROWS.items():
        for room in rooms:
            if name.startswith(room):
                return row, room
    raise AssertionError(f"{name} is in no row of ROWS")


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_go_downwards_only(path: Path):
    name = name_of(path)
    if name.endswith("__init__.py") and path.stat().st_size == 0:
        return
    for module in imports(path):
        top = module.split(".")[0]
        if name.startswith("teacher_serving/"):
            assert top != "raykd", f"{name} imports {module}: teacher_serving stands alone"
        elif top == "raykd" and (target := file_of(module)) not in (None, "raykd/"):
            row, room = room_of(name)
            target_row, target_room = room_of(target)
            same_room = room == target_room
            assert same_room or target_row < row, f"{name} (row {row}) imports {target} (row {target_row})"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_each_library_is_imported_only_where_it_belongs(path: Path):
    name = name_of(path)
    for module in imports(path):
        for library, homes in ONLY_IN.items():
            if module == library or module.startswith(library + "."):
                assert name in homes, f"{name} imports {module}, which belongs in {', '.join(homes)}"
        if name.startswith(WITHOUT_RAY_AND_VLLM):
            assert module.split(".")[0] not in ("ray", "vllm"), f"{name} imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_stay_readable(path: Path):
    text = path.read_text()
    assert text.count("\n") <= 400, f"{name_of(path)} has more than 400 lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= 70, f"{name_of(path)}: {node.name} has {lines} lines"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_is_swallowed(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else ""
            blanket = caught in ("", "Exception", "BaseException")
            raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            # Another thread may be waiting for the error: handing it over is no swallowing.
            hands_over = any(isinstance(inner, ast.Name) and inner.id == node.name for inner in ast.walk(node))
            assert not blanket or raises or hands_over, f"{name_of(path)}:{node.lineno}: catches everything and goes on"
            assert "ImportError" not in caught, f"{name_of(path)}:{node.lineno}: optional import"


def test_packages_have_empty_init_files():
    for path in SOURCES:
        if path.name == "__init__.py" and name_of(path) != "raykd/losses/__init__.py":
            assert path.stat().st_size == 0, f"{name_of(path)} is not empty"


def test_the_file_map_of_the_readme_is_complete_and_true():
    text = (ROOT / "README.md").read_text()
    section = text[text.index("## File map") :]
    listed = set(re.findall(r"^\s*`?((?:raykd|teacher_serving|configs|scripts)/[\w./]+)`?", section, flags=re.MULTILINE))
    listed |= set(re.findall(r"\| `((?:raykd|teacher_serving|configs|scripts)/[\w./]+)`", section))
    files = {
        name_of(path)
        for folder in ("raykd", "teacher_serving", "configs", "scripts")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml", ".sh") and path.name != "__init__.py"
    }
    files.add("raykd/losses/__init__.py")
    assert files - listed == set(), "files that the README's map lacks"
    assert {name for name in listed if not (ROOT / name).exists()} == set(), "names in the map that do not exist"
