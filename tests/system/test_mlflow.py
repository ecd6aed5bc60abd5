"""What a person finds in MLflow of a run: who made it, its parameters, models and figures."""

import getpass
import json
import re
import shlex
import subprocess

import pytest
from mlflow.tracking import MlflowClient

from tests.conftest import ROOT, Workplace, tiny_command
from tests.system.head.test_pipeline import metric_history


def mlflow_of(place: Workplace) -> MlflowClient:
    uri = f"sqlite:///{place.folder}/mlflow.db"
    return MlflowClient(uri, uri)


def test_mlflow_says_who_trained_what_from_which_commit(tiny: Workplace) -> None:
    run = mlflow_of(tiny).get_run(tiny.manifest("train")["stats"]["mlflow_run_id"])
    tags = run.data.tags
    assert tags["mlflow.user"] == getpass.getuser()
    assert tags["mlflow.source.name"] == str(ROOT / "configs" / "digits.yaml")
    assert tags["mlflow.source.type"] == "LOCAL"
    head = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    said = subprocess.run(head, stdout=subprocess.PIPE, text=True, check=False)
    assert tags.get("mlflow.source.git.commit", "") == said.stdout.strip()
    (typed,) = re.findall(r"```sh\n(.*?)\n```", tags["mlflow.note.content"], re.DOTALL)
    assert shlex.split(typed.replace("\\\n", "")) == ["ddpm", *tiny_command("run")]
    params = run.data.params
    assert 15 < len(params) < 25
    network = tiny.manifest("train")["stats"]["num_parameters"]
    assert {
        "data.source": "builtin:digits",
        "data.num_images": str(tiny.manifest("preprocess")["stats"]["num_images"]["train"]),
        "network.kind": "unet",
        "network.base_channels": "8",
        "network.num_parameters": str(network),
        "training.steps": "60",
        "training.precision": tiny.manifest("train")["stats"]["precision"],
        "training.ema.decay": "0.995",
    }.items() <= params.items()


def test_mlflow_lists_the_checkpoints_and_the_registered_model_with_their_figures(
    tiny: Workplace,
) -> None:
    client = mlflow_of(tiny)
    run = client.get_run(tiny.manifest("train")["stats"]["mlflow_run_id"])
    steps = {output.step: output.model_id for output in run.outputs.model_outputs}
    assert sorted(steps) == [20, 40, 60]
    losses = dict(metric_history(tiny, "eval/holdout_loss"))
    for step, model_id in sorted(steps.items()):
        model = client.get_logged_model(model_id)
        assert (model.name, model.params["step"]) == (f"digits-step-{step}", str(step))
        figures = {figure.key: figure for figure in model.metrics}
        assert figures["eval/holdout_loss"].value == losses[step]
        for figure in model.metrics:
            assert (figure.step, figure.dataset_name) == (step, "digits")
            assert figure.dataset_digest == tiny.manifest("preprocess")["id"]
        files = {entry.path for entry in client.list_logged_model_artifacts(model_id)}
        assert ("weights.safetensors" in files) is (step == 60)
    evaluated = tiny.manifest("evaluate")["stats"]["figures"]
    wanted = {f"eval/{name}": figure["value"] for name, figure in evaluated.items()}
    found = {name: figure.value for name, figure in figures.items() if name.startswith("eval/")}
    assert found == pytest.approx(wanted)
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "digits", "version": "1"}]
    assert len(list(tiny.folder.rglob("weights.safetensors"))) == 1
