"""infra/ without Docker or Kubernetes: its files hold to their schemas, and name what exists.

The published schemas are not part of this project: DDPM_SCHEMAS, or ../shared/schemas, is a folder
that has them.
"""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from pipeline.config import RunConfig, load_config
from pipeline.serving.api import ServingConfig
from tasks.cluster import ENVIRONMENT
from tasks.deployment import Service
from tasks.serve import APPLICATION, PATIENCE
from tests.conftest import ROOT, Workplace
from tests.kustomize import built, containers, documents, files_of, pod_templates

INFRA = ROOT / "infra"
KUBERNETES = INFRA / "kubernetes"
SCHEMAS = Path(os.environ.get("DDPM_SCHEMAS", ROOT.parent / "shared" / "schemas"))
BUILDS = sorted(
    path.parent.relative_to(KUBERNETES).as_posix()
    for path in KUBERNETES.rglob("kustomization.yaml")
    if documents(path)[0]["kind"] == "Kustomization"
)
PIPELINES = [name for name in BUILDS if name.endswith("pipeline")]
SERVICES = [name for name in BUILDS if name.endswith("serving")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINNED = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
)
IMAGE = f"{PROJECT['name']}:{PROJECT['version']}"
DOCKERFILE = (INFRA / "docker" / "Dockerfile").read_text()


def schema(name: str) -> Any:
    path = SCHEMAS / name
    if not path.exists():
        pytest.skip(f"{path} is not there: set DDPM_SCHEMAS to a folder with the published schemas")
    return json.loads(path.read_text())


def compose() -> Any:
    return yaml.safe_load((INFRA / "compose.yaml").read_text())


def of_kind(build: str, kind: str) -> dict[str, Any]:
    (found,) = (it for it in built(KUBERNETES / build) if it["kind"] == kind)
    return found


# --- schemas ------------------------------------------------------------------------------------


def test_every_file_can_be_parsed() -> None:
    files = [*INFRA.rglob("*.y*ml"), *(ROOT / ".github").rglob("*.y*ml")]
    assert len(files) > 20
    assert [path for path in files if not documents(path)] == []
    for path in INFRA.rglob("*.json"):
        assert json.loads(path.read_text())


def test_compose_holds_to_its_schema() -> None:
    validator = jsonschema.Draft7Validator(schema("compose-spec.json"))
    validator.validate(compose())
    broken = compose()
    broken["services"]["head"]["comand"] = broken["services"]["head"].pop("command")
    with pytest.raises(jsonschema.ValidationError, match="comand"):
        validator.validate(broken)


def with_defaults(value: Any, rule: dict[str, Any], path: str = "") -> Any:
    """Fill in a CRD's defaults, as the API server does before it validates.

    Raises:
        AssertionError: a key that the CRD does not have. The API server would drop it in silence.
    """
    if isinstance(value, list):
        return [
            with_defaults(it, rule.get("items", {}), f"{path}[{i}]") for i, it in enumerate(value)
        ]
    if not isinstance(value, dict):
        return value
    known = rule.get("properties", {})
    if "additionalProperties" not in rule and known:
        unknown = set(value) - set(known)
        assert not unknown, f"{path} has no {unknown}"
    others = rule.get("additionalProperties", {})
    defaults = {key: it["default"] for key, it in known.items() if "default" in it}
    return {
        key: with_defaults(
            it, known.get(key, others if isinstance(others, dict) else {}), f"{path}.{key}"
        )
        for key, it in {**defaults, **value}.items()
    }


def check_against_crd(it: dict[str, Any]) -> None:
    crd = schema(f"kuberay-{it['kind'].lower()}.json")
    assert it["apiVersion"] == f"{crd['group']}/{crd['version']}"
    rule = crd["schema"]
    # as in every CRD; the API server knows them
    rule["properties"] |= {"apiVersion": {}, "kind": {}, "metadata": {}}
    jsonschema.Draft202012Validator(rule).validate(with_defaults(it, rule, it["kind"]))


@pytest.mark.parametrize("build", [*PIPELINES, *SERVICES])
def test_kuberay_objects_hold_to_their_schema(build: str) -> None:
    it = of_kind(build, "RayJob" if build in PIPELINES else "RayService")
    check_against_crd(it)
    spec = it["spec"]
    cluster = spec.get("rayClusterSpec", spec.get("rayClusterConfig"))
    group = cluster["workerGroupSpecs"][0]
    container = group["template"]["spec"]["containers"][0]
    for where, key, value in [
        (spec, "backofLimit", 1),
        (container, "resource", {}),
        (group, "maxReplicas", "two"),
        (cluster["authOptions"], "mode", "tokens"),
    ]:
        before = dict(where)
        where[key] = value
        with pytest.raises((AssertionError, jsonschema.ValidationError)):
            check_against_crd(it)
        where.clear()
        where.update(before)


def test_the_cluster_launcher_takes_its_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = documents(INFRA / "vms" / "cluster.yaml")[0]
    validate_config(prepare_config({**config}))
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        validate_config(prepare_config({**config, "idle_timeout": 5}))


# --- kustomize ----------------------------------------------------------------------------------


def test_every_file_is_used_by_a_kustomization() -> None:
    used = {path.resolve() for build in BUILDS for path in files_of(KUBERNETES / build)}
    assert {path.resolve() for path in KUBERNETES.rglob("*.*")} == used


@pytest.mark.parametrize("build", BUILDS)
def test_kustomize_builds_what_is_tested_here(build: str) -> None:
    ours = built(KUBERNETES / build)
    if shutil.which("kubectl") is None:
        pytest.skip(
            "kubectl is not installed: only our own reading of the kustomization was tested"
        )
    output = subprocess.run(
        ["kubectl", "kustomize", str(KUBERNETES / build)], capture_output=True, text=True
    )
    assert output.returncode == 0, output.stderr
    theirs = list(yaml.safe_load_all(output.stdout))

    def key(it: dict[str, Any]) -> tuple[str, str]:
        return it["kind"], it["metadata"]["name"]

    assert sorted(ours, key=key) == sorted(theirs, key=key)


CLUSTER_WIDE = {"Namespace", "ResourceFlavor", "ClusterQueue"}


@pytest.mark.parametrize("build", BUILDS)
def test_objects_are_in_the_namespace_and_refer_to_what_is_there(build: str) -> None:
    platform = built(KUBERNETES / "base" / "platform")
    objects = built(KUBERNETES / build)
    everything = platform + objects
    for it in objects:
        where = it["metadata"].get("namespace")
        assert where == (None if it["kind"] in CLUSTER_WIDE else "ddpm"), it["metadata"]
    there = {(it["kind"], it["metadata"]["name"]) for it in everything}
    for name in found(objects, "configMapRef"):
        assert ("ConfigMap", name["name"]) in there
    for name in found(objects, "serviceAccountName"):
        assert ("ServiceAccount", name) in there
    for name in found(objects, "clusterQueue"):
        assert ("ClusterQueue", name) in there
    for it in objects:
        if it["kind"] == "ClusterQueue":
            (group,) = it["spec"]["resourceGroups"]
            for flavor in group["flavors"]:
                assert ("ResourceFlavor", flavor["name"]) in there
                assert [r["name"] for r in flavor["resources"]] == group["coveredResources"]
        labels = it["metadata"].get("labels", {})
        if "kueue.x-k8s.io/queue-name" in labels:
            assert ("LocalQueue", labels["kueue.x-k8s.io/queue-name"]) in there


def test_the_runbook_makes_every_secret_that_is_referred_to() -> None:
    runbook = (INFRA / "RUNBOOK.md").read_text()
    made = {
        name: set(re.findall(r"--from-(?:literal|file)=([\w.]+)", rest))
        for name, rest in re.findall(r"create secret generic (\S+) (.*)", runbook)
    }
    everything = [it for build in BUILDS for it in built(KUBERNETES / build)]
    for reference in found(everything, "secretKeyRef"):
        assert reference["key"] in made[reference["name"]]
    names = [it["name"] for it in found(everything, "secretRef")]
    names += [it["secretName"] for it in found(everything, "secret")]
    tokens = {it["secretName"] for it in found(everything, "authOptions")}
    assert tokens == {"ddpm-ray-token"} and made["ddpm-ray-token"] == {"auth_token"}
    assert {*names, *tokens} <= set(made)


def found(value: Any, key: str) -> list[Any]:
    """All values of a key, however deep."""
    if isinstance(value, list):
        return [it for inner in value for it in found(inner, key)]
    if not isinstance(value, dict):
        return []
    here = [value[key]] if key in value else []
    return here + [it for inner in value.values() for it in found(inner, key)]


@pytest.mark.parametrize("build", BUILDS)
def test_no_pod_may_do_more_than_it_must(build: str) -> None:
    for it in built(KUBERNETES / build):
        for template in pod_templates(it):
            pod = template["spec"]
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            for container in pod["containers"]:
                assert container["securityContext"]["allowPrivilegeEscalation"] is False
                assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
                assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
                assert "memory" in container["resources"]["limits"]


def test_ports_that_are_let_in_are_listened_on() -> None:
    everything = [it for build in BUILDS for it in built(KUBERNETES / build)]
    templates = [template for it in everything for template in pod_templates(it)]

    def selected(labels: dict[str, str]) -> list[dict[str, Any]]:
        them = [t for t in templates if t["metadata"]["labels"].items() >= labels.items()]
        assert them, f"no pod has {labels}"
        return them

    for it in everything:
        spec = it.get("spec", {})
        if it["kind"] == "Service":
            listened = ports_of(selected(spec["selector"]))
            assert {port.get("targetPort", port["port"]) for port in spec["ports"]} <= listened
        elif it["kind"] == "NetworkPolicy":
            listened = ports_of(selected(spec["podSelector"].get("matchLabels", {})))
            for rule in spec.get("ingress", []):
                assert {port["port"] for port in rule.get("ports", [])} <= listened
                for peer in rule["from"]:
                    labels = peer.get("podSelector", {}).get("matchLabels", {})
                    if "namespaceSelector" not in peer:
                        selected(labels)
        elif it["kind"] == "PodDisruptionBudget":
            selected(spec["selector"]["matchLabels"])


def ports_of(templates: list[dict[str, Any]]) -> set[Any]:
    """Numbers and names."""
    ports = [p for t in templates for c in t["spec"]["containers"] for p in c.get("ports", [])]
    return {port["containerPort"] for port in ports} | {port["name"] for port in ports}


# --- the pipeline and the service ---------------------------------------------------------------


def room(cluster: dict[str, Any], bound: str) -> dict[str, int]:
    """What the workers have together, with as few or as many as there may be."""
    (group,) = cluster["workerGroupSpecs"]
    resources = group["template"]["spec"]["containers"][0]["resources"]["requests"]
    each = {"cpus": int(resources["cpu"]), "gpus": int(resources.get("nvidia.com/gpu", 0))}
    return {kind: number * group[bound] for kind, number in each.items()}


def run_config(entrypoint: str) -> RunConfig:
    """The config of `ddpm run CONFIG --set ...`, as it is in the image."""
    program, verb, config, *options = shlex.split(entrypoint)
    assert (program, verb) == ("ddpm", "run")
    assert set(options[::2]) <= {"--set"}
    home, _, name = config.partition("configs/")
    assert home == "/home/ray/" and "WORKDIR /home/ray\n" in DOCKERFILE
    return load_config(str(ROOT / "configs" / name), options[1::2])


@pytest.mark.parametrize("build", PIPELINES)
def test_the_pipeline_s_config_exists_and_fits_into_its_cluster(build: str) -> None:
    from ray.runtime_env import RuntimeEnv

    spec = of_kind(build, "RayJob")["spec"]
    config = run_config(spec["entrypoint"])
    assert config.storage.startswith("s3://"), "no file is seen by all nodes"
    assert config.data.source.startswith(("builtin:", "s3://"))
    cluster, needs = spec["rayClusterSpec"], config.cluster
    least, most = room(cluster, "minReplicas"), room(cluster, "maxReplicas")
    for count, available in ((needs.min_workers, least), (needs.max_workers, most)):
        assert needs.cpus_per_worker * count <= available["cpus"]
        assert needs.gpus_per_worker * count <= available["gpus"]
    assert cluster.get("enableInTreeAutoscaling", False) == (least != most)
    environment = RuntimeEnv(**yaml.safe_load(spec["runtimeEnvYAML"]))
    # Ray refuses a driver that sets what its job has set
    assert not environment["env_vars"].keys() & ENVIRONMENT.keys()


def serve_config(build: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the Serve config, its only application)"""
    config = yaml.safe_load(of_kind(build, "RayService")["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    return config, application


@pytest.mark.parametrize("build", SERVICES)
def test_the_serve_config_names_the_service_and_it_fits_into_its_cluster(build: str) -> None:
    from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

    config, application = serve_config(build)
    # which takes misspelt keys without a word
    assert config.keys() <= ServeDeploySchema.model_fields.keys()
    assert application.keys() <= ServeApplicationSchema.model_fields.keys()
    assert config["http_options"].keys() <= HTTPOptionsSchema.model_fields.keys()
    deployed = ServeDeploySchema.model_validate(config)
    assert deployed.applications[0].name == APPLICATION

    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    service = Service.model_validate(application["args"])
    serving = ServingConfig.model_validate(service.serving)
    spec = of_kind(build, "RayService")["spec"]
    cluster = spec["rayClusterConfig"]
    least, most = room(cluster, "minReplicas"), room(cluster, "maxReplicas")
    assert isinstance(serving.replicas, list)
    for count, available in zip(serving.replicas, (least, most), strict=True):
        assert serving.cpus_per_replica * count <= available["cpus"]
        assert serving.gpus_per_replica * count <= available["gpus"]
    assert cluster.get("enableInTreeAutoscaling", False) == (least != most)
    assert spec["rayClusterDeletionDelaySeconds"] >= serving.max_seconds + PATIENCE
    for template in pod_templates(cluster):
        pod = template["spec"]
        if "tolerations" not in pod:  # of a spot node nothing asks how long it may take
            assert pod["terminationGracePeriodSeconds"] >= serving.max_seconds + PATIENCE
        (mount,) = (it for it in pod["containers"][0]["volumeMounts"] if it["name"] == "api-keys")
        assert service.api_keys == f"{mount['mountPath']}/keys.txt"
        ports = {port["name"]: port["containerPort"] for port in pod["containers"][0]["ports"]}
        assert ports["serve"] == deployed.http_options.port


@pytest.mark.ray
@pytest.mark.parametrize("build", SERVICES)
def test_ray_builds_the_application_of_the_serve_config(
    build: str, tiny: Workplace, tmp_path: Path
) -> None:
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build_app

    from tasks.deployment import application

    keys = tmp_path / "keys.txt"
    keys.write_text("ann ann-0123456789abcdef\n")
    args = serve_config(build)[1]["args"] | {
        "model": "digits@champion",
        "tracking_uri": f"sqlite:///{tiny.folder}/mlflow.db",
        "api_keys": str(keys),
    }
    ingress = build_app(application, args)._bound_deployment
    handle, reference, called, config, clients = ingress.init_args
    assert (str(reference), called, list(clients.values())) == (
        "digits@1",
        "digits@champion",
        ["ann"],
    )
    least, most = config.replicas
    autoscaling = handle._bound_deployment._deployment_config.autoscaling_config
    assert (autoscaling.min_replicas, autoscaling.max_replicas) == (least, most)
    # how the model was registered holds where the Serve config says nothing
    assert config.mode == "exact" and [least, most] == args["serving"]["replicas"]
    for wrong, sentence in [
        ({"serving": {"replica": 2}}, "serving.replica 2: extra inputs are not permitted"),
        ({"models": "digits@1"}, "models\n  Extra inputs are not permitted"),
        ({"model": "digits@99"}, "'digits' has no version or alias '99'"),
    ]:
        with pytest.raises(Exception, match=re.escape(sentence)):
            build_app(application, {**args, **wrong})


# --- versions, images, ports, variables -----------------------------------------------------------


def images() -> dict[str, list[str]]:
    """The images that are named anywhere, by the file that names them."""
    named = {"infra/compose.yaml": [it["image"] for it in compose()["services"].values()]}
    for build in BUILDS:
        objects = built(KUBERNETES / build)
        named[build] = [
            it["image"] for every in objects for it in containers(every) if "image" in it
        ]
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
        version
        for build in [*PIPELINES, *SERVICES]
        for version in found(built(KUBERNETES / build), "rayVersion")
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
        "head": {6379, 8265, 8000},  # Ray's, and that of `ddpm serve`
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

    assert inspect.signature(serve).parameters["port"].default in listening["head"]
    scraped = documents(INFRA / "monitoring" / "prometheus.yml")[0]["scrape_configs"][0]
    assert {it["port"] for it in scraped["dns_sd_configs"]} == {8080}
    assert {n for it in scraped["dns_sd_configs"] for n in it["names"]} <= services.keys()
    assert all("--metrics-export-port=8080" in services[n]["command"] for n in ("head", "worker"))


ELSEWHERE = {
    "POSTGRES_USER", "POSTGRES_DB", "POSTGRES_PASSWORD", "PGDATA",
    "GF_SECURITY_ADMIN_PASSWORD", "GF_USERS_ALLOW_SIGN_UP", "GF_ANALYTICS_REPORTING_ENABLED",
    "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES",
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
    for build in BUILDS:
        objects = built(KUBERNETES / build)
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
            assert (INFRA / source).is_file() if source.startswith(".") else source in volumes
    done: set[str] = set()
    while ready := {
        name
        for name in services.keys() - done
        if services[name].get("depends_on", {}).keys() <= done
    }:
        done |= ready
    assert done == services.keys(), "they wait for each other"


# --- the image ----------------------------------------------------------------------------------


def instructions(name: str) -> list[str]:
    """The instructions of a kind in the Dockerfile, their lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE)
    return re.findall(rf"^{name} (.*)$", re.sub(r"\\\n\s*", " ", text), re.MULTILINE)


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
