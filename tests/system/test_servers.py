"""MLflow's server with PostgreSQL behind it and its artifacts in a bucket."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import fsspec
import pytest
from mlflow.tracking import MlflowClient

from pipeline.errors import StorageError
from pipeline.loading import load_model
from pipeline.registry.logged_models import VERSIONS_TAG, log_model
from pipeline.registry.registration import register
from pipeline.registry.runs import TrackedRun
from pipeline.registry.store import make_client
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
from tests.unit.test_registry import files
from tests.unit.test_runs import Killed, kill_after

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
                history = client.get_metric_history(run, "train/loss")
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


def test_a_model_is_registered_through_a_server_as_on_sqlite(
    elsewhere: Elsewhere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One logged model and one version, killed in between or not; its weights lie there once."""
    import mlflow

    server = (tmp_path, elsewhere.port, elsewhere.database, "s3://bucket/mlflow")
    uri, content = elsewhere.tracking_uri, files("through a server")
    with mlflow_server(*server, **elsewhere.s3.environment()):
        run = TrackedRun(uri, "through_a_server", "t", {"lr": 1})
        digest = json.loads(content["model.json"])["digest"]
        model_id = log_model(run, "shapes-step-40", digest, 40)
        run.log_figures(40, {"eval/fd": 5.0}, model_id, ("shapes", "data-1"))
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_after(0, "create_model_version", patch)
            register(run, "shapes", content, {})
        references = [register(run, "shapes", content, {"ddpm.new": "1"}) for _ in range(2)]
        assert [reference.version for reference in references] == ["1", "1"]
        (model,) = run.client.search_logged_models([run.experiment_id])
        assert (model.model_id, str(model.status)) == (model_id, "READY")
        assert [figure.value for figure in model.metrics] == [5.0]
        assert json.loads(model.tags[VERSIONS_TAG]) == [{"name": "shapes", "version": "1"}]
        outputs = run.client.get_run(run.run_id).outputs.model_outputs
        assert [(output.model_id, output.step) for output in outputs] == [(model_id, 40)]
        assert load_model("models:/shapes/1", uri).digest == digest
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        loaded = mlflow.pyfunc.load_model("models:/shapes/1")
        assert loaded.predict({"n": 2, "steps": 2}).shape == (2, 8, 8, 1)
        assert loaded.model_id == model_id
    bucket = fsspec.filesystem("s3", key="test", secret="test", endpoint_url=elsewhere.s3.endpoint)
    copies = [name for name in bucket.find("bucket/mlflow") if name.endswith(".safetensors")]
    assert [bucket.cat_file(name) for name in copies] == [content["weights.safetensors"]]
    assert f"/models/{model_id}/artifacts/" in copies[0]
