"""How fast shuffled batches of images are delivered, beside the loaders that others use.

    python -m tests.benchmarks.load_batches [--quick] [--peers PYTHON] [--folder FOLDER]

The same generated images, 32x32 and 64x64 RGB with the spectrum of photographs, lie on the local
disk in the form that each contender prefers. Everybody delivers batches of 64, a uint8 tensor with
its labels, in an order that is shuffled anew each epoch. A contender is a process that is bound to
one core and loads within itself; then one that is bound to two cores, where peers have two worker
processes and ours has its threads. They run in turn, several times; medians are shown. All files
are in the page cache for all: what is measured is the work for an image, not the disk.

PYTHON is an interpreter with torch, Pillow, webdataset and mosaicml-streaming; a peer that cannot
be started there is left out, and why is said. Ours are "full" (mapped into memory, any image may
come next), and "windowed" (read by row group, for data that does not fit), of raw and PNG columns.

A second table shows what windows cost in quality: the mean entropy of the labels in a batch of 64,
where the stored images are sorted by class.

The peer of a figure is the best of those that were measured.
"""

import argparse
import contextlib
import io
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import numpy as np
import torch
from PIL import Image

from pipeline.data.batches import Batches, FullShuffle, Shuffle
from pipeline.data.cache import memory_mapped
from pipeline.data.order import WindowedOrder, global_batch
from pipeline.data.parts import read_parts
from pipeline.data.prefetch import prefetch
from pipeline.data.shards import ROW_GROUP_SIZE
from pipeline.data.windows import WindowedShuffle
from tests.benchmarks import load_batches_peers as peers
from tests.benchmarks import program
from tests.benchmarks.load_batches_peers import BATCH_SIZE
from tests.benchmarks.processes import Failed
from tests.benchmarks.program import Figure, constant, figure
from tests.shard_sets import write_shard_set

IMAGES_A_FILE = 2048
NUM_CLASSES = 10
WINDOW, LANES = 4096, 8
GOALS = {"full": 10.0, "windowed raw": 5.0}
"""Times the best peer: for data that fits in memory, and for data that does not."""
OURS = ("full", "windowed raw", "windowed png")


def photographs(count: int, size: int) -> np.ndarray:
    """Smooth noise, its colours correlated, with a little grain: (count, size, size, 3) uint8."""
    rng = np.random.default_rng(size)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)) + 0.5 / size
    images = np.empty((count, size, size, 3), np.uint8)
    for start in range(0, count, 256):
        b = min(256, count - start)
        spectrum = np.fft.rfft2(rng.standard_normal((b, 4, size, size))) / frequency**2.0
        fields = np.fft.irfft2(spectrum, (size, size))
        fields -= fields.mean((2, 3), keepdims=True)
        fields /= fields.std((2, 3), keepdims=True)
        rgb = (fields[:, :1] + 0.4 * fields[:, 1:]).transpose(0, 2, 3, 1)
        grain = rng.standard_normal(rgb.shape)
        images[start : start + b] = np.clip(128 + 45 * rgb + 0.7 * grain, 0, 255)
    return images


def write_all(folder: Path, count: int, size: int) -> float:
    """The images in the form of every contender; the size of a PNG as a share of the raw pixels."""
    images = photographs(count, size)
    labels = np.random.default_rng(0).integers(0, NUM_CLASSES, count)
    folder.mkdir(parents=True)
    np.save(folder / "images.npy", images)  # for the peers' own writers
    np.save(folder / "labels.npy", labels)
    for label in range(NUM_CLASSES):
        (folder / "png" / str(label)).mkdir(parents=True)
    num_bytes = 0
    for start in range(0, count, IMAGES_A_FILE):
        nth = start // IMAGES_A_FILE
        with (
            tarfile.open(folder / f"png.{nth:03d}.tar", "w") as of_png,
            tarfile.open(folder / f"npy.{nth:03d}.tar", "w") as of_npy,
        ):
            for i in range(start, min(start + IMAGES_A_FILE, count)):
                file, array = io.BytesIO(), io.BytesIO()
                Image.fromarray(images[i]).save(file, "PNG")
                np.save(array, images[i])
                num_bytes += file.tell()
                (folder / "png" / str(labels[i]) / f"{i:06d}.png").write_bytes(file.getvalue())
                _add(of_png, f"{i:06d}", {"png": file.getvalue(), "cls": b"%d" % labels[i]})
                _add(of_npy, f"{i:06d}", {"npy": array.getvalue(), "cls": b"%d" % labels[i]})
    for encoding in ("raw", "png"):
        _write_shard_set(str(folder / encoding), images, labels, encoding)
    return num_bytes / images.nbytes


def _add(tar: tarfile.TarFile, name: str, values: dict[str, bytes]) -> None:
    for kind, data in values.items():
        entry = tarfile.TarInfo(f"{name}.{kind}")
        entry.size = len(data)
        tar.addfile(entry, io.BytesIO(data))


def _write_shard_set(folder: str, images: np.ndarray, labels: np.ndarray, encoding: Any) -> None:
    names = [str(label) for label in range(NUM_CLASSES)]
    keys = [f"{i:06d}" for i in range(len(images))]
    rest = [len(images) % IMAGES_A_FILE] * (len(images) % IMAGES_A_FILE > 0)
    sizes = [IMAGES_A_FILE] * (len(images) // IMAGES_A_FILE) + rest
    write_shard_set(folder, images, labels.tolist(), keys, names, sizes, encoding)


def ours(what: str, folder: str, ahead: int) -> peers.Epoch:
    """Our batches, made ahead by a thread if `ahead`."""
    shuffle: Shuffle
    if what == "full":
        arrays = memory_mapped(f"{folder}/raw", "train", f"{folder}/cache")
        shuffle = FullShuffle(*arrays, 0, BATCH_SIZE)
        num_batches = 10 * len(arrays[0]) // BATCH_SIZE  # an epoch of a few ms tells nothing
    else:
        parts = read_parts(f"{folder}/{what.split()[1]}", "train")
        shuffle = WindowedShuffle(parts, 0, BATCH_SIZE, WINDOW, LANES)
        # several epochs, beside which the windows that were read before the clock ran are few
        num_batches = shuffle.order.num_images // BATCH_SIZE * (8 if what == "windowed raw" else 2)
    batches = Batches(shuffle)
    step = 0

    def epoch() -> Iterator[Any]:
        nonlocal step
        start, step = step, step + num_batches
        steps = range(start, step)
        for batch in prefetch(batches.at, steps) if ahead else map(batches.at, steps):
            yield batch.pixels, batch.labels

    return epoch


class Contender:
    """A process that delivers batches when it is told to, with what it starts.

    Raises:
        Failed: it ended before it was ready.
    """

    def __init__(self, name: str, command: list[str], cores: list[int]) -> None:
        self.name, self.rates = name, list[float]()
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        self._answer("ready")

    def go(self) -> None:
        """Deliver for an epoch.

        Raises:
            Failed: it ended before.
        """
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, as the answer says
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        self.rates.append(float(self._answer("")))

    def end(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.communicate()
        self.errors.close()

    def _answer(self, start: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(start):
                return line
        code = self.process.wait()
        self.errors.seek(0)
        said = self.errors.read().strip().splitlines()
        self.end()
        raise Failed(f"{self.name} ended with code {code}{f': {said[-1]}' if said else ''}")


def measure(folder: Path, num_cores: int, rounds: int, python: str | None) -> dict[str, float]:
    """Images a second of each contender, by name."""
    cores = sorted(os.sched_getaffinity(0))[:num_cores]
    spread = str(num_cores if num_cores > 1 else 0)
    commands = {
        f"ours, {what}": [sys.executable, "-m", __spec__.name, "--ours", what, str(folder), spread]
        for what in OURS
    }
    if python is not None:
        commands |= {
            name: [python, peers.__file__, name, str(folder), spread] for name in peers.PEERS
        }
    contenders: dict[str, Contender] = {}
    with contextlib.ExitStack() as stack:
        for name, command in commands.items():
            try:
                contenders[name] = Contender(name, command, cores)
                stack.callback(contenders[name].end)
            except Failed as error:
                if name not in peers.PEERS:
                    raise
                print(f"  left out: {error}")
        for _ in range(rounds):
            for contender in contenders.values():
                contender.go()
    return {name: statistics.median(c.rates) for name, c in contenders.items()}


def label_entropy(batches: Iterator[np.ndarray], labels: np.ndarray) -> float:
    """Mean over batches of indices of the entropy of their labels, in bits."""
    entropies = []
    for batch in batches:
        share = np.bincount(labels[batch], minlength=NUM_CLASSES) / len(batch)
        share = share[share > 0]
        entropies.append(-(share * np.log2(share)).sum())
    return float(np.mean(entropies))


def shuffle_quality(n: int = 40_960) -> None:
    """Print how mixed batches are where the stored images are sorted by class."""
    labels = np.arange(n) * NUM_CLASSES // n
    steps = range(n // BATCH_SIZE)
    whole = label_entropy((global_batch(0, s, BATCH_SIZE, n) for s in steps), labels)
    print(f"\nEntropy of the labels in a batch of {BATCH_SIZE}, {n:,} images sorted by class")
    print(f"in row groups of {ROW_GROUP_SIZE}; full shuffle {whole:.3f} bits\n")
    lanes_shown = (1, 4, 8, 16)
    print("  window" + "".join(f"{f'{lanes} lanes':>12}" for lanes in lanes_shown))
    sizes = np.full(n // ROW_GROUP_SIZE, ROW_GROUP_SIZE)
    for window in (1024, 4096, 16384, 32768):
        row = []
        for lanes in lanes_shown:
            order = WindowedOrder(0, BATCH_SIZE, sizes, window, lanes)
            row.append(label_entropy((order.batch(step) for step in steps), labels))
        print(f"{window:8,}" + "".join(f"{entropy:12.3f}" for entropy in row))


def main() -> None:
    options = program.parser(__doc__)
    options.add_argument("--peers", metavar="PYTHON", help="interpreter that has the peers")
    options.add_argument(
        "--folder", help="where the images are written; by default a temporary one"
    )
    options.add_argument("--ours", nargs=3, help=argparse.SUPPRESS)
    torch.set_num_threads(1)
    if (of := options.parse_args().ours) is not None:
        what, folder, ahead = of
        peers.serve(ours(what, folder, int(ahead)))
    else:
        program.run(options, measure_all, "torch", "pyarrow", "pillow")


def measure_all(options: argparse.Namespace) -> list[Figure]:
    count, rounds = (8192, 2) if options.quick else (32768, 5)
    figures: list[Figure] = []
    if not options.peers:
        print("no peer is measured: `make bench` makes .venv-peers, for --peers")
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        for size in (32,) if options.quick else (32, 64):
            folder = Path(temporary) / str(size)
            share = write_all(folder, count, size)
            print(f"\n{count:,} images {size}x{size}x3; as PNG {share:.2f} of the raw pixels")
            if options.peers:
                write = [options.peers, peers.__file__, "write streaming", str(folder), "0"]
                done = subprocess.run(write, capture_output=True, text=True)
                if done.returncode:
                    print(f"  no files of streaming: {done.stderr.strip().splitlines()[-1]}")
            for num_cores in (1, 2):
                rates = measure(folder, num_cores, rounds, options.peers)
                of = f"{num_cores} core" + "s" * (num_cores > 1)
                print(f"\n  images/s, {of}; load average {os.getloadavg()[0]:.1f}")
                for name, rate in rates.items():
                    print(f"    {name:24}{rate:12,.0f}")
                figures += figures_of(f"{size}x{size}", of, rates)
    shuffle_quality()
    return figures


def figures_of(size: str, cores: str, rates: dict[str, float]) -> list[Figure]:
    """Of our ways of reading, beside the best peer where one was measured."""
    theirs = {name: rate for name, rate in rates.items() if name in peers.PEERS}
    found = []
    for what, goal in GOALS.items():
        named, mine = f"{size}, {what}, {cores}", rates[f"ours, {what}"]
        if theirs:
            best = max(theirs, key=lambda name: theirs[name])
            found.append(figure(named, mine, theirs[best], best, goal))
        else:
            found.append(constant(named, mine, "images/s"))
    return found


if __name__ == "__main__":
    main()
