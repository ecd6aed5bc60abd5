"""`training.precision: auto` on real Ray: a run keeps elsewhere what it became where it began."""

import json
import shutil
from pathlib import Path

import torch

from pipeline.training.precision import computes_natively
from tests.conftest import Workplace, tiny_command
from tests.head import Head


def test_a_run_that_goes_on_keeps_what_it_began_with_and_says_so(
    tiny: Workplace, head: Head, tmp_path: Path
) -> None:
    """It began on a machine that took bfloat16, which this one may emulate."""
    began = tiny.manifest("train")
    for stage in ("preprocess", "train"):
        shutil.copytree(tiny.folder / "runs" / stage, tmp_path / "runs" / stage)
    interrupted = tmp_path / "runs" / "train" / began["id"]
    (interrupted / "manifest.json").unlink()
    shutil.rmtree(interrupted / "step-000000060")
    for path in interrupted.glob("step-*/state.json"):
        state = json.loads(path.read_text())
        path.write_text(json.dumps({**state, "precision": "bfloat16"}))
    place = Workplace(tmp_path, head.joined)
    output = place.ddpm(*tiny_command("train", "cluster.workers=1"))
    made = place.manifest("train")
    assert (made["id"], made["stats"]["precision"]) == (began["id"], "bfloat16")
    assert "training.precision=auto is bfloat16, in which it began" in output
    emulated = "training goes on in bfloat16, emulated by a worker's CPU: the network" in output
    assert emulated != computes_natively(torch.device("cpu"), "bfloat16")
