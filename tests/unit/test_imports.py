"""The import rules of the design, and that importing a module has no effect."""

import ast
import graphlib
from pathlib import Path

import pytest

from tasks.stages.declarations import STAGES
from tests.conftest import ROOT

LEVELS = [
    {"errors", "sentences", "bounds", "yaml12", "seeding", "device", "storage"},
    {"diffusion", "networks", "data"},
    {"samplers", "training"},
    {"evaluation", "registry", "exchange", "serving", "pictures"},
    {"loading"},
    {"config"},
    {"proposal"},
]
WITHIN_A_LEVEL = {
    ("storage", "errors"),
    ("sentences", "errors"),
    ("yaml12", "errors"),
    ("registry", "serving"),  # the pyfunc flavour draws with the engine
}
CORE = {"diffusion", "networks", "samplers"}
BELOW = {
    "__init__": set(),
    "__main__": {"commands", "console"},
    "commands": {"stages", "service", "jobs", "cluster", "console"},
    "stages": {"cluster", "console"},
    "service": {"cluster", "console"},
    "jobs": {"cluster", "console"},
    "cluster": set(),
    "console": set(),
}
"""What each room of tasks/, and each file beside the rooms, may import of the others."""
IN_PIPELINE, IN_TASKS = (sorted((ROOT / name).rglob("*.py")) for name in ("pipeline", "tasks"))
FILES = [*IN_PIPELINE, *IN_TASKS]


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def unit(module: str) -> str | None:
    """`pipeline.data.images` -> `data`."""
    parts = module.split(".")
    return parts[1] if parts[0] == "pipeline" and len(parts) > 1 else None


def level(name: str) -> int:
    return next(i for i, names in enumerate(LEVELS) if name in names)


@pytest.mark.parametrize("path", IN_PIPELINE, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_go_downwards(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    imports = imported_modules(path)
    assert not {name for name in imports if name.split(".")[0] in ("tasks", "ray")}
    here = unit(module)
    for there in {unit(name) for name in imports} - {None, here}:
        assert here is not None and there is not None
        allowed = level(there) < level(here) or (here, there) in WITHIN_A_LEVEL
        assert allowed, f"{module} imports pipeline.{there}"
        if here in CORE:
            assert there in CORE | {"errors", "seeding", "device"}, (
                f"{module} imports pipeline.{there}"
            )


def test_no_modules_import_each_other_in_a_circle() -> None:
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
    graph = {}
    for name, path in modules.items():
        imported = imported_modules(path)
        # `from a import b` is of the module a.b where there is one, else of a
        packages = {each.rpartition(".")[0] for each in imported if each in modules}
        graph[name] = (imported & modules.keys()) - packages
    graphlib.TopologicalSorter(graph).prepare()  # its error names the circle


def test_only_the_registry_knows_mlflow() -> None:
    knowing = {
        path.relative_to(ROOT / "pipeline").parts[0]
        for path in IN_PIPELINE
        if any(name.split(".")[0] == "mlflow" for name in imported_modules(path))
    }
    assert knowing == {"registry"}


@pytest.mark.parametrize("path", IN_TASKS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_room_of_tasks_imports_a_sister_or_what_is_above_it(path: Path) -> None:
    here = path.relative_to(ROOT / "tasks").parts[0].removesuffix(".py")
    there = {name.split(".")[1] for name in imported_modules(path) if name.startswith("tasks.")}
    assert there - {here} <= BELOW[here]


def test_no_stage_knows_another_and_what_runs_them_knows_none() -> None:
    stages, running = {stage.name for stage in STAGES}, {"stage", "plan", "workflow"}
    paths = {path.stem: path for path in (ROOT / "tasks" / "stages").glob("*.py")}
    assert stages <= set(paths), "a stage's code is in the file of its name"
    del paths["declarations"]
    for name, path in paths.items():
        imports = imported_modules(path)
        theirs = {module.split(".")[2] for module in imports if module.startswith("tasks.stages.")}
        assert not theirs & (stages | {"declarations"}), name
        if name in stages:
            assert not theirs & {"plan", "workflow"}, name
        if name in running:
            assert not [stage for stage in stages if f'"{stage}"' in path.read_text()], name


def test_the_environment_is_read_in_two_places_only() -> None:
    readers = {
        path.relative_to(ROOT).as_posix()
        for path in FILES
        if any(word in path.read_text() for word in ("os.environ", "getenv"))
    }
    assert readers == {"tasks/__main__.py", "tasks/cluster.py"}


def test_no_file_reads_pickles() -> None:
    words = ("torch.load(", "pickle.load", "weights_only=False", "joblib")
    assert [path.name for path in FILES if any(word in path.read_text() for word in words)] == []
