"""Ray Data reads our Parquet parts."""

import pickle
import subprocess
import sys
from pathlib import Path

from tests.conftest import HANG
from tests.unit.test_interop import ENCODINGS, check, parts  # noqa: F401

READ_BY_RAY = """
import pickle, sys, tempfile
import ray, ray.data
from tests.unit.test_interop import ENCODINGS, check, parts
with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # sockets want a short path
    ray.init(address="local", num_cpus=1, include_dashboard=False, _temp_dir=folder)
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = [ray.data.read_parquet(path).take_all() for path in sys.argv[2:]]
    ray.shutdown()
with open(sys.argv[1], "wb") as file:
    pickle.dump(rows, file)
"""


def test_ray_data_opens_parts(parts: dict[str, Path], tmp_path: Path) -> None:
    """In a process of its own, whatever Ray of another test has left in this one."""
    folders = [str(parts[encoding] / "train") for encoding in ENCODINGS]
    command = [sys.executable, "-c", READ_BY_RAY, str(tmp_path / "rows"), *folders]
    subprocess.run(command, check=True, capture_output=True, timeout=HANG)
    for rows in pickle.loads((tmp_path / "rows").read_bytes()):
        rows.sort(key=lambda row: row["key"])
        check(*([row[name] for row in rows] for name in ("image", "label", "key")))
