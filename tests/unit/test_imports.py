"""The import rules of the design, and that importing a module has no effect."""

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

LEVELS = [
    {"errors", "seeding", "device", "storage"},
    {"diffusion", "networks", "data"},
    {"samplers", "training"},
    {"evaluation", "registry", "exchange", "serving", "pictures"},
    {"loading"},
    {"config"},
    {"proposal"},
]
WITHIN_A_LEVEL = {
    ("storage", "errors"),
    ("registry", "serving"),  # the pyfunc flavour draws with the engine
}
CORE = {"diffusion", "networks", "samplers"}
FILES = sorted([*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "tasks").rglob("*.py")])
STAGES = {"preprocess", "reference", "train", "evaluate", "register", "sample"}


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


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_go_downwards(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    imports = imported_modules(path)
    if module.startswith("pipeline"):
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
    else:
        here = module.removeprefix("tasks.")
        theirs = {name.split(".")[1] for name in imports if name.startswith("tasks.")}
        if here in STAGES:
            above = {"stages", "plan", "workflow", "__main__"}
            assert not theirs & (STAGES | above), f"{module} imports a stage"
        if here in ("stage", "plan", "workflow"):
            assert not theirs & (STAGES | {"stages"}), f"{module} imports a stage"
            assert not [name for name in STAGES if f'"{name}"' in path.read_text()]


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


@pytest.mark.parametrize(
    ("folder", "page"), [("pipeline", "README.md"), ("tasks", "tasks/README.md")]
)
def test_a_page_names_every_module(folder: str, page: str) -> None:
    text, modules = (ROOT / page).read_text(), (ROOT / folder).rglob("*.py")
    assert [p.name for p in modules if p.name != "__init__.py" and p.name not in text] == []
