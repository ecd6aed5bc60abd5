"""What only a process shows that has imported nothing yet."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

from pipeline.data.source import scan
from tests.conftest import ENVIRONMENT, HANG, ROOT, Workplace, tiny_command
from tests.hub import Hub
from tests.unit.test_hub import config, folder, hub  # noqa: F401
from tests.unit.test_imports import FILES
from tests.unit.test_registry import files


def test_importing_everything_has_no_effect(tmp_path: Path) -> None:
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES]
    code = (
        "import importlib, logging, os, threading\n"
        "before = set(os.environ)\n"
        f"for name in {modules}: importlib.import_module(name)\n"
        "import ray\n"
        "assert not ray.is_initialized()\n"
        "assert not logging.getLogger().handlers, logging.getLogger().handlers\n"
        "ours = {name for name in set(os.environ) - before if 'DDPM' in name or 'MLFLOW' in name}\n"
        "assert not ours, ours\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=_environment())
    assert list(tmp_path.iterdir()) == []


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_a_preprocessing_task_needs_no_torch() -> None:
    """Its import takes longer than many a shard, and 180 MB in every worker."""
    code = "import sys, pipeline.data.preprocess; print({'torch', 'sklearn'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "set()", result


def test_commands_that_only_look_import_none_of_the_heavy_packages(tiny: Workplace) -> None:
    """So they answer at once, also where everything has been run and a model is registered."""
    looks = [tiny_command(verb) for verb in ("status", "explain", "config")]
    commands = [*looks, ["history", "digits"], ["--help"], ["run", "--help"]]
    # not pandas: pyarrow looks for it when it is given its first value
    heavy = {"torch", "sklearn", "mlflow", "ray", "scipy", "matplotlib"}
    code = (
        "import sys\n"
        "from tasks.__main__ import execute\n"
        f"assert [execute(arguments) for arguments in {commands}] == [0] * {len(commands)}\n"
        f"print('heavy:', sorted({heavy} & set(sys.modules)))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=ENVIRONMENT,
        cwd=tiny.folder,
        capture_output=True,
        text=True,
    )
    assert result.stdout.splitlines()[-1:] == ["heavy: []"], result
    done = re.findall(r"^\w+ +done ", result.stdout, re.MULTILINE)
    assert len(done) == 6, "status has found all outputs, the model too"


def test_requirements_pin_what_the_loader_imports() -> None:
    """Each line is what is installed here, and nothing that loading imports is missing."""
    pins = files()["requirements.txt"].decode().splitlines()
    assert pins.pop(0).startswith("# and ray-ddpm itself")
    named = dict(pin.split("==") for pin in pins)
    assert named == {name: version(name).partition("+")[0] for name in named}
    code = "import sys, pipeline.registry.flavor; print(*{m.split('.')[0] for m in sys.modules})"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    owners = packages_distributions()
    loaded = {owners[name][0].lower() for name in result.stdout.split() if name in owners}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stated = {re.match(r"[\w-]+", line)[0].lower() for line in project["dependencies"]}
    assert loaded & stated <= {name.lower() for name in named}


def test_a_private_repository_is_read_with_the_token_of_the_environment(
    hub: Hub, folder: Path
) -> None:
    """In a process of its own: huggingface_hub looks at the environment when it is imported."""
    hub.token = "hf_secret"
    code = (
        "from pipeline.data.source import DataConfig, scan\n"
        f"print(scan(DataConfig(source='{hub.uri}/train', image_size=8, channels=3)).fingerprint)"
    )
    variables = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token, "HF_HOME": str(folder)}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**ENVIRONMENT, **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert result.stdout.strip() == scan(config(folder / "train")).fingerprint, result.stderr
