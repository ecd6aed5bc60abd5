"""A pipeline all of whose places are servers: a bucket, MLflow's server, PostgreSQL behind it."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from mlflow.tracking import MlflowClient

from pipeline import storage
from pipeline.data.sources import DataConfig, scan
from pipeline.errors import StorageError
from pipeline.registry.runs import make_client
from tests.conftest import ENVIRONMENT, Workplace, end, free_port, tiny_command, wait_for

pytest.importorskip("moto", reason="pip install 'ray-ddpm[s3-test]'")

from tests.conftest import HANG
from tests.s3 import S3, Unreliable
from tests.servers import (
    DIGITS,
    mlflow_server,
    postgres,
    put_digits,
    why_no_postgres,
)

pytestmark = [
    pytest.mark.skipif(bool(why_no_postgres()), reason=why_no_postgres()),
]

STAGES = ("preprocess", "reference", "train", "evaluate", "register", "sample")
FAULTS = ("500", "503", "slow", "cut", "lost")
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


@pytest.fixture
def here(elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process finds the bucket."""
    import s3fs

    for name, value in elsewhere.s3.environment().items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_run_goes_through_while_the_bucket_stumbles_and_mlflow_is_restarted(
    elsewhere: Elsewhere, here: None, tmp_path: Path
) -> None:
    place, runs = Workplace(tmp_path), "s3://bucket/servers"
    proxy = Unreliable(
        elsewhere.s3, lambda i, *_: FAULTS[i // 61 % len(FAULTS)] if i % 61 == 60 else ""
    )
    environment = {
        **elsewhere.s3.environment(proxy.endpoint),
        "MLFLOW_TRACKING_URI": elsewhere.tracking_uri,
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    }
    server = (tmp_path, elsewhere.port, elsewhere.database, "s3://bucket/mlflow")
    sets = (f"storage={runs}", "evaluation.during_training=0")
    command = tiny_command("run", *sets, config="images_s3")
    with mlflow_server(*server, **elsewhere.s3.environment()):
        process = place.start(*command, **environment)
        try:
            wait_for(
                lambda: any("/step-" in path for _, path, _ in list(proxy.requests)),
                "a checkpoint",
            )
        except BaseException:
            end(process)
            raise
    try:
        with mlflow_server(*server, **elsewhere.s3.environment()):
            output, _ = process.communicate(timeout=HANG)
            assert process.returncode == 0, output
            assert f"MLflow   {elsewhere.tracking_uri}\n" in output
            assert "View run" not in output  # which MLflow would say
            assert {wrong for _, _, wrong in proxy.requests} == {"", *FAULTS}
            for stage in STAGES:
                folders = [
                    f"{runs}/{stage}/{name}" for name in storage.list_names(f"{runs}/{stage}")
                ]
                assert folders
                for folder in folders:
                    manifest = storage.read_manifest(folder)
                    assert manifest is not None
                    for entry in manifest.files:
                        assert storage.entry_of(folder, entry.path) == entry
            images = scan(DataConfig(source=f"s3://bucket/{DIGITS}", image_size=8, channels=1))
            assert images.items.num_rows == 599

            client = MlflowClient(elsewhere.tracking_uri, elsewhere.tracking_uri)
            version = client.get_model_version_by_alias("images_s3", "champion")
            history = client.get_metric_history(version.run_id, "loss")
            assert [point.step for point in history] == list(range(5, 61, 5))
            assert place.ddpm(*command, **environment).count("cached") >= len(STAGES)
            place.ddpm("sample", "images_s3@champion", "-n", "2", "--steps", "3", **environment)
            assert (place.folder / "samples" / "0001.png").is_file()
    finally:
        end(process)
        proxy.close()


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
                    command, env=environment, stdout=subprocess.PIPE, text=True
                )
                loggers.append(process)
            runs = [
                str(process.stdout and process.stdout.readline()).strip() for process in loggers
            ]
            assert len(set(runs)) == LOGGERS
        assert any(process.poll() is None for process in loggers), "the server went too late"
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
