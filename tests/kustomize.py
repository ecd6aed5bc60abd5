"""What `kubectl kustomize` builds from a folder, as far as infra/kubernetes uses it."""

import copy
from pathlib import Path
from typing import Any

import yaml

Objects = list[dict[str, Any]]


def documents(path: Path) -> list[Any]:
    """The YAML documents of a file."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]


def files_of(folder: Path) -> list[Path]:
    """The files that a kustomization uses, itself among them."""
    description = _description(folder)
    files = [folder / "kustomization.yaml"]
    for name in [*description.get("resources", []), *description.get("components", [])]:
        there = folder / name
        files += files_of(there) if there.is_dir() else [there]
    return files + [
        folder / patch["path"] for patch in description.get("patches", []) if "path" in patch
    ]


def built(folder: Path, before: Objects | None = None) -> Objects:
    """The objects of a kustomization.

    Args:
        before: what the components of this folder are added to.

    Raises:
        AssertionError: a key that is not understood, a patch without a target, a path that is not
            there.
    """
    description = _description(folder)
    known = {"apiVersion", "kind", "resources", "components", "patches", "images"}
    assert set(description) <= known, f"{folder}: {set(description) - known}"
    objects = list(before or [])
    for name in description.get("resources", []):
        there = folder / name
        objects += built(there) if there.is_dir() else documents(there)
    for name in description.get("components", []):
        objects = built(folder / name, objects)
    for patch in description.get("patches", []):
        text = patch["patch"] if "patch" in patch else (folder / patch["path"]).read_text()
        operations = yaml.safe_load(text)
        targets = [it for it in objects if _is_meant(it, patch["target"])]
        assert targets, f"{folder}: nothing is {patch['target']}"
        for target in targets:
            for operation in operations:
                _apply(target, copy.deepcopy(operation))
    for image in description.get("images", []):
        for container in (it for every in objects for it in containers(every)):
            if container["image"] == image["name"]:
                container["image"] = f"{image['name']}:{image['newTag']}"
    # nothing is shared: a patch of one place must not change another
    return [yaml.safe_load(_dump(it)) for it in objects]


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


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _dump(value: Any) -> str:
    return yaml.dump(value, Dumper=_Dumper)


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
    *way, last = operation["path"].removeprefix("/").split("/")
    for step in way:
        target = target[int(step) if isinstance(target, list) else step]
    if operation["op"] == "replace":
        assert last in target, f"{operation['path']} is not there"
    else:
        assert last not in target, f"{operation['path']} is there already"
    target[last] = operation["value"]
