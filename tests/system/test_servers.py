"""MLflow's server with PostgreSQL behind it and its artifacts in a bucket."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from mlflow.tracking import MlflowClient

from pipeline.errors import StorageError
from pipeline.registry.runs import make_client
from tests import needs
from tests.conftest import ENVIRONMENT, end, free_port

pytest.importorskip("moto", reason=needs.extra("moto", "s3-test"))

from tests.conftest import HANG
from tests.s3 import S3
from tests.servers import (
    mlflow_server,
    postgres,
    put_digits,
    why_no_postgres,
)

pytestmark = needs.POSTGRESQL.met_if(not why_no_postgres())

LOGGERS, POINTS = 3, 100


class Elsewhere(NamedTuple):
    """The servers; MLflow's comes and goes."""

    s3: S3
    database: str
    port: int

    @property
    def tracking_uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Elsewhere]:
    s3 = S3()
    put_digits(s3, step=3)
    with postgres() as database:
        yield Elsewhere(s3, database, free_port())
    s3.close()


def test_several_processes_log_at_once_while_the_server_is_restarted(
    elsewhere: Elsewhere, tmp_path: Path
) -> None:
    code = (
        "import sys, time\n"
        "from pipeline.errors import StorageError\n"
        "from pipeline.registry.runs import TrackedRun\n"
        "uri, number = sys.argv[1:]\n"
        "run = TrackedRun(uri, 'at once', f'train-{number}', {'number': number})\n"
        "print(run.run_id, flush=True)\n"
        f"for step in range(1, {POINTS} + 1):\n"
        f"    step == {POINTS} // 2 and sys.stdin.readline()\n"
        "    while True:\n"
        "        try:\n"
        "            run.log_history([{'step': step, 'loss': float(step)}])\n"
        "            break\n"
        "        except StorageError as error:\n"
        "            assert '\\n' not in str(error)\n"
        "            time.sleep(0.2)\n"
    )
    server = (tmp_path, elsewhere.port, elsewhere.database, "s3://bucket/mlflow")
    environment = {
        **ENVIRONMENT,
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    }
    uri = elsewhere.tracking_uri
    loggers: list[subprocess.Popen[str]] = []
    try:
        with mlflow_server(*server, **elsewhere.s3.environment()):
            for i in range(LOGGERS):
                command = [sys.executable, "-c", code, uri, str(i)]
                process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                loggers.append(process)
            runs = [
                str(process.stdout and process.stdout.readline()).strip() for process in loggers
            ]
            assert len(set(runs)) == LOGGERS
        for process in loggers:  # to the second half, of which the beginning finds no server
            assert process.stdin is not None
            process.stdin.close()
        with mlflow_server(*server, **elsewhere.s3.environment()):
            for process in loggers:
                assert process.wait(timeout=HANG) == 0
            client = MlflowClient(uri, uri)
            for run in runs:
                history = client.get_metric_history(run, "loss")
                assert [(point.step, point.value) for point in history] == [
                    (step, float(step)) for step in range(1, POINTS + 1)
                ]
            assert len({client.get_run(run).info.experiment_id for run in runs}) == 1

            port = elsewhere.port
            with pytest.raises(StorageError) as refused:
                make_client(f"http://localhost:{port}")
            assert str(refused.value) == (
                f"MLflow at http://localhost:{port} cannot be used: it refuses the name "
                f"localhost:{port}; start it with --allowed-hosts localhost:{port}"
            )
    finally:
        for process in loggers:
            end(process)
