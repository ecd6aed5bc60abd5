"""What commands share: their common arguments, the config they load, the registry they ask."""

import signal
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline import storage
from pipeline.registry.lock import SQLITE
from tasks.console import console

if TYPE_CHECKING:
    from pipeline.config import RunConfig
    from tasks.stages.plan import Plan
    from tasks.stages.stage import Look

ConfigArg = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A YAML file, see configs/README.md.")
]
ModelArg = Annotated[
    str, typer.Argument(metavar="MODEL", help="NAME@ALIAS or NAME@VERSION, as in digits@champion.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a key, as in training.lr=3e-4; may be repeated."
    ),
]


def load(context: typer.Context, path: str, overrides: list[str] | None) -> tuple["RunConfig", str]:
    """The config with absolute places, and the tracking URI."""
    from pipeline.config import load_config
    from pipeline.data.listing import absolute
    from pipeline.evaluation.config import InceptionWeights, NetworkFile

    config = load_config(path, overrides)
    places = {"source": absolute(config.data.source)}
    if config.data.labels is not None:
        places["labels"] = storage.absolute(config.data.labels)
    update: dict[str, Any] = {
        "storage": storage.absolute(config.storage),
        "data": config.data.model_copy(update=places),
    }
    extractor = config.evaluation.extractor
    if isinstance(extractor, NetworkFile | InceptionWeights):
        place = extractor.model_copy(update={"file": storage.absolute(extractor.file)})
        update["evaluation"] = config.evaluation.model_copy(update={"extractor": place})
    config = config.model_copy(update=update)
    return config, tracking_uri(context, config.tracking.uri)


def tracking_uri(context: typer.Context, configured: str | None = None) -> str:
    """Of MLflow: the config's, or what the environment says, which is the context's object."""
    uri = configured or context.obj or f"{SQLITE}mlflow.db"
    if uri.startswith(SQLITE):  # Ray's workers run in folders of their own
        return SQLITE + str(Path(uri.removeprefix(SQLITE)).absolute())
    return str(uri)


def plan_stages(
    config: "RunConfig", tracking_uri: str, target: str | None = None, look: "Look | None" = None
) -> "Plan":
    """What must run for the stage `target`, by default the last."""
    from tasks.stages.declarations import LAST, STAGES
    from tasks.stages.plan import make_plan
    from tasks.stages.stage import Look

    return make_plan(STAGES, config, tracking_uri, target or LAST, look or Look())


def own_places(tracking_uri: str, storage_uri: str | None = None) -> dict[str, tuple[str, str]]:
    """What lies on this machine, see `cluster.check_shared`."""
    places = {}
    if storage_uri is not None and (folder := storage.local_path(storage_uri)) is not None:
        remedy = "choose a place that all nodes reach, such as --set storage=s3://BUCKET/FOLDER"
        places[f"storage={folder}"] = str(folder), remedy
    if tracking_uri.startswith(SQLITE):
        folder = Path(tracking_uri.removeprefix(SQLITE)).parent
        remedy = "start an MLflow server, and set MLFLOW_TRACKING_URI or tracking.uri to it"
        places[f"tracking.uri={tracking_uri}"] = str(folder), remedy
    return places


def print_plan(plan: "Plan") -> None:
    for planned in plan.stages:
        state = "cached  " if planned.done else "will run"
        console.print(f"{planned.name:<11}{state}  {planned.reason}")


def treat_sigterm_as_ctrl_c() -> None:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
