"""The command line, `ddpm`. Exit codes: 0 done, 2 the user's mistake, 130 Ctrl-C, 1 the rest."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import typer

from tasks.commands import comparison, configs, exchange, images, jobs, models, new, service, stages
from tasks.console import console, show_error

app = typer.Typer(
    help="Images in, a served diffusion model out. A run is a YAML file, see configs/README.md.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

VERBS: dict[str, dict[str, Callable[..., None]]] = {
    "From images to a model": {
        "new": new.new,
        "run": stages.run,
        "preprocess": stages.preprocess,
        "train": stages.train,
        "evaluate": stages.evaluate,
        "register": stages.register,
    },
    "What a config says and would do": {
        "status": configs.status,
        "explain": configs.explain,
        "config": configs.show_config,
        "schedule": configs.draw_schedule,
    },
    "From a model to images": {
        "sample": images.sample,
        "reproduce": images.reproduce,
        "serve": service.serve,
    },
    "Registered models": {
        "compare": comparison.compare,
        "promote": models.promote,
        "rollback": models.rollback,
        "history": models.history,
        "lineage": models.lineage,
        "export": exchange.export,
        "import": exchange.import_,
    },
    "Runs as jobs of a cluster": {
        "submit": jobs.submit,
        "jobs": jobs.list_jobs,
        "logs": jobs.logs,
        "cancel": jobs.cancel,
    },
}
"""The verbs, as `ddpm --help` groups them."""
for panel, verbs in VERBS.items():
    for name, function in verbs.items():
        app.command(name, rich_help_panel=panel)(function)


def _use_ray_token() -> None:
    """Show this user's Ray token, if there is one, to a cluster that is joined or sent a job.

    Ray's own commands do so. `ray.init(address=...)` and the job client do it only if RAY_AUTH_MODE
    says so when Ray is imported, which is therefore still to come.
    """
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    if "RAY_AUTH_TOKEN" in os.environ or token.exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def execute(arguments: list[str]) -> int:
    """Run a command and turn what it raises into one sentence; returns the exit code."""
    os.environ["MLFLOW_CONFIGURE_LOGGING"] = "false"  # it would print its log lines
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"  # and bars, where tqdm is there
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # and where a server shows a run
    # a training tries again itself, and has other things to do than to wait for minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    _use_ray_token()
    try:
        app(arguments, obj=os.environ.get("MLFLOW_TRACKING_URI"))
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
