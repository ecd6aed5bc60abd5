"""A whole run on servers: the bucket stumbles, and MLflow's server is restarted meanwhile."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from pipeline import storage
from pipeline.data.config import DataConfig
from pipeline.data.source import scan
from tests.conftest import HANG, Workplace, tiny_command, wait_for
from tests.s3 import STUMBLES, Unreliable, stumble
from tests.servers import (
    DIGITS,
    mlflow_server,
)
from tests.system.test_servers import Elsewhere, elsewhere, pytestmark  # noqa: F401

STAGES = ("preprocess", "reference", "train", "evaluate", "register", "sample")


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
    proxy = Unreliable(elsewhere.s3, stumble)
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
        wait_for(
            lambda: any("/step-" in path for _, path, _ in list(proxy.requests)),
            "a checkpoint",
            process,
        )
    try:
        with mlflow_server(*server, **elsewhere.s3.environment()):
            output, _ = process.communicate(timeout=HANG)
            assert process.returncode == 0, output
            assert f"MLflow   {elsewhere.tracking_uri}/#/experiments/1?workflowType=" in output
            assert "View run" not in output  # which MLflow would say
            assert {wrong for _, _, wrong in proxy.requests} == {"", *STUMBLES}
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
            history = client.get_metric_history(version.run_id, "train/loss")
            assert [point.step for point in history] == list(range(5, 61, 5))
            assert place.ddpm(*command, **environment).count("cached") >= len(STAGES)
            place.ddpm("sample", "images_s3@champion", "-n", "2", "--steps", "3", **environment)
            assert (place.folder / "samples" / "0001.png").is_file()
    finally:
        proxy.close()
