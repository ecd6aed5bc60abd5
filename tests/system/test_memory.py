"""What decoding takes of memory, against what the code states; each in a process of its own."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import needs
from tests.conftest import ROOT
from tests.unit.test_images import encoded, in_mode

IMAGE = """
import sys
from pathlib import Path
from pipeline.data.images import decode

def peak():  # resource's is never below that of the process that started this one
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

decode(Path(sys.argv[1]).read_bytes(), 64, 3)
for path in sys.argv[2:]:
    data = Path(path).read_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak()
    decode(data, 64, 3)
    print(peak() - before)
"""


@needs.CLEAR_REFS.met_if(Path("/proc/self/clear_refs").exists())
def test_an_image_takes_the_memory_that_is_stated(tmp_path: Path) -> None:
    """By MAX_PIXELS; in a process of its own, for its peak."""
    side = 3000
    kinds = {"RGBA": 8, "LA": 8, "L": 8, "I;16": 8, "RGB": 4}
    paths = [tmp_path / "first", *(tmp_path / kind for kind in kinds), tmp_path / "WebP"]
    paths[0].write_bytes(in_mode("RGBA", 90, 70))
    for path, kind in zip(paths[1:], kinds, strict=False):
        path.write_bytes(encoded(Image.new(kind, (side, side)), compress_level=1))
    paths[-1].write_bytes(encoded(Image.new("RGB", (side, side)), "WEBP", quality=0, method=0))
    command = [sys.executable, "-c", IMAGE, *map(str, paths)]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for stated, grown in zip([*kinds.values(), 12], output.split(), strict=True):
        # beside it a band in several forms
        assert int(grown) < stated * side**2 + 28 * 2**20, output


TASK = """
import sys
from pathlib import Path
from pipeline.data.input_shards import cut
from pipeline.data.parts import Parts
from pipeline.data.preprocess import preprocess_shard
from pipeline.data.source import DataConfig, scan

def peak():  # resource's is never below that of the process that started this one
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

first, rest = (
    DataConfig(source=source, image_size=256, channels=3, drop_duplicates=False, holdout=0.0,
               images_per_shard=600, encoding=sys.argv[2])
    for source in (sys.argv[1] + "/first", sys.argv[1] + "/rest")
)
(small,), (large,) = (cut(scan(config), config.images_per_shard) for config in (first, rest))
preprocess_shard(small, first, [], sys.argv[1] + "/out")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = peak()
preprocess_shard(large, rest, [], sys.argv[1] + "/out")
print(large.items.num_rows, peak() - before)
"""


@needs.CLEAR_REFS.met_if(Path("/proc/self/clear_refs").exists())
@pytest.mark.parametrize(("encoding", "times"), [("raw", 2), ("png", 3)])
def test_a_task_takes_the_memory_that_is_stated(tmp_path: Path, encoding: str, times: int) -> None:
    """By MAX_SHARD_BYTES; in a process of its own, for its peak. Noise is as large as PNG."""
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (256, 256, 3), np.uint8)).save(buffer, "PNG")
    for i in range(304):
        path = tmp_path / ("first" if i < 4 else "rest") / f"{i:03d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(buffer.getvalue())
    command = [sys.executable, "-c", TASK, str(tmp_path), encoding]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rows, grown = map(int, output.split())
    decoded = rows * 256 * 256 * 3
    assert decoded < grown < times * decoded + 2**24
