"""What the pipeline's own stages declare, and the ids of their outputs."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from pipeline import storage
from pipeline.data.config import NOT_IN_PARTS, SCANNED, DataConfig
from pipeline.data.input_shards import cut
from pipeline.data.preprocess import shard_digest
from pipeline.data.source import scan
from pipeline.errors import ConfigError
from tasks.stages import train
from tasks.stages.declarations import LAST, STAGES
from tasks.stages.plan import make_plan
from tasks.stages.progress import Board
from tasks.stages.stage import External, Stage, StageContext
from tests.unit.test_workflow import VALUES, config_with

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
    values: dict[str, Any], ids: str, tmp_path: Path
) -> None:
    """They are those that the first edition of the workflow gave, at commit efa2e0a."""
    stages = list(STAGES)
    if values is not DIGITS:  # their images are not here
        fixed = External({"source": "0" * 64})
        stages[0] = replace(stages[0], inputs_of=lambda config, look: fixed)
    plan = make_plan(stages, config_with(values, storage=str(tmp_path)), "", LAST)
    assert " ".join(stage.id for stage in plan.stages) == ids


def test_each_stage_comes_after_its_inputs_and_its_code_is_there() -> None:
    names = [stage.name for stage in STAGES]
    for i, stage in enumerate(STAGES):
        assert set(stage.inputs) <= set(names[:i])
        assert set(stage.beside) <= set(names[:i])
        with pytest.raises(TypeError, match="run.. missing 1 required positional argument: 'ctx'"):
            cast(Any, stage.run)()


@pytest.mark.parametrize(
    ("change", "first"),
    [
        ({"data__holdout": 0.2}, "preprocess"),
        ({"data__max_bad_fraction": 0.5}, "preprocess"),
        ({"evaluation__classifier_epochs": 2}, "reference"),
        ({"training__lr": 2e-3}, "train"),
        ({"evaluation__samples": 30}, "evaluate"),
        ({"registry__alias": "best"}, "register"),
        ({"serving__replicas": 3}, "register"),
        ({"sampling__steps": 9}, "evaluate"),
        ({"evaluation__during_training": 5}, None),
        ({"cluster__workers": 1}, None),
        ({"tracking__uri": "http://x"}, None),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_key_changes_what_depends_on_it_and_where_it_runs_nothing(
    change: dict[str, Any], first: str | None, tmp_path: Path
) -> None:
    plans = [
        make_plan(STAGES, config_with(DIGITS, storage=str(tmp_path), **changes), "", LAST)
        for changes in ({}, change)
    ]
    pairs = zip(plans[0].stages, plans[1].stages, strict=True)
    changed = [one.name for one, other in pairs if one.id != other.id]
    downstream = [stage.name for stage in STAGES if first is not None and needs(stage, first)]
    assert changed == downstream


def needs(stage: Stage, name: str) -> bool:
    by_name = {each.name: each for each in STAGES}
    return stage.name == name or any(needs(by_name[each], name) for each in stage.inputs)


OTHER_DATA: dict[str, Any] = {
    "source": "elsewhere",
    "labels": "labels.csv",
    "class_names": tuple("ABCDEFGHIJ"),
    "image_size": 16,
    "channels": 3,
    "resize": "exact",
    "min_size": 5,
    "max_aspect": 2.0,
    "drop_duplicates": False,
    "encoding": "png",
    "holdout": 0.2,
    "max_bad_fraction": 0.5,
    "images_per_shard": 100,
}
"""Of each key of `data` another value than in VALUES."""


def test_no_key_of_the_data_can_be_forgotten(tmp_path: Path) -> None:
    """A key is read unless it is said, once, that it is not; a new one is read as it comes."""
    assert set(OTHER_DATA) == set(DataConfig.model_fields), "give a new key a value here"
    config = DataConfig.model_validate(VALUES["data"])
    source = scan(config)
    fixed = replace(STAGES[0], inputs_of=lambda config, look: External({"source": "same"}))
    shard = cut(source, config.images_per_shard)[0]

    def ids(config: DataConfig) -> tuple[str, str]:
        whole = config_with(VALUES, storage=str(tmp_path)).model_copy(update={"data": config})
        stage_id = make_plan([fixed], whole, "", "preprocess")["preprocess"].id
        return stage_id, shard_digest(shard, config, source.class_names)

    before = ids(config)
    for key, value in OTHER_DATA.items():
        of_set, of_shard = ids(config.model_copy(update={key: value}))
        assert (of_set == before[0]) == (key in SCANNED), key
        assert (of_shard == before[1]) == (key in NOT_IN_PARTS), key


def test_a_batch_larger_than_the_data_is_refused_before_anything_starts(tmp_path: Path) -> None:
    shards = {"stage": "preprocess", "id": "s", "inputs": {}, "config": {}, "files": []}
    stats = {"num_images": {"train": 1527, "holdout": 270}}
    storage.commit(str(tmp_path / "s"), storage.Manifest(format=1, stats=stats, **shards))
    config = config_with(VALUES, training__batch_size=4096)
    context = StageContext(
        config,
        "id",
        str(tmp_path),
        {"preprocess": str(tmp_path / "s")},
        "",
        Board().add("train"),
        lambda: pytest.fail("MLflow"),
    )
    with pytest.raises(
        ConfigError, match=r"training.batch_size=4096 is more than the 1527 training"
    ):
        train.run(context)
