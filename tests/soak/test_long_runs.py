"""Runs that take longer than the suite may, each disturbed once."""

import base64
import itertools
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.tracking import MlflowClient
from safetensors.torch import load

from pipeline.loading import read_checkpoint
from tasks.stages import averages
from tests.cluster import Cluster
from tests.conftest import HANG, Workplace, end, ray_workers, tiny_command, wait_for
from tests.servers import free_port, mlflow_server
from tests.service import Service
from tests.system.head.test_pipeline import (
    final_step,
    interrupt,
    metric_history,
    nodes,
    place_with_shards,
    wait_for_checkpoint,
)
from tests.system.test_nodes import PORT, REPLICA, cluster, needs_machines  # noqa: F401


def test_elastic_workers_follow_the_nodes_that_come_and_are_lost(
    tiny: Workplace, tmp_path: Path
) -> None:
    place = place_with_shards(tiny, tmp_path / "place")
    slow = ["network.base_channels=32", "training.batch_size=63", "training.steps=100000"]
    elastic = ["cluster.workers=[1, 2]", "cluster.resize_seconds=2"]
    wide = ["cluster.workers=1", "cluster.cpus_per_worker=2"]
    with nodes() as ask:
        address, first = ask("add 1").split()
        # that cluster asks for no token, though this user may have one
        at = {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"}
        # how long it waits for two workers where a lost node is still counted
        at["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "10"
        process = place.start(*tiny_command("train", *slow, *elastic), **at)
        try:
            wait_for(lambda: final_step(place) >= 20, "the first checkpoint")
            assert len(ray_workers(int(first), "RayTrainWorker")) == 1
            second = int(ask("add 1").split()[1])
            wait_for(lambda: ray_workers(second, "RayTrainWorker"), "a worker on the new node")
            wait_for_checkpoint(place)
            assert len(ray_workers(int(first), "RayTrainWorker")) == 1
            said = place.ddpm(*tiny_command("train", *wide), code=2, **at).splitlines()[-1]
            assert "error: training needs 1 worker of 2 CPUs (cluster.workers," in said
            assert "has room for 0 on its nodes (1 CPUs, 0 GPUs; 1 CPUs, 0 GPUs)" in said
            ask("remove 1")  # with all that ran there
            wait_for_checkpoint(place)
            wait_for_checkpoint(place)
            interrupt(process, signal.SIGINT)
        finally:
            end(process)
    steps = [step for step, _ in metric_history(place, "train/loss")]
    assert steps == list(range(5, steps[-1] + 1, 5))
    rates = [metric_history(place, f"speed/images_per_second{of}") for of in ("", "_per_worker")]
    numbers = [round(all_ / one) for (_, all_), (_, one) in zip(*rates, strict=True)]
    assert [number for number, _ in itertools.groupby(numbers)] == [1, 2, 1]


def test_the_weights_of_a_network_that_was_cut_over_the_workers_are_read_whole(
    tiny: Workplace, tmp_path: Path
) -> None:
    place = place_with_shards(tiny, tmp_path)
    power = "training.ema={kind: power, sigma_rel: [0.1, 0.2], num_snapshots: 4}"
    place.run_tiny("training.parallel=fsdp", "training.steps=20", power, verb="train")
    (last,) = place.folder.glob("runs/train/*/step-000000020")
    names = {path.name for path in last.iterdir()}
    assert {"ema-00000-of-00002.safetensors", "ema-00001-of-00002.safetensors"} <= names
    assert "ema.safetensors" not in names
    _, weights = read_checkpoint(str(last))
    (quiet,) = tiny.folder.rglob("weights.safetensors")
    shapes = [
        {name: tensor.shape for name, tensor in load(data).items()}
        for data in (weights, quiet.read_bytes())
    ]
    assert shapes[0] == shapes[1]

    train, evaluate = str(last.parent), str(tmp_path / "evaluate")
    assert averages.measured(train, evaluate)[1] == weights
    missed = averages.make_average(train, 0.1, evaluate)
    assert missed == pytest.approx(0, abs=1e-6)
    made = load(averages.measured(train, evaluate)[1])
    for name, tensor in load(weights).items():  # there it is float32, here of float16
        torch.testing.assert_close(made[name], tensor, rtol=2**-10, atol=1e-6)
    assert 1e-3 < averages.make_average(train, 0.13, evaluate) < 0.2
    other = load(averages.measured(train, evaluate)[1])
    assert any(not torch.equal(other[name], made[name]) for name in made)


def test_training_goes_on_while_mlflow_is_away_and_nothing_is_lost(
    tiny: Workplace, tmp_path: Path
) -> None:
    place = place_with_shards(tiny, tmp_path / "place")
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    quickly = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
    # all checkpoints stay, so that none is gone before its preview is made
    steps = ["training.steps=200", "training.keep_checkpoints=10", f"tracking.uri={uri}"]
    with mlflow_server(tmp_path, port):
        process = place.start(*tiny_command("train", *steps), **quickly)
        try:
            wait_for(lambda: list(place.folder.glob("runs/train/*/step-*20")), "a checkpoint")
        except BaseException:
            end(process)
            raise
    try:  # the server is gone
        wait_for(lambda: list(place.folder.glob("runs/train/*/step-*200")), "the last step")
        assert process.poll() is None, "it waits for MLflow"
        with mlflow_server(tmp_path, port):
            output, _ = process.communicate(timeout=HANG)
            assert process.returncode == 0, output
            (run_id,) = {place.manifest("train")["stats"]["mlflow_run_id"]}
            client = MlflowClient(tracking_uri=uri)
            history = client.get_metric_history(run_id, "train/loss")
            assert [point.step for point in history] == list(range(5, 201, 5))
            held_out = client.get_metric_history(run_id, "eval/holdout_loss")
            assert [point.step for point in held_out] == list(range(20, 201, 20))
    finally:
        end(process)


@needs_machines
@pytest.mark.usefixtures("output")
def test_a_node_lost_while_it_draws_takes_no_image_with_it(
    tiny: Workplace, cluster: Cluster, tmp_path: Path
) -> None:
    said = cluster.head.tmp / "serve.log"
    options = ["--replicas", "2", "--host", "0.0.0.0", "--port", str(PORT)]
    with said.open("w") as log:
        process = cluster.start("serve", "digits@champion", *options, stdout=log)
    try:
        wait_for(lambda: "\nlog " in said.read_text() or process.poll(), "the service")
        assert process.poll() is None, said.read_text()
        service = Service(f"http://{cluster.head.address}:{PORT}", PORT, process, "")
        body = {"n": 32, "seed": 11, "class_label": 3, "num_inference_steps": 200}
        quiet = service.images(**body)
        assert len({image["replica"] for image in quiet}) == 2
        replies: list[tuple[int, Any]] = []
        thread = threading.Thread(target=lambda: replies.append(service.post(body)))
        thread.start()
        (node, *_) = [node for node in cluster.nodes.values() if node.processes(REPLICA)]
        wait_for(lambda: service.get("/v1/engine")["requests"], "the request")
        node.lose(silently=True)
        thread.join()
    finally:
        end(process)
    ((status, reply),) = replies
    assert status == 200, reply
    assert [image["b64_json"] for image in reply["data"]] == [image["b64_json"] for image in quiet]
    assert len({image["replica"] for image in reply["data"]}) == 1, "the other has died"

    (tmp_path / "31.png").write_bytes(base64.b64decode(reply["data"][31]["b64_json"]))
    assert "bit for bit" in tiny.quick("reproduce", str(tmp_path / "31.png"))
