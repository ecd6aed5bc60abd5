"""What infra/ has, as its tests look at it: YAML, the Dockerfile, and what kustomize builds."""

import copy
import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

from tests import needs
from tests.conftest import ROOT

Objects = list[dict[str, Any]]
INFRA = ROOT / "infra"
KUBERNETES = INFRA / "kubernetes"
SCHEMAS = Path(os.environ.get("DDPM_SCHEMAS", ROOT.parent / "shared" / "schemas"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINNED = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
)
DOCKERFILE = (INFRA / "docker" / "Dockerfile").read_text()


def documents(path: Path) -> list[Any]:
    """The YAML documents of a file."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]


def files_of(folder: Path) -> list[Path]:
    """The files that a kustomization uses, itself among them."""
    description = _description(folder)
    files = [folder / "kustomization.yaml"]
    for name in description.get("resources", []):
        there = folder / name
        files += files_of(there) if there.is_dir() else [there]
    return files + [folder / patch["path"] for patch in description.get("patches", [])]


def built(place: Path) -> Objects:
    """The objects of a kustomization, or of a file.

    Raises:
        AssertionError: a key that is not understood, a patch without a target, a path that is not
            there.
    """
    if place.is_file():
        # written out: YAML's aliases are one object, which a patch would change in several places
        return list(map(_written_out, documents(place)))
    folder, description = place, _description(place)
    known = {"apiVersion", "kind", "resources", "patches", "images"}
    assert set(description) <= known, f"{folder}: {set(description) - known}"
    objects = [it for name in description.get("resources", []) for it in built(folder / name)]
    for patch in description.get("patches", []):
        operations = yaml.safe_load((folder / patch["path"]).read_text())
        targets = [it for it in objects if _is_meant(it, patch["target"])]
        assert targets, f"{folder}: nothing is {patch['target']}"
        for target in targets:
            for operation in operations:
                _apply(target, copy.deepcopy(operation))
    for image in description.get("images", []):
        for container in (it for every in objects for it in containers(every)):
            if container["image"] == image["name"]:
                container["image"] = f"{image['name']}:{image['newTag']}"
    return objects


def containers(value: Any) -> list[dict[str, Any]]:
    """The containers anywhere in an object."""
    found: list[dict[str, Any]] = []
    if isinstance(value, dict):
        found += value.get("containers", []) + value.get("initContainers", [])
        for inner in value.values():
            found += containers(inner)
    elif isinstance(value, list):
        for inner in value:
            found += containers(inner)
    return found


def pod_templates(value: Any) -> list[dict[str, Any]]:
    """The pod templates anywhere in an object."""
    found: list[dict[str, Any]] = []
    if isinstance(value, dict):
        if "containers" in value.get("spec", {}) if isinstance(value.get("spec"), dict) else False:
            found.append(value)
        for inner in value.values():
            found += pod_templates(inner)
    elif isinstance(value, list):
        for inner in value:
            found += pod_templates(inner)
    return found


def _written_out(value: Any) -> Any:
    """A copy in which no two places are one object."""
    if isinstance(value, dict):
        return {key: _written_out(inner) for key, inner in value.items()}
    return [_written_out(inner) for inner in value] if isinstance(value, list) else value


def _description(folder: Path) -> dict[str, Any]:
    (description,) = documents(folder / "kustomization.yaml")
    assert isinstance(description, dict)
    return description


def _is_meant(it: dict[str, Any], target: dict[str, str]) -> bool:
    group, _, version = it["apiVersion"].rpartition("/")
    facts = {"group": group, "version": version, "kind": it["kind"], "name": it["metadata"]["name"]}
    return all(facts[key] == value for key, value in target.items())


def _apply(target: Any, operation: dict[str, Any]) -> None:
    """One operation of a JSON patch (RFC 6902)."""
    assert operation["op"] in ("add", "replace"), operation
    steps = operation["path"].removeprefix("/").split("/")
    *way, last = (step.replace("~1", "/").replace("~0", "~") for step in steps)
    for step in way:
        target = target[int(step) if isinstance(target, list) else step]
    if operation["op"] == "replace":
        assert last in target, f"{operation['path']} is not there"
    else:
        assert last not in target, f"{operation['path']} is there already"
    target[last] = operation["value"]


def found(value: Any, key: str) -> list[Any]:
    """All values of a key, however deep."""
    if isinstance(value, list):
        return [it for inner in value for it in found(inner, key)]
    if not isinstance(value, dict):
        return []
    here = [value[key]] if key in value else []
    return here + [it for inner in value.values() for it in found(inner, key)]


def instructions(name: str) -> list[str]:
    """The instructions of a kind in the Dockerfile, their lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE)
    return re.findall(rf"^{name} (.*)$", re.sub(r"\\\n\s*", " ", text), re.MULTILINE)


def compose(name: str = "compose.yaml") -> Any:
    return yaml.safe_load((INFRA / name).read_text())


def schema(name: str) -> Any:
    """A published one, or a skip."""
    path = SCHEMAS / name
    if not path.exists():
        needs.SCHEMAS.skip()
    return json.loads(path.read_text())


BUILDS = ["base", "gpu-spot"]
FILES = sorted(path.name for path in KUBERNETES.glob("*.yaml"))
"""What is applied by itself."""
