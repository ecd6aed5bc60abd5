"""The servers that a team has, on this machine: MLflow's, PostgreSQL behind it, a bucket.

python -m tests.servers        starts all three, with handwritten digits in the bucket, and says
                               which variables to set; they end with Ctrl-C, and all is gone
"""

import contextlib
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from pipeline.data.images import png
from tests.conftest import free_port, listens, wait_for

if TYPE_CHECKING:
    from tests.s3 import S3

DIGITS = "digits"
"""Where in the bucket the images are: digits/CLASS/NUMBER.png."""


# --- MLflow ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def mlflow_server(
    folder: Path,
    port: int,
    store: str | None = None,
    artifacts: str | None = None,
    **environment: str,
) -> Iterator[None]:
    """MLflow's server, which answers to 127.0.0.1 only and ends as if it were killed.

    Args:
        folder: for its log, and for what has no other place.
        store: of the runs; by default a sqlite file.
        artifacts: by default a folder.
    """
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", store or f"sqlite:///{folder}/server.db"]
    command += ["--artifacts-destination", artifacts or str(folder / "artifacts")]
    command += ["--allowed-hosts", f"127.0.0.1:{port}"]
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=folder, env={**os.environ, **environment}
        )
        try:
            wait_for(lambda: _answers(port), "the MLflow server", process)
            yield
        finally:
            for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                child.kill()
            process.wait()


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except OSError:
        return False


# --- PostgreSQL -----------------------------------------------------------------------------------


def why_no_postgres() -> str:
    """Empty where PostgreSQL can be started."""
    if not glob("/usr/lib/postgresql/*/bin/postgres") and not shutil.which("postgres"):
        return "there is no PostgreSQL: apt-get install postgresql"
    if os.getuid() == 0 and not _has_user("postgres"):
        return "PostgreSQL does not run as root, and there is no user `postgres` to run it as"
    return ""


def _has_user(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """A new database; yields its URI for MLflow."""
    user = "postgres" if os.getuid() == 0 else None
    found = sorted(glob("/usr/lib/postgresql/*/bin")) or [
        str(Path(shutil.which("postgres") or "").parent)
    ]
    with tempfile.TemporaryDirectory(prefix="pg-") as parent:
        data = Path(parent) / "data"
        data.mkdir(mode=0o700)
        if user:
            for path in (parent, data):
                shutil.chown(path, user, user)
        initdb = [f"{found[-1]}/initdb", "-D", data, "-U", "mlflow", "--auth=trust", "--no-sync"]
        subprocess.run(initdb, user=user, cwd="/", check=True, stdout=subprocess.DEVNULL)
        port = free_port()
        server = [f"{found[-1]}/postgres", "-D", data, "-p", str(port), "-k", parent]
        server += ["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        log = (Path(parent) / "log").open("wb")
        process = subprocess.Popen(server, user=user, cwd="/", stdout=log, stderr=log)
        try:
            wait_for(lambda: listens(port), "PostgreSQL", process)
            yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
        finally:
            process.terminate()
            process.wait()
            log.close()


# --- all of them ----------------------------------------------------------------------------------


def put_digits(s3: "S3", step: int = 1) -> None:
    """Every step-th of scikit-learn's digits, as a folder of PNG files a class."""
    from pipeline.data.formats.digits import all_digits

    for i, (pixels, label) in list(enumerate(zip(*all_digits(), strict=True)))[::step]:
        s3.put(f"{DIGITS}/{label}/{i:04d}.png", png(pixels))


def main() -> None:
    from tests.s3 import S3

    if reason := why_no_postgres():
        sys.exit(reason)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        s3 = S3()
        stack.callback(s3.close)
        put_digits(s3)
        environment, port = s3.environment(), free_port()
        store = stack.enter_context(postgres())
        artifacts = "s3://bucket/mlflow"
        stack.enter_context(mlflow_server(folder, port, store, artifacts, **environment))
        for name, value in {
            **environment,
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}",
        }.items():
            print(f"export {name}={value}")
        print(f"# the images are at s3://bucket/{DIGITS}; Ctrl-C ends it", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)


if __name__ == "__main__":
    main()
