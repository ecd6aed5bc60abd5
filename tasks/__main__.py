"""The command line, `ddpm`. Exit codes: 0 done, 2 the user's mistake, 130 Ctrl-C, 1 the rest."""

import contextlib
import functools
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.table import Table

from pipeline import storage
from pipeline.errors import (
    ConfigError,
    DataError,
    PipelineError,
    RequestError,
    UserError,
)
from tasks.console import (
    Board,
    command,
    console,
    duration,
    log_to_file,
    show_error,
    shown,
    shown_uri,
)

if TYPE_CHECKING:
    from pipeline.config import RunConfig
    from pipeline.data.pieces import LookInto, Piece
    from tasks.workflow import Plan

app = typer.Typer(
    help="Images in, a served diffusion model out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigArg = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, see configs/.")]
ModelArg = Annotated[
    str, typer.Argument(metavar="MODEL", help="NAME@ALIAS or NAME@VERSION, as in digits@champion.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a value, as in training.lr=3e-4."),
]


# --- pipeline -----------------------------------------------------------------------------------


@app.command()
def run(config: ConfigArg, set_: SetOption = None) -> None:
    """Run every stage that has not been run: preprocess, train, evaluate, register, sample."""
    _run_stages(config, set_, "sample")


@app.command()
def preprocess(config: ConfigArg, set_: SetOption = None) -> None:
    """Turn the source of images into Parquet shards."""
    _run_stages(config, set_, "preprocess")


@app.command()
def train(config: ConfigArg, set_: SetOption = None) -> None:
    """Train the network, and what that needs."""
    _run_stages(config, set_, "train")


@app.command()
def evaluate(config: ConfigArg, set_: SetOption = None) -> None:
    """Score the trained network, and what that needs."""
    _run_stages(config, set_, "evaluate")


@app.command()
def register(config: ConfigArg, set_: SetOption = None) -> None:
    """Register the trained network in MLflow, and what that needs."""
    _run_stages(config, set_, "register")


@app.command()
def status(config: ConfigArg, set_: SetOption = None) -> None:
    """Say which stages are done and where their outputs are."""
    table = Table("stage", "state", "output", box=None, pad_edge=False)
    for stage in _plan(*_load(config, set_)).stages:
        table.add_row(stage.spec.name, "done" if stage.done else "to do", stage.folder)
    console.print(table)


@app.command()
def explain(config: ConfigArg, set_: SetOption = None) -> None:
    """Say for each stage why it would or would not run."""
    _print_plan(_plan(*_load(config, set_)))


@app.command("config")
def show_config(config: ConfigArg, set_: SetOption = None) -> None:
    """Print the configuration with all defaults filled in."""
    resolved, _ = _load(config, set_)
    print(yaml.safe_dump(resolved.model_dump(), sort_keys=False), end="")


@app.command("schedule")
def draw_schedule(
    config: ConfigArg,
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("schedule.png"),
    set_: SetOption = None,
) -> None:
    """Draw the noise schedule and the timesteps that the sampler visits, and say how it ends."""
    from tasks import schedule as drawing

    resolved, _ = _load(config, set_)
    diffusion, sampling = resolved.diffusion, resolved.sampling
    schedule = drawing.schedule_of(diffusion)
    storage.write_bytes(str(out.absolute()), drawing.draw(schedule, diffusion, sampling))
    for line in drawing.describe(schedule, diffusion, sampling):
        console.print(line)
    console.print(f"picture   {shown(str(out.absolute()))}")


def _run_stages(config_path: str, overrides: list[str] | None, target: str) -> None:
    config, tracking_uri = _load(config_path, overrides)
    storage.check_writable(config.storage)
    log = log_to_file(config.storage)

    from tasks import cluster, workflow
    from tasks.preprocess import look_on_cluster

    with contextlib.ExitStack() as stack:

        @functools.cache
        def start_ray() -> None:
            """Once, and only if there is something for it to do."""
            ray_logs = stack.enter_context(cluster.connect(config.cluster))
            _treat_sigterm_as_ctrl_c()
            logging.info("the logs of Ray are in %s", ray_logs)

        def look_into(pieces: list["Piece"], keep_in: str | None) -> Iterator[tuple[int, Any]]:
            start_ray()
            return look_on_cluster(pieces, keep_in)

        plan = _plan_visibly(config, tracking_uri, target, look_into)
        _print_plan(plan)
        if target != "preprocess":
            from pipeline.registry.runs import make_client

            make_client(tracking_uri)  # a store that cannot be used is better found before the work

        if all(stage.done for stage in plan.stages):
            names = [stage.spec.name for stage in plan.stages]
            results = [workflow.StageResult(name, "cached", 0.0) for name in names]
        else:
            start_ray()
            with Board() as board:
                results = workflow.run(plan, board)

    console.print()
    table = Table("stage", "", "time", box=None, pad_edge=False)
    for result in results:
        table.add_row(
            result.name, result.outcome, duration(result.seconds) if result.seconds else ""
        )
    console.print(table)
    _print_where_to_look(plan, target, log)


def _plan_visibly(
    config: "RunConfig", tracking_uri: str, target: str, look_into: "LookInto"
) -> "Plan":
    with Board() as board:
        bar = board.add("source")

        def show(done: int, total: int) -> None:
            if done == 0:
                bar.start(total, "files")
            bar.update(done)

        plan = _plan(
            config, tracking_uri, target, remember=True, progress=show, look_into=look_into
        )
        num_images, num_classes = plan.source.items.num_rows, len(plan.source.class_names)
        bar.close(f"{num_images:,} images" + (f" of {num_classes} classes" if num_classes else ""))
    return plan


def _print_plan(plan: "Plan") -> None:
    for stage in plan.stages:
        state = "cached  " if stage.done else "will run"
        console.print(f"{stage.spec.name:<11}{state}  {stage.reason}")


def _print_where_to_look(plan: "Plan", target: str, log: Path) -> None:
    console.print()
    places = {
        "preprocess": ("shards", ""),
        "evaluate": ("scores", "metrics.json"),
        "sample": ("samples", "grid.png"),
    }
    for stage, (what, name) in places.items():
        if any(planned.spec.name == stage for planned in plan.stages):
            parts = [name] if name else []
            console.print(f"{what:<9}{shown(storage.join(plan.folder(stage), *parts))}")
    if target != "preprocess":
        console.print(
            f"MLflow   {command('mlflow')} ui --backend-store-uri {shown_uri(plan.tracking_uri)}"
        )
    if target == "sample":
        model = f"{plan.config.name}@{plan.config.registry.alias}"
        console.print(f"serve    {command('ddpm')} serve {model}")
    console.print(f"log      {shown(str(log))}")


# --- models -------------------------------------------------------------------------------------


@app.command()
def sample(
    model: ModelArg,
    n: Annotated[int, typer.Option("-n", help="Number of images.")] = 16,
    seed: Annotated[int, typer.Option(help="Image i of a seed is always the same.")] = 0,
    sampler: Annotated[
        str, typer.Option(help="ddim, dpm_solver_pp, unipc, heun, ancestral, ...; see the README.")
    ] = "ddim",
    steps: Annotated[
        int | None, typer.Option(help="Noise levels an image passes; 50 by default.")
    ] = None,
    spacing: Annotated[
        str, typer.Option(help="trailing, leading, linspace, karras or log_snr.")
    ] = "trailing",
    order: Annotated[int, typer.Option(help="1, 2 or 3, of the solvers that have one.")] = 2,
    label: Annotated[int | None, typer.Option(help="Class to draw; none by default.")] = None,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance weight w.")] = 0.0,
    eta: Annotated[float, typer.Option(help="DDIM's η.")] = 0.0,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other key of a config's `sampling`, as in churn=10."),
    ] = None,
    mode: Annotated[str, typer.Option(help="exact or fast.")] = "exact",
    out: Annotated[Path, typer.Option(help="Folder for the PNG files.")] = Path("samples"),
) -> None:
    """Draw images from a registered model: DIR/0000.png ... and DIR/grid.png."""
    from pipeline.config import ClusterConfig, apply_override
    from pipeline.registry.models import load_model, resolve
    from pipeline.serving.engine import ImageRequest, check_request
    from tasks import cluster
    from tasks import sample as stage

    if not 1 <= n <= 1_000_000:
        raise RequestError(f"-n {n} must be from 1 to 1000000", "n")
    if not 0 <= seed < 2**63:
        raise RequestError(f"--seed {seed} must be from 0 to 2**63-1", "seed")
    if mode not in ("exact", "fast"):
        raise RequestError(f"--mode {mode} must be exact or fast", "mode")
    values: dict[str, Any] = {
        "sampler": sampler,
        "spacing": spacing,
        "order": order,
        "guidance": guidance,
        "eta": eta,
    }
    for setting in settings or []:
        apply_override(values, setting)
    sampling = _sampling(**values, **({} if steps is None else {"steps": steps}))
    reference = resolve(model, _tracking_uri(None))
    spec = load_model(reference.uri, reference.tracking_uri).spec
    if steps is None:
        sampling = sampling.model_copy(update={"steps": spec.default_steps})
    requests = [ImageRequest(seed, i, label, sampling) for i in range(n)]
    check_request(spec, requests[0])
    folder = str(out.absolute())
    storage.check_writable(folder, remedy="choose another folder with --out")
    log_to_file(None)
    with cluster.connect(ClusterConfig(), num_cpus=1, num_gpus=0), Board() as board:
        bar = board.add("sample")
        bar.start(n, "samples")
        columns = max(1, round(min(n, stage.MAX_GRID_IMAGES) ** 0.5))
        stage.draw_to_folder(
            reference,
            requests,
            folder,
            columns,
            mode=mode,  # type: ignore[arg-type]  # checked above
            on_done=bar.update,
        )
        bar.close(f"{n} images in {shown(folder)}")


@app.command()
def reproduce(
    file: Annotated[Path, typer.Argument(help="A PNG made by ddpm.")],
    out: Annotated[Path | None, typer.Option(help="Where to write the image drawn again.")] = None,
) -> None:
    """Draw an image again from the recipe in its PNG, and compare the pixels."""
    import numpy as np

    from pipeline.registry.models import parse_reference, resolve
    from pipeline.serving.recipe import decode, encode, fingerprint
    from tasks.sample import redraw

    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    pixels, recipe = decode(data, str(file))
    parse_reference(recipe.model)
    reference = resolve(recipe.model, _tracking_uri(None))
    if reference.digest != recipe.model_digest:
        raise UserError(
            f"{recipe.model} is not the model that made {file}: its digest is {reference.digest}, "
            f"the recipe says {recipe.model_digest}"
        )
    again = redraw(recipe, reference)
    if out is not None:
        storage.write_bytes(str(out.absolute()), encode(again, recipe))
    if np.array_equal(pixels, again):
        console.print(
            f"{file}: the same {again.shape[0]}x{again.shape[1]} pixels again, bit for bit"
        )
        return
    differing = int((pixels != again).any(axis=-1).sum()) if pixels.shape == again.shape else -1
    made = ", ".join(f"{name} {value}" for name, value in recipe.made_with.items())
    here = ", ".join(f"{name} {value}" for name, value in fingerprint().items())
    raise PipelineError(
        f"{file}: {differing} pixels differ; it was made in {recipe.mode} mode with {made}, "
        f"this is {here}"
    )


@app.command()
def serve(
    model: ModelArg,
    replicas: Annotated[
        int | None, typer.Option(help="Copies of the model; by default as its config said.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
) -> None:
    """Serve a registered model over HTTP until Ctrl-C."""
    from pipeline.config import ClusterConfig
    from pipeline.registry.models import resolve
    from tasks import cluster

    if replicas is not None and not 1 <= replicas <= 1000:
        raise ConfigError(f"--replicas {replicas} must be from 1 to 1000")
    cluster.check_port_is_free(host, port)
    reference = resolve(model, _tracking_uri(None))
    log = log_to_file(None)
    from tasks import serve as application

    serving = application.serving_config(reference)
    if replicas is not None:
        serving = serving.model_copy(update={"replicas": replicas})
    num_cpus = serving.replicas * serving.cpus_per_replica
    num_gpus = serving.replicas * serving.gpus_per_replica
    with cluster.connect(ClusterConfig(), num_cpus, num_gpus):
        serve_log = logging.getLogger("ray.serve")  # it has a handler of its own, for the terminal
        serve_log.handlers = logging.getLogger().handlers
        serve_log.propagate = False
        plural = "s" * (serving.replicas > 1)
        console.print(f"loading {reference} on {serving.replicas} replica{plural} ...")
        application.start(reference, model, serving, host, port)
        _treat_sigterm_as_ctrl_c()
        url = f"http://{host}:{port}"
        console.print(f"serving {reference} at {url}/v1/images/generations, Ctrl-C ends it; try")
        console.print(
            f"  curl -s {url}/v1/images/generations -H 'Content-Type: application/json' "
            """-d '{"n": 4, "seed": 1}'"""
        )
        console.print(f"log      {shown(str(log))}")
        application.wait_until_interrupted()
        console.print("stopped")


@app.command()
def promote(
    model: Annotated[str, typer.Argument(metavar="MODEL@VERSION")],
    alias: Annotated[str, typer.Option(help="The alias to move.")] = "champion",
) -> None:
    """Point the alias `champion` at a version."""
    from pipeline.registry.models import RegistryConfig, resolve, set_alias

    checked = _validated(RegistryConfig, "--alias", alias=alias).alias
    reference = resolve(model, _tracking_uri(None))
    set_alias(reference, checked)
    console.print(f"{reference.name}@{checked} is now version {reference.version}")


# --- cluster ------------------------------------------------------------------------------------


@app.command()
def submit(
    config: ConfigArg,
    address: Annotated[str, typer.Option(help="The head's job server, http://HEAD:8265.")],
    wait: Annotated[
        bool, typer.Option("--wait", help="Follow the job and return its code.")
    ] = False,
    set_: SetOption = None,
) -> None:
    """Run a config as a job on a Ray cluster; the working folder is sent along."""
    from tasks import submit as jobs

    resolved, tracking_uri = _load(config, set_)  # a mistake is better found here than there
    if not Path(config).absolute().resolve().is_relative_to(Path.cwd().resolve()):
        raise ConfigError(
            f"{config} must be a path within this folder, which is sent to the cluster"
        )
    # the job runs in a folder of its own, so places are sent along as they are seen from here
    places = [
        f"storage={resolved.storage}",
        f"data.source={resolved.data.source}",
        f"tracking.uri={tracking_uri}",
    ]
    job, follow = jobs.submit(
        address, os.path.relpath(config), [*(set_ or []), *places], os.getcwd()
    )
    console.print(
        f"submitted {job}; its outputs go to {resolved.storage}; follow it with\n  {follow}"
    )
    if wait:
        for text in jobs.follow(address, job):
            print(text, end="", flush=True)
        raise typer.Exit(jobs.exit_code(address, job))


# --- helpers ------------------------------------------------------------------------------------


def _load(path: str, overrides: list[str] | None) -> tuple["RunConfig", str]:
    """The config with absolute places, and the tracking URI."""
    from pipeline.config import load_config
    from pipeline.data.listing import absolute

    config = load_config(path, overrides)
    places = {"source": absolute(config.data.source)}
    if config.data.labels is not None:
        places["labels"] = storage.absolute(config.data.labels)
    config = config.model_copy(
        update={
            "storage": storage.absolute(config.storage),
            "data": config.data.model_copy(update=places),
        }
    )
    return config, _tracking_uri(config.tracking.uri)


def _tracking_uri(configured: str | None) -> str:
    uri = configured or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    prefix = "sqlite:///"
    if uri.startswith(prefix):  # Ray's workers run in folders of their own
        return prefix + str(Path(uri.removeprefix(prefix)).absolute())
    return uri


def _plan(config: "RunConfig", tracking_uri: str, target: str = "sample", **how: Any) -> "Plan":
    from tasks import workflow

    return workflow.plan(config, tracking_uri, target, **how)


def _sampling(**values: Any) -> Any:
    from pipeline.samplers.plan import SamplingConfig

    return _validated(SamplingConfig, "--", **values)


def _validated(model: Any, prefix: str, **values: Any) -> Any:
    from pydantic import ValidationError

    try:
        return model(**values)
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(map(str, problem["loc"]))
        message = problem["msg"].removeprefix("Value error, ")
        option = f"{prefix}{name} {problem['input']}: " if name and prefix == "--" else ""
        raise RequestError(option + message[0].lower() + message[1:], name) from error


def _use_ray_token() -> None:
    """Show this user's Ray token, if there is one, to a cluster that is joined or sent a job.

    Ray's own commands do so. `ray.init(address=...)` and the job client do it only if RAY_AUTH_MODE
    says so when Ray is imported, which is therefore still to come.
    """
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    if "RAY_AUTH_TOKEN" in os.environ or token.exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _treat_sigterm_as_ctrl_c() -> None:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def execute(arguments: list[str]) -> int:
    """Run a command and turn what it raises into one sentence; returns the exit code."""
    os.environ["MLFLOW_CONFIGURE_LOGGING"] = "false"  # it would print its log lines
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"  # and bars, where tqdm is there
    # a training tries again itself, and has other things to do than to wait for minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    _use_ray_token()
    try:
        app(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
        if code == 130:  # typer's for Ctrl-C
            console.print("interrupted: the same command goes on from what is finished")
        return code
    except BaseException as error:
        return show_error(error)
    return 0


def main() -> None:
    code = execute(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # threads of stages may still wait for a Ray that is gone; nothing of theirs is worth keeping
    os._exit(code)


if __name__ == "__main__":
    main()
