"""What `training.precision: auto` becomes, and what is said of where a training runs."""

import os
from pathlib import Path

import pytest
import torch

from pipeline import storage
from pipeline.config import load_config
from pipeline.training import checkpoint
from pipeline.training.config import Precision, TrainingConfig
from pipeline.training.loop import make_state
from pipeline.training.precision import computes_natively, is_small, prefers_bfloat16, resolve
from tasks.stages import notices
from tasks.stages.train_worker import Job, flops_of, model_spec, with_precision
from tests import needs
from tests.conftest import ROOT
from tests.unit.test_training import CPU, SPEC, config, fresh, run, save

DIGITS = str(ROOT / "configs" / "digits.yaml")


def test_auto_is_bfloat16_where_every_worker_computes_it_else_float32() -> None:
    assert resolve("auto", None, everywhere=True) == "bfloat16"
    assert resolve("auto", None, everywhere=False) == "float32"


@pytest.mark.parametrize("everywhere", [True, False])
def test_a_precision_that_was_asked_for_stays(everywhere: bool) -> None:
    asked: tuple[Precision, ...] = ("float32", "tf32", "bfloat16", "float16")
    for precision in asked:
        assert resolve(precision, None, everywhere) == precision


def test_a_run_keeps_the_precision_in_which_it_began(tmp_path: Path) -> None:
    training = config(precision="bfloat16", steps=2)
    state = fresh(training)
    run(state, training)
    save(tmp_path, state, SPEC)
    kept = checkpoint.read(str(tmp_path), 2).precision
    assert kept == "bfloat16"
    assert resolve("auto", kept, everywhere=False) == "bfloat16"
    assert resolve("auto", "float32", everywhere=True) == "float32"


def test_a_checkpoint_from_before_auto_goes_on_in_what_its_config_says(tmp_path: Path) -> None:
    save(tmp_path, fresh(config(precision="float32")), SPEC)
    path = f"{tmp_path}/{checkpoint.checkpoint_name(0)}/{checkpoint.STATE}"
    record = storage.read_json(path)
    del record["precision"]
    storage.write_json(path, record)
    kept = checkpoint.read(str(tmp_path), 0).precision
    assert kept is None
    assert resolve("float32", kept, everywhere=True) == "float32"


def test_a_worker_by_auto_does_what_one_does_whose_config_says_what_auto_became() -> None:
    jobs = {
        precision: Job(load_config(DIGITS, [f"training.precision={precision}"]), "", "", [], None)
        for precision in ("auto", "float32", "bfloat16")
    }
    for became in ("float32", "bfloat16"):
        assert with_precision(jobs["auto"], became) == jobs[became]


def test_nobody_trains_before_auto_is_resolved() -> None:
    with pytest.raises(AssertionError):
        make_state(SPEC.make_network(), config(precision="auto"), 1000)


@needs.CPU_INFO.met_if(Path("/proc/cpuinfo").exists())
def test_a_cpu_computes_bfloat16_if_the_kernel_says_so_and_onednn_may() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    may = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper() not in ("SSE41", "AVX", "AVX2")
    has = bool(flags & {"avx512_bf16", "amx_bf16"})
    assert computes_natively(CPU, "bfloat16") == (has and may)
    assert computes_natively(CPU, "float32") and computes_natively(CPU, "tf32")


def test_auto_takes_bfloat16_on_a_cpu_for_the_larger_networks_only() -> None:
    native = computes_natively(CPU, "bfloat16")
    flops = {}
    for name in ("digits", "fashion_mnist"):
        spec = model_spec(load_config(str(ROOT / "configs" / f"{name}.yaml")), ["a", "b"])
        flops[name] = flops_of(spec)
    assert not prefers_bfloat16(CPU, flops["digits"])
    assert prefers_bfloat16(CPU, flops["fashion_mnist"]) == native
    assert not is_small(torch.device("cuda"), flops["digits"]), "GPUs have no such limit"


def test_auto_is_the_default_and_what_the_shipped_configs_have() -> None:
    assert TrainingConfig(steps=1, batch_size=1, lr=1.0).precision == "auto"
    for path in (ROOT / "configs").glob("*.yaml"):
        assert load_config(str(path)).training.precision == "auto", path.name


def test_what_auto_became_is_said_with_its_reason() -> None:
    def said(precision: Precision, kept: bool = False, small: bool = False) -> str:
        return notices.chosen(precision, kept, small)["chosen"]

    assert said("bfloat16") == (
        "training.precision=auto is bfloat16, which all workers compute natively"
    )
    assert "is float32, since not all workers" in said("float32")
    assert "is float32, in which CPUs compute so small a network" in said("float32", small=True)
    assert "is bfloat16, in which it began" in said("bfloat16", kept=True, small=True)


def test_an_emulated_precision_is_said_with_its_factor_and_what_helps() -> None:
    (said,) = notices.emulated("bfloat16", "bfloat16", "CPU", 10.26).values()
    assert said.startswith("training.precision=bfloat16 is emulated by a worker's CPU")
    assert "10.3 times as long as in float32" in said
    assert said.endswith("use training.precision=auto")
    (said,) = notices.emulated("auto", "bfloat16", "Tesla T4", 2.0).values()
    assert said.startswith("training goes on in bfloat16, emulated by a worker's Tesla T4")
    assert "auto" not in said, "it would not help"


@pytest.mark.parametrize(("workers", "cpus", "fits"), [(2, 1, True), (1, 3, False), (3, 1, False)])
def test_more_threads_than_cores_are_said(workers: int, cpus: int, fits: bool) -> None:
    said = notices.crowded(workers, cpus, cores=2)
    assert (said == {}) == fits
    for sentence in said.values():
        assert "3 threads (cluster.workers, cluster.cpus_per_worker)" in sentence
        assert "2 cores" in sentence


def test_gpus_that_stand_idle_are_said() -> None:
    (said,) = notices.idle_gpus(gpus_per_worker=0, gpus=2).values()
    assert "2 GPUs" in said and said.endswith("use cluster.gpus_per_worker=1, with a worker a GPU")
    assert notices.idle_gpus(0, 0) == notices.idle_gpus(1, 2) == {}
