"""What a person sees of a command: its lines, how long things take, errors as one sentence.

What frameworks have to say goes to a log file.
"""

import logging
import math
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from pipeline import storage
from pipeline.errors import PipelineError, UserError

console = Console(highlight=False, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """`12.3 s` or `2 min 05 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def roughly(seconds: float) -> str:
    """`40 s`, `2 min 30 s` or `3 h 20 min`: no more digits than an estimate has."""
    if seconds < 3600:
        large, small, units = *divmod(10 * max(1, math.ceil(seconds / 10)), 60), ("min", "s")
    else:
        large, small, units = *divmod(10 * math.ceil(seconds / 600), 60), ("h", "min")
    parts = zip((large, small), units, strict=True)
    return " ".join(f"{number} {unit}" for number, unit in parts if number)


# --- the log file, places, errors -----------------------------------------------------------------

_log_files: list[Path] = []
"""The file that this command logs to, if it does."""


def log_to_file(storage_uri: str | None) -> Path:
    """Send what frameworks log and warn of to a file, so that the terminal stays readable."""
    folder = storage.local_path(storage_uri) if storage_uri else None
    if folder is None:  # of this user: others share the machine
        folder = Path(tempfile.gettempdir()) / f"ray-ddpm-{os.getuid()}"
    folder = folder / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"ddpm-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    handler = logging.FileHandler(path, delay=False)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    _log_files.append(path)
    return path


def command(name: str) -> str:
    """How to call a program of this environment from the shell that called us."""
    beside = Path(sys.executable).parent / name
    on_path = shutil.which(name)
    if on_path is not None and Path(on_path).resolve() == beside.resolve():
        return name
    return shown(str(beside))


def shown(path: str) -> str:
    """A path relative to the working folder where that is shorter."""
    if storage.local_path(path) is None:
        return path
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative


def shown_uri(uri: str) -> str:
    prefix = "sqlite:///"
    return prefix + shown(uri.removeprefix(prefix)) if uri.startswith(prefix) else uri


def _root_cause(error: BaseException) -> BaseException:
    """The error that a Ray task or a training worker raised, out of Ray's wrapping."""
    failures = getattr(error, "worker_failures", None) or {}
    inner = [
        getattr(error, "cause", None),
        getattr(error, "controller_failure", None),
        getattr(error, "_base_exc", None),
        *(failures.values() if isinstance(failures, dict) else ()),
    ]
    causes = [cause for cause in inner if isinstance(cause, BaseException)]
    return _root_cause(causes[0]) if causes else error


def show_error(error: BaseException) -> int:
    """Print one sentence about an error; returns the exit code."""
    cause = _root_cause(error)
    if _log_files:
        logging.getLogger("ddpm").error("the command failed", exc_info=error)
    if isinstance(cause, PipelineError):
        print(f"error: {cause}", file=sys.stderr)
        return 2 if isinstance(cause, UserError) else 1
    first_line = (str(cause).strip().splitlines() or [""])[0]
    print(f"error: {type(cause).__name__}: {first_line}", file=sys.stderr)
    if _log_files:
        print(f"the whole story is in {shown(str(_log_files[-1]))}", file=sys.stderr)
    return 1
