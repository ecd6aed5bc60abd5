"""The DAG of stages."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config import validate_config
from tasks import workflow

# --- the pipeline's own stages ------------------------------------------------------------------

FLOAT32 = {"precision": "float32", "log_every": 25, "checkpoint_every": 250}
DIGITS: dict[str, Any] = {
    "name": "digits",
    "data": {"source": "builtin:digits", "image_size": 8, "channels": 1, "holdout": 0.15},
    "network": {"base_channels": 32, "channel_multipliers": [1, 2], "attention_at": [4]},
    "diffusion": {"schedule": "cosine"},
    "training": {"steps": 1500, "batch_size": 64, "lr": 1e-3, "ema": {"decay": 0.995}, **FLOAT32},
    "evaluation": {"samples": 500, "during_training": 200},
    "sampling": {"steps": 50, "guidance": 0.5},
}
CLOTHES: dict[str, Any] = {
    "name": "clothes",
    "seed": 3,
    "data": {
        "source": "train-*",
        "class_names": ["coat", "bag"],
        "image_size": 28,
        "channels": 1,
        "images_per_shard": 4096,
    },
    "network": {"base_channels": 32, "channel_multipliers": [1, 2, 2], "attention_at": [7]},
    "diffusion": {"prediction": "v"},
    "training": {"steps": 3000, "batch_size": 64, "lr": 1e-3, **FLOAT32},
    "evaluation": {"extractor": {"kind": "inception", "file": "f.safetensors", "sha256": "0" * 64}},
    "registry": {"alias": "best"},
}
IMAGES: dict[str, Any] = {
    "name": "images",
    "data": {
        "source": "s3://bucket/images",
        "labels": "s3://bucket/labels.csv",
        "image_size": 256,
        "channels": 3,
        "encoding": "png",
        "min_size": 200,
        "max_aspect": 2.0,
    },
    "network": {"preset": "ddpm_256"},
    "diffusion": {"schedule": "edm", "prediction": "edm"},
    "training": {"steps": 9, "batch_size": 64, "lr": 1e-4, "shuffle": "windowed", **FLOAT32},
    "sampling": {"sampler": "heun", "steps": 18},
    "serving": {"replicas": 1},
}


@pytest.mark.parametrize(
    ("values", "ids"),
    [
        (
            DIGITS,
            "3cf170b96e0463e4 f98d31d3887af5f6 aaa870f92de08e72 "
            "9002d75e7401953a 2233b953b29fe54d 9db77492d4b17b3e",
        ),
        (
            CLOTHES,
            "6acd0ddfcf917ed4 0d7c379db4021158 d34be9b6cffeedcd "
            "3c52389229953138 95f8dddcfdb84503 8686de02bd7f7c7f",
        ),
        (
            IMAGES,
            "93585c5f72755e39 07c463789da79829 5963249cb690e225 "
            "999c91c3a3f21543 a4f7fe0670c3ac73 3a041e2927568e7b",
        ),
    ],
    ids=["digits", "clothes", "images"],
)
def test_outputs_that_exist_keep_their_ids(
    values: dict[str, Any], ids: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are those that the first edition of the workflow gave, at efa2e0a."""
    if values is not DIGITS:
        source = SimpleNamespace(fingerprint="0" * 64)
        monkeypatch.setattr(workflow, "scan", lambda *_: source)
    config = validate_config({**values, "storage": str(tmp_path)}, "test")
    plan = workflow.plan(config, f"sqlite:///{tmp_path}/mlflow.db")
    assert " ".join(stage.id for stage in plan.stages) == ids
