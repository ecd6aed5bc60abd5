"""infra/ without Docker: compose, the image, the cluster launcher, and what all of infra/ names."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import ValidationError

from tasks.cluster import ENVIRONMENT
from tests.conftest import ROOT
from tests.infra import (
    BUILDS,
    DOCKERFILE,
    FILES,
    INFRA,
    KUBERNETES,
    PINNED,
    PROJECT,
    built,
    compose,
    containers,
    documents,
    found,
    instructions,
)
from tests.infra_models import Compose


def test_every_file_can_be_parsed() -> None:
    files = [*INFRA.rglob("*.y*ml"), *(ROOT / ".github").rglob("*.y*ml")]
    assert len(files) > 20
    assert [path for path in files if not documents(path)] == []
    for path in INFRA.rglob("*.json"):
        assert json.loads(path.read_text())


def check_compose(described: dict[str, Any]) -> None:
    Compose.model_validate({key: it for key, it in described.items() if not key.startswith("x-")})


def test_compose_has_known_keys_of_their_types() -> None:
    check_compose(compose())
    check_compose(more := compose("compose.gpu.yaml"))
    assert more["services"].keys() <= compose()["services"].keys()
    for key, value in [("comand", ["ray"]), ("restart", "never"), ("ports", 8265), ("init", "yes")]:
        broken = compose()
        broken["services"]["head"][key] = value
        with pytest.raises(ValidationError, match=key):
            check_compose(broken)


def test_the_cluster_launcher_takes_its_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = documents(INFRA / "vms" / "cluster.yaml")[0]
    validate_config(prepare_config({**config}))
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        validate_config(prepare_config({**config, "idle_timeout": 5}))


def images() -> dict[str, list[str]]:
    """The images that are named anywhere, by the file that names them."""
    named = {"infra/compose.yaml": [it["image"] for it in compose()["services"].values()]}
    for place in (*BUILDS, "upgrade.yaml"):
        objects = built(KUBERNETES / place)
        named[place] = [it["image"] for every in objects for it in containers(every)]
    named["cluster.yaml"] = [documents(INFRA / "vms" / "cluster.yaml")[0]["docker"]["image"]]
    for name in ("Makefile", ".github/workflows/ci.yml", "infra/docker/Dockerfile"):
        named[name] = re.findall(rf"\b{PROJECT['name']}:[\w.-]+", (ROOT / name).read_text())
    named["FROM"] = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    return named


def test_every_image_has_one_tag_and_ours_is_this_version() -> None:
    tags: dict[str, set[str]] = {}
    for file, names in images().items():
        assert names, f"{file} names no image"
        for image in names:
            name, colon, tag = image.partition(":")
            assert colon and re.search(r"\d", tag) and "latest" not in tag, f"{file}: {image}"
            tags.setdefault(name, set()).add(tag)
    assert {name: len(of) for name, of in tags.items()} == dict.fromkeys(tags, 1), tags
    assert tags[PROJECT["name"]] == {PROJECT["version"]}
    assert {"python", "postgres", "chrislusf/seaweedfs"} <= tags.keys()


def test_ray_and_python_are_the_versions_that_are_tested() -> None:
    import ray

    named = {
        version for build in BUILDS for version in found(built(KUBERNETES / build), "rayVersion")
    }
    assert named == {PINNED["ray"]} == {ray.__version__}
    assert "FROM python:3.11." in DOCKERFILE
    assert PROJECT["requires-python"] == ">=3.11"
    workflow = documents(ROOT / ".github" / "workflows" / "ci.yml")[0]
    assert set(found(workflow, "python-version")) == {"3.11"}


def test_the_image_has_what_worker_processes_are_given() -> None:
    settings = dict(re.findall(r"\b([A-Z_]+)=(\S+)", " ".join(instructions("ENV"))))
    assert settings.items() >= ENVIRONMENT.items()


def test_ports_are_those_of_the_programs() -> None:
    """And no address names a port at which nothing listens."""
    import ray._private.ray_constants as constants

    services = compose()["services"]
    head = " ".join(services["head"]["command"])
    assert f"--port={constants.DEFAULT_PORT}" in head
    assert f"--dashboard-port={constants.DEFAULT_DASHBOARD_PORT}" in head
    agent = f"127.0.0.1:{constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT}/"
    assert agent in services["worker"]["healthcheck"]["test"][-1]
    listening = {
        "head": {6379, 8265},
        "serve": {8000},
        "mlflow": {5000},
        "s3": {8333},
        "postgres": {5432},
        "prometheus": {9090},
        "grafana": {3000},
    }
    named = {
        name: set(map(int, re.findall(r"port=(\d+)", " ".join(it.get("command", [])))))
        for name, it in services.items()
    }
    assert named["mlflow"] == listening["mlflow"] and named["s3"] == listening["s3"]
    assert named["head"] - {8080} <= listening["head"]
    assert "--num-cpus=0" in services["head"]["command"]
    texts = [*INFRA.rglob("*.y*ml"), INFRA / "RUNBOOK.md"]
    for path in texts:
        for host, port in re.findall(r"[/@\s\"=]([a-z0-9-]+):(\d{4,5})\b", path.read_text()):
            if host in listening:
                assert int(port) in listening[host], f"{path.name}: {host}:{port}"
    for name, service in services.items():
        for published in service.get("ports", []):
            address, outside, inside = published.split(":")
            assert address == "127.0.0.1", "open to this machine only"
            assert outside == inside and int(inside) in listening[name]
    import inspect

    from tasks.commands.service import serve

    assert inspect.signature(serve).parameters["port"].default in listening["serve"]
    scraped = documents(INFRA / "monitoring" / "prometheus.yml")[0]["scrape_configs"][0]
    assert {it["port"] for it in scraped["dns_sd_configs"]} == {8080}
    nodes = {n for it in scraped["dns_sd_configs"] for n in it["names"]}
    assert nodes == {
        n for n, it in services.items() if "ray" in " ".join(it.get("command", [])[:3])
    }
    assert all("--metrics-export-port=8080" in " ".join(services[n]["command"]) for n in nodes)


ELSEWHERE = {
    "POSTGRES_USER", "POSTGRES_DB", "POSTGRES_PASSWORD", "PGDATA",
    "GF_SECURITY_ADMIN_PASSWORD", "GF_USERS_ALLOW_SIGN_UP", "GF_ANALYTICS_REPORTING_ENABLED",
    "HOME", "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES",
    "PIP_NO_CACHE_DIR", "PIP_DISABLE_PIP_VERSION_CHECK", "PIP_ROOT_USER_ACTION", "PYTHONUNBUFFERED",
}  # fmt: skip
"""Variables of programs that are not installed here."""


def test_every_environment_variable_is_read_by_something() -> None:
    import botocore
    import mlflow
    import ray

    packages = {
        botocore: ["configprovider.py", "credentials.py"],
        mlflow: ["environment_variables.py", "cli/__init__.py", "utils/cli_args.py"],
        ray: ["_private/authentication/authentication_token_setup.py"],
    }
    files = [ROOT / "tasks" / "__main__.py", ROOT / "tasks" / "cluster.py"]
    files += [Path(it.__file__).parent / name for it, names in packages.items() for name in names]
    read = "".join(path.read_text() for path in files)
    known = set(re.findall(r"[\"'](\w+)[\"']", read)) | set(re.findall(r"^(\w+) =", read, re.M))
    known |= ENVIRONMENT.keys() | ELSEWHERE
    used = set(re.findall(r"\b([A-Z_]+)=", " ".join(instructions("ENV"))))
    for service in compose()["services"].values():
        used |= service.get("environment", {}).keys()
    for place in (*BUILDS, *FILES):
        objects = built(KUBERNETES / place)
        used |= {it["name"] for c in containers(objects) for it in c.get("env", [])}
        for it in objects:
            used |= it.get("data", {}).keys() if it["kind"] == "ConfigMap" else set()
            if it["kind"] == "RayJob":
                used |= yaml.safe_load(it["spec"]["runtimeEnvYAML"])["env_vars"].keys()
    assert len(used) > 25
    assert used - known == set()


def test_the_secrets_of_compose_are_those_of_the_example_which_has_no_value_of_them() -> None:
    asked = set(re.findall(r"\$\{(\w+):\?", (INFRA / "compose.yaml").read_text()))
    lines = (INFRA / ".env.example").read_text().splitlines()
    example = dict(line.split("=") for line in lines if line and not line.startswith("#"))
    assert asked == example.keys()
    assert {name for name, value in example.items() if value} == {"AWS_ACCESS_KEY_ID"}
    assert "infra/.env" in (ROOT / ".gitignore").read_text().splitlines()


def test_compose_starts_what_exists_in_an_order_that_ends() -> None:
    described = compose()
    services, volumes = described["services"], described["volumes"]
    for name, service in services.items():
        for other, how in service.get("depends_on", {}).items():
            needed = {"service_healthy": "healthcheck", "service_completed_successfully": "command"}
            assert needed[how["condition"]] in services[other], f"{name} waits for {other}"
        if service.get("restart") != "no":
            assert "healthcheck" in service, name
        for mount in service.get("volumes", []):
            source, _, _ = mount.partition(":")
            assert (INFRA / source).exists() if source.startswith(".") else source in volumes
    done: set[str] = set()
    while ready := {
        name
        for name in services.keys() - done
        if services[name].get("depends_on", {}).keys() <= done
    }:
        done |= ready
    assert done == services.keys(), "they wait for each other"


def test_the_dockerfile_is_sound() -> None:
    known = "FROM|ARG|RUN|ENV|WORKDIR|COPY|USER|CMD"
    text = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    lines = [line for line in text.splitlines() if line.strip()]
    assert [line for line in lines if not re.match(rf"({known}) ", line)] == []
    assert not [line for line in lines if line.startswith("ADD")]
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", instructions("FROM")[-1])
    assert instructions("USER")[-1] == "1000"
    assert lines.index(f"USER {instructions('USER')[-1]}") > max(
        i for i, line in enumerate(lines) if line.startswith("RUN")
    )
    assert isinstance(json.loads(instructions("CMD")[-1]), list)
    for run in instructions("RUN"):
        if "apt-get install" in run:
            assert "apt-get update" in run and "--no-install-recommends" in run
            assert "rm -rf /var/lib/apt/lists/*" in run
        for install in re.findall(r"pip install [^&]*", run):
            assert "-c constraints.txt" in install or "--no-deps" in install
    assert "PIP_NO_CACHE_DIR=1" in DOCKERFILE
    for argument in instructions("ARG"):
        name = argument.partition("=")[0]
        assert re.search(rf"\${{?{name}\b", "".join(instructions("RUN"))), f"{name} is not used"
        assert name in (ROOT / "Makefile").read_text()
    assert "useradd --uid 1000" in DOCKERFILE
    # as which `ray up` copies its files, and with what
    assert "HOME=/home/ray" in instructions("ENV")[0] and "WORKDIR /home/ray\n" in DOCKERFILE
    assert {"openssh-client", "rsync", "wget"} <= set(" ".join(instructions("RUN")).split())


def test_what_is_copied_exists_and_is_let_through() -> None:
    let_in = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"
    }
    copied = set()
    for copy in instructions("COPY"):
        *sources, _ = [word for word in copy.split() if not word.startswith("--")]
        copied |= set(sources)
    assert all((ROOT / source).exists() for source in copied)
    assert copied == let_in
    extras = set(re.findall(r"'\.\[(\w+)\]'", DOCKERFILE))
    assert extras and extras <= PROJECT["optional-dependencies"].keys()
    for requirement in PROJECT["optional-dependencies"]["server"]:
        assert re.match(r"[\w-]+", requirement)[0] in PINNED, "what the image adds is pinned"
