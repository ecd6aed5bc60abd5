"""What compose and KubeRay take, as far as infra/ uses it: keys and types, and no key besides.

Written down by hand, so that the objects are checked wherever the tests run. What is written here
is itself held against the published schemas where they are at hand, see tests/needs.py.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Quantity = Annotated[str, StringConstraints(pattern=r"^\d+(\.\d+)?(m|Ki|Mi|Gi|Ti)?$")] | int
Duration = Annotated[str, StringConstraints(pattern=r"^(\d+(h|m|s|ms))+$")]
Scalar = str | int | float | bool | None
Count = Annotated[int, Field(ge=0)]
Port = Annotated[int, Field(ge=1, le=65535)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


# --- pods ---------------------------------------------------------------------------------------


class Metadata(Strict):
    name: str | None = None
    namespace: str | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class Resources(Strict):
    requests: dict[str, Quantity]
    limits: dict[str, Quantity] = {}


class Named(Strict):
    name: str
    key: str | None = None


class ValueFrom(Strict):
    secretKeyRef: Named | None = None
    configMapKeyRef: Named | None = None


class Variable(Strict):
    name: str
    value: str | None = None
    valueFrom: ValueFrom | None = None


class EnvFrom(Strict):
    configMapRef: Named | None = None
    secretRef: Named | None = None


class ContainerPort(Strict):
    name: str
    containerPort: Port


class Mount(Strict):
    name: str
    mountPath: str
    readOnly: bool = False
    subPath: str | None = None


class Action(Strict):
    httpGet: dict[Literal["path", "port", "scheme"], str | int] | None = None
    exec: dict[Literal["command"], list[str]] | None = None
    tcpSocket: dict[Literal["port"], str | int] | None = None


class Probe(Action):
    initialDelaySeconds: Count | None = None
    periodSeconds: Count | None = None
    timeoutSeconds: Count | None = None
    failureThreshold: Count | None = None


class Capabilities(Strict):
    drop: list[str]


class ContainerSecurity(Strict):
    allowPrivilegeEscalation: bool
    capabilities: Capabilities
    readOnlyRootFilesystem: bool | None = None
    runAsUser: int | None = None


class Container(Strict):
    name: str
    image: str
    command: list[str] | None = None
    args: list[str] | None = None
    env: list[Variable] = []
    envFrom: list[EnvFrom] = []
    ports: list[ContainerPort] = []
    resources: Resources
    securityContext: ContainerSecurity
    volumeMounts: list[Mount] = []
    livenessProbe: Probe | None = None
    readinessProbe: Probe | None = None
    startupProbe: Probe | None = None


class Volume(Strict):
    name: str
    secret: dict[Literal["secretName"], str] | None = None
    emptyDir: dict[Literal["medium", "sizeLimit"], str] | None = None
    persistentVolumeClaim: dict[Literal["claimName"], str] | None = None


class Toleration(Strict):
    key: str
    operator: Literal["Equal", "Exists"]
    value: str | None = None
    effect: Literal["NoSchedule", "NoExecute", "PreferNoSchedule"]


class PodSecurity(Strict):
    runAsNonRoot: bool
    runAsUser: int | None = None
    runAsGroup: int | None = None
    fsGroup: int | None = None
    seccompProfile: dict[Literal["type"], Literal["RuntimeDefault"]]


class PodSpec(Strict):
    containers: Annotated[list[Container], Field(min_length=1)]
    initContainers: list[Container] = []
    serviceAccountName: str | None = None
    automountServiceAccountToken: bool | None = None
    restartPolicy: Literal["Always", "OnFailure", "Never"] | None = None
    securityContext: PodSecurity
    terminationGracePeriodSeconds: Count | None = None
    nodeSelector: dict[str, str] = {}
    tolerations: list[Toleration] = []
    volumes: list[Volume] = []


class PodTemplate(Strict):
    metadata: Metadata
    spec: PodSpec


# --- KubeRay ------------------------------------------------------------------------------------


class HeadGroup(Strict):
    rayStartParams: dict[str, str]
    template: PodTemplate


class WorkerGroup(HeadGroup):
    groupName: str
    replicas: Count
    minReplicas: Count
    maxReplicas: Count


class Auth(Strict):
    mode: Literal["token", "disabled"]
    secretName: str


class Autoscaler(Strict):
    version: Literal["v1", "v2"]
    idleTimeoutSeconds: Count
    securityContext: ContainerSecurity
    resources: Resources


class Cluster(Strict):
    rayVersion: str
    authOptions: Auth
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]
    enableInTreeAutoscaling: bool = False
    autoscalerOptions: Autoscaler | None = None


class JobSpec(Strict):
    entrypoint: str
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]
    backoffLimit: Count
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: Count
    runtimeEnvYAML: str
    submitterPodTemplate: PodTemplate
    rayClusterSpec: Cluster


class UpgradeStrategy(Strict):
    type: Literal["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]


class ServiceSpec(Strict):
    rayClusterDeletionDelaySeconds: Count
    upgradeStrategy: UpgradeStrategy
    serveConfigV2: str
    rayClusterConfig: Cluster


class RayJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: JobSpec


class RayService(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: Metadata
    spec: ServiceSpec


KUBERAY: dict[str, type[Strict]] = {"RayJob": RayJob, "RayService": RayService}


# --- compose ------------------------------------------------------------------------------------


class Dependency(Strict):
    condition: Literal["service_started", "service_healthy", "service_completed_successfully"]


class Healthcheck(Strict):
    test: list[str]
    interval: Duration | None = None
    timeout: Duration | None = None
    start_period: Duration | None = None
    start_interval: Duration | None = None
    retries: Count | None = None


class Build(Strict):
    context: str
    dockerfile: str | None = None
    args: dict[str, Scalar] = {}


class ComposeService(Strict):
    image: str | None = None
    build: Build | None = None
    command: list[str] | None = None
    entrypoint: list[str] | None = None
    environment: dict[str, Scalar] = {}
    depends_on: dict[str, Dependency] = {}
    healthcheck: Healthcheck | None = None
    volumes: list[str] = []
    ports: list[str] = []
    restart: Literal["no", "always", "on-failure", "unless-stopped"] | None = None
    shm_size: str | int | None = None
    stop_grace_period: Duration | None = None
    deploy: dict[str, Any] | None = None
    user: str | None = None
    init: bool | None = None
    profiles: list[str] = []


class Compose(Strict):
    """Without its keys that begin with x-, which compose leaves to their author."""

    name: str | None = None
    services: dict[str, ComposeService]
    volumes: dict[str, None] = {}
