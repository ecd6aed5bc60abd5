"""infra/kubernetes without Kubernetes: its objects hold to their schemas and fit together."""

import contextlib
import importlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from safetensors.torch import save

from pipeline.config import RunConfig, load_config
from pipeline.registry.folder import model_files
from pipeline.registry.registration import register
from pipeline.registry.runs import TrackedRun
from pipeline.registry.store import make_client
from pipeline.samplers.model import ModelSpec
from pipeline.serving.config import ServingConfig
from tasks.cluster import ENVIRONMENT
from tasks.service.application import APPLICATION, PATIENCE
from tasks.service.deployment import Service
from tests import needs
from tests.conftest import ROOT
from tests.infra import (
    BUILDS,
    DOCKERFILE,
    FILES,
    INFRA,
    KUBERNETES,
    built,
    files_of,
    found,
    pod_templates,
)
from tests.infra_models import KUBERAY, PodTemplate


def everything(*places: str) -> list[dict[str, Any]]:
    """The objects of kustomizations and files."""
    return [it for place in places for it in built(KUBERNETES / place)]


def of_kind(build: str, kind: str) -> dict[str, Any]:
    (found,) = (it for it in built(KUBERNETES / build) if it["kind"] == kind)
    return found


@pytest.mark.parametrize("kind", ["RayJob", "RayService"])
@pytest.mark.parametrize("build", BUILDS)
def test_kuberay_objects_have_known_keys_of_their_types(build: str, kind: str) -> None:
    it, model = of_kind(build, kind), KUBERAY[kind]
    model.model_validate(it)
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
        with pytest.raises(ValidationError, match=key):
            model.model_validate(it)
        where.clear()
        where.update(before)


def test_pods_that_are_not_ray_s_have_known_keys_of_their_types() -> None:
    objects = [it for it in everything("base", *FILES) if not it["kind"].startswith("Ray")]
    templates = [template for it in objects for template in pod_templates(it)]
    assert len(templates) == 3
    for template in templates:
        PodTemplate.model_validate(template)
    templates[0]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(ValidationError, match="readinesProbe"):
        PodTemplate.model_validate(templates[0])


def test_every_file_is_used_by_a_kustomization_or_is_applied_by_itself() -> None:
    used = {path.resolve() for build in BUILDS for path in files_of(KUBERNETES / build)}
    files = {path.resolve() for path in KUBERNETES.rglob("*.*") if path.is_file()}
    assert files == used | {KUBERNETES / name for name in FILES}


def test_the_runbook_applies_every_part_and_every_file() -> None:
    runbook = (INFRA / "RUNBOOK.md").read_text()
    there = {(b, it["metadata"]["labels"]["ddpm/part"]) for b in BUILDS for it in everything(b)}
    applied = re.findall(r"apply -k infra/kubernetes/(\S+) -l ddpm/part=(\w+)", runbook)
    assert set(applied) == there - {("gpu-spot", "platform")}
    assert set(re.findall(r"apply -f infra/kubernetes/(\w+\.yaml)", runbook)) == set(FILES)


@needs.KUBECTL.met_if(shutil.which("kubectl"))
@pytest.mark.parametrize("build", BUILDS)
def test_kustomize_builds_what_is_tested_here(build: str) -> None:
    output = subprocess.run(
        ["kubectl", "kustomize", str(KUBERNETES / build)], capture_output=True, text=True
    )
    assert output.returncode == 0, output.stderr
    theirs = list(yaml.safe_load_all(output.stdout))

    def key(it: dict[str, Any]) -> tuple[str, str]:
        return it["kind"], it["metadata"]["name"]

    assert sorted(built(KUBERNETES / build), key=key) == sorted(theirs, key=key)


CLUSTER_WIDE = {"Namespace", "ResourceFlavor", "ClusterQueue"}


@pytest.mark.parametrize("place", [*BUILDS, *FILES])
def test_objects_are_in_the_namespace_and_refer_to_what_is_there(place: str) -> None:
    objects = everything(place)
    for it in objects:
        where = it["metadata"].get("namespace")
        assert where == (None if it["kind"] in CLUSTER_WIDE else "ddpm"), it["metadata"]
    there = {(it["kind"], it["metadata"]["name"]) for it in everything("base", place)}
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
    objects = everything(*BUILDS, *FILES)
    for reference in found(objects, "secretKeyRef"):
        assert reference["key"] in made[reference["name"]]
    names = [it["name"] for it in found(objects, "secretRef")]
    names += [it["secretName"] for it in found(objects, "secret")]
    tokens = {it["secretName"] for it in found(objects, "authOptions")}
    assert tokens == {"ddpm-ray-token"} and made["ddpm-ray-token"] == {"auth_token"}
    assert {*names, *tokens} <= set(made)


@pytest.mark.parametrize("place", [*BUILDS, *FILES])
def test_no_pod_may_do_more_than_it_must(place: str) -> None:
    for it in everything(place):
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
    objects = everything(*BUILDS, *FILES)
    templates = [template for it in objects for template in pod_templates(it)]

    def selected(selector: dict[str, Any]) -> list[dict[str, Any]]:
        them = [t for t in templates if selects(selector, t["metadata"]["labels"])]
        assert them, f"no pod has {selector}"
        return them

    for it in objects:
        spec = it.get("spec", {})
        if it["kind"] == "Service":
            listened = ports_of(selected({"matchLabels": spec["selector"]}))
            assert {port.get("targetPort", port["port"]) for port in spec["ports"]} <= listened
        elif it["kind"] == "NetworkPolicy":
            listened = ports_of(selected(spec["podSelector"]))
            for rule in spec.get("ingress", []):
                assert {port["port"] for port in rule.get("ports", [])} <= listened
                for peer in rule["from"]:
                    if "namespaceSelector" not in peer:
                        selected(peer["podSelector"])


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels", "matchExpressions"}
    for it in selector.get("matchExpressions", []):
        assert it["operator"] in ("Exists", "In")
        value = labels.get(it["key"])
        if value is None or value not in it.get("values", [value]):
            return False
    return bool(labels.items() >= selector.get("matchLabels", {}).items())


@pytest.mark.parametrize("build", BUILDS)
def test_nodes_of_the_service_can_be_drained(build: str) -> None:
    """Of what cannot be scaled a budget may count only what is to stay; KubeRay's issue 2662."""
    budget = of_kind(build, "PodDisruptionBudget")["spec"]
    cluster = of_kind(build, "RayService")["spec"]["rayClusterConfig"]
    (group,) = cluster["workerGroupSpecs"]
    labels = group["template"]["metadata"]["labels"]
    assert selects(budget["selector"], labels)
    assert not selects(
        budget["selector"], cluster["headGroupSpec"]["template"]["metadata"]["labels"]
    )
    assert budget.keys() == {"minAvailable", "unhealthyPodEvictionPolicy", "selector"}
    assert 0 < budget["minAvailable"] < group["minReplicas"]


def test_kuberay_names_its_pods_itself() -> None:
    """The selectors of its Services ask for this label, and it does not replace what is there."""
    for build in BUILDS:
        for kind in ("RayJob", "RayService"):
            for template in pod_templates(of_kind(build, kind)):
                assert "app.kubernetes.io/name" not in template["metadata"]["labels"]


def ports_of(templates: list[dict[str, Any]]) -> set[Any]:
    """Numbers and names."""
    ports = [p for t in templates for c in t["spec"]["containers"] for p in c.get("ports", [])]
    return {port["containerPort"] for port in ports} | {port["name"] for port in ports}


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


@pytest.mark.parametrize("build", BUILDS)
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


@pytest.mark.parametrize("build", BUILDS)
def test_the_serve_config_names_the_service_and_it_fits_into_its_cluster(build: str) -> None:
    from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

    config, application = serve_config(build)
    # which takes misspelt keys without a word
    assert config.keys() <= ServeDeploySchema.model_fields.keys()
    assert application.keys() <= ServeApplicationSchema.model_fields.keys()
    assert config["http_options"].keys() <= HTTPOptionsSchema.model_fields.keys()
    deployed = ServeDeploySchema.model_validate(config)
    # or `ddpm serve` would take it for its own, and clear it away
    assert deployed.applications[0].name != APPLICATION

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


def registered_untrained(folder: Path) -> str:
    """A registry whose champion of `digits` was never trained."""
    config = load_config(str(ROOT / "configs" / "digits.yaml"), [])
    spec = ModelSpec(
        network=config.network,
        diffusion=config.diffusion,
        channels=config.data.channels,
        image_size=config.data.image_size,
        class_names=[str(i) for i in range(10)],
        has_null_label=True,
    )
    uri = f"sqlite:///{folder}/mlflow.db"
    files = model_files(spec, save(spec.make_network().state_dict()), {})
    with contextlib.chdir(folder):  # where MLflow puts its artifacts
        reference = register(TrackedRun(uri, "digits", "untrained", {}), "digits", files, {})
    make_client(uri).set_registered_model_alias("digits", "champion", reference.version)
    return uri


@pytest.mark.parametrize("build", BUILDS)
def test_ray_builds_the_application_of_the_serve_config(build: str, tmp_path: Path) -> None:
    from ray._common.constants import HEAD_NODE_RESOURCE_NAME
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build_app

    from tasks.service.deployment import application

    keys = tmp_path / "keys.txt"
    keys.write_text("ann ann-0123456789abcdef\n")
    args = serve_config(build)[1]["args"] | {
        "model": "digits@champion",
        "tracking_uri": registered_untrained(tmp_path),
        "api_keys": str(keys),
    }
    ingress = build_app(application, args)._bound_deployment
    # it holds the requests: not on a node that may be taken away
    assert ingress.ray_actor_options["resources"] == {HEAD_NODE_RESOURCE_NAME: 0.001}
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
