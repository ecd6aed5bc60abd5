"""Configuration: strict, and every mistake is one sentence with the remedy in it."""

import re
from pathlib import Path

import pytest
import yaml

from pipeline.config import load_config, validate_config
from pipeline.errors import ConfigError
from tests.conftest import ROOT, TINY

DIGITS = str(ROOT / "configs" / "digits.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_config_loads(path: Path) -> None:
    config = load_config(str(path))
    assert config.name == path.stem
    header = path.read_text().split("\nname:")[0]
    for word in (f"ddpm run configs/{path.name}", "Hardware:", "Versions:", "Time:", "Result:"):
        assert word in header, f"it opens with its {word}"
    assert validate_config(yaml.safe_load(yaml.safe_dump(config.model_dump())), "again") == config


def test_the_tiny_config_of_the_tests_loads() -> None:
    assert load_config(DIGITS, TINY).training.steps == 60


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("training.lrr=1", "training.lrr is not a known key; did you mean training.lr?"),
        (
            "evaluation.over_steps={samplers: [ddim], steps: [5, 5000]}",
            "evaluation.over_steps: ddim with 5000 steps: steps=5000 must be from 1 to the model's",
        ),
        (
            "evaluation.over_steps={samplers: [], steps: [5]}",
            "evaluation.over_steps: name at least one of samplers and one of steps",
        ),
        (
            "evaluation.over_steps={samplers: [ddimm], steps: [5]}",
            "evaluation.over_steps.samplers.0='ddimm' is wrong: should be 'ancestral', 'ddim'",
        ),
        (
            "evaluation.extractor={file: x.pth, sha256: '"
            + "0" * 64
            + "', name: inception, image_size: 299}",
            "evaluation.extractor.file: 'x.pth' must end in .pt (TorchScript) or .onnx",
        ),
        (
            "evaluation.extractor={kind: inception, file: x.pth, sha256: '" + "0" * 64 + "'}",
            "evaluation.extractor.file: 'x.pth' must end in .safetensors: no pickle is read here",
        ),
        (
            "evaluation.sigma_rel=0.07",
            "evaluation.sigma_rel=0.07 is made from snapshots of power averages, which "
            "training.ema.kind=decay does not keep: use kind=power",
        ),
        (
            "evaluation.extractor={kind: resnet}",
            "evaluation.extractor.kind='resnet' is wrong: should be 'file' or 'inception' or 'eff",
        ),
        (
            "evaluation.extractor={kind: efficientnet_lite0, image_size: 3}",
            "evaluation.extractor.image_size=3 has no meaning for evaluation.extractor.kind="
            "efficientnet_lite0: drop it",
        ),
        (
            "registry.promote_if.fd_cnn_digits={at_leest: 3}",
            "registry.promote_if.fd_cnn_digits.at_leest is not a known key; did you mean",
        ),
        ("trainin.lr=3", "trainin is not a known key; did you mean training?"),
        ("lr=3", "lr is not a known key; did you mean training.lr?"),
        ("xyzzy.q=3", "xyzzy is not a known key"),
        ("training.lr=abc", "training.lr='abc' is wrong: should be a valid number"),
        ("training.lr=true", "training.lr=True is wrong: should be a valid number"),
        ("training.lr=0", "training.lr=0 is wrong: should be greater than 0"),
        ("training.lr=.nan", "training.lr=nan is wrong"),
        ("training.steps=2.5", "training.steps=2.5 is wrong: should be a valid integer"),
        ("training.steps='8'", "training.steps='8' is wrong: should be a valid integer"),
        ("training=3", "training=3 is wrong: should be a section with keys of its own"),
        ("data.channels=2", "data.channels=2 is wrong: should be 1 or 3"),
        ("data.source=", "data.source=None is wrong: should be a valid string"),
        ("seed=-1", "seed=-1 is wrong: should be greater than or equal to 0"),
        ("name=a b", "name='a b' is wrong"),
        (
            "sampling.guidance=99",
            "sampling.guidance=99 is wrong: should be less than or equal to 50",
        ),
        (
            "sampling.sampler=magic",
            "sampling.sampler='magic' is wrong: should be 'ancestral', 'ddim', 'euler',",
        ),
        ("sampling.steps=2000", "sampling: steps=2000 must be from 1 to the model's 1000"),
        ("training.label_dropout=0", "sampling.guidance=0.5 needs training.label_dropout above 0"),
        (
            "training.batch_size=1",
            "training.batch_size=1 is less than the 2 parts into which cluster.workers=2 and "
            "training.accumulate=1 cut it",
        ),
        ("training.accumulate=33", "is less than the 66 parts into which cluster.workers=2 and"),
        ("cluster.workers=0", "cluster.workers: 0 must be a number from 1, or [least, most]"),
        ("cluster.workers=[3, 2]", "cluster.workers: [3, 2] must be a number from 1, or"),
        ("serving.replicas=[1, 1001]", "[1, 1001] must be a number from 1 to 1000, or"),
        ("cluster.workers=two", "cluster.workers: 'two' must be a number from 1, or"),
        ("cluster.workers=[3, 2]", "cluster.workers: [3, 2] must be a number from 1, or"),
        ("cluster.workers=[1, 65]", "is less than the 65 parts into which cluster.workers=[1, 65]"),
        ("network.attention_at=[5]", "attention_at=[5] is not among the resolutions of the levels"),
        ("data.image_size=9", "data.image_size=9 is not a multiple of 2"),
        ("diffusion.zero_terminal_snr=true", "prediction=eps cannot work"),
        ("diffusion.variance=learned_range", "with training.objective=simple would leave"),
        ("training.objective=hybrid", "has no variance to learn: use objective=simple"),
        ("diffusion.schedule=learned", "objective=simple cannot learn a schedule"),
        ("training.min_snr_gamma=3", "min_snr_gamma=3.0 has no meaning for loss_weight=uniform"),
        ("diffusion.sigma_max=9", "sigma_max=9.0 has no meaning for schedule=cosine"),
        ("sampling.order=3", "order=3 has no meaning for sampler=ddim"),
        ("seed=08x", "seed='08x' is wrong: should be a valid integer"),
        ("registry.alias=v3", "registry.alias: 'v3' reads as a version"),
        ("noequals", "--set 'noequals' must have the form key=value"),
        ("seed.x=1", "seed is a value, not a section"),
        ("training.lr=[1", "--set training.lr=[1"),
    ],
)
def test_a_mistake_is_one_sentence_with_the_key(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(DIGITS, [override])
    message = str(error.value)
    assert sentence in message
    assert "\n" not in message


def test_several_mistakes_are_a_line_each() -> None:
    with pytest.raises(ConfigError) as error:
        load_config(DIGITS, ["training.lr=abc", "training.steps=0"])
    assert len(str(error.value).splitlines()) == 2


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "must hold sections"),
        ("- a\n- b\n", "must hold sections"),
        ("a: [1\n", "line 2: "),
        ("a:\n\tb: 1\n", "line 2: "),
        ("name: x\nname: y\n", "line 2: the key 'name' stands twice"),
        ("!!python/object:os.system {}\n", "line 1: could not determine a constructor"),
        ("name: x\n", "data is missing, and has no default"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, text))
    assert sentence in str(error.value)


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a config file"):
        load_config(str(tmp_path / "nowhere.yaml"))
    with pytest.raises(ConfigError, match="is not a config file"):
        load_config(str(tmp_path))
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(str(tmp_path / "b.yaml"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("3E+2", 300.0),
        ("1_000", 1000),
        (".5", 0.5),
        ("1.", 1.0),
        ("7", 7),
        ("010", 10),
    ],
)
def test_numbers_are_those_of_yaml_1_2(text: str, value: float) -> None:
    assert load_config(DIGITS, [f"training.lr={text}"]).training.lr == value


def test_words_that_yaml_1_1_would_twist_stay_words() -> None:
    assert load_config(DIGITS, ["name=no"]).name == "no"
    assert load_config(DIGITS, ["data.source=12:30"]).data.source == "12:30"
    assert load_config(DIGITS, ["data.source=2024-05-01"]).data.source == "2024-05-01"


def test_combinations_over_sections_are_refused() -> None:
    continuous = ["diffusion.schedule=vp", "training.objective=vlb"]
    terminal = ["diffusion.zero_terminal_snr=true", "diffusion.prediction=v"]
    for overrides, sentence in (
        (continuous, "training.objective=vlb is of discrete timesteps"),
        ([*terminal, "sampling.spacing=karras"], "spacing=karras cannot start at"),
        ([*terminal, "sampling.sampler=pndm"], "sampler=pndm cannot start at"),
        ([*terminal, "evaluation.ode_images=1"], "evaluation.ode_images=1 needs a last timestep"),
        (
            ["diffusion.schedule=edm", "training.timestep_sampler=loss_second_moment"],
            "loss_second_moment keeps the losses of each timestep",
        ),
    ):
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            load_config(DIGITS, overrides)
