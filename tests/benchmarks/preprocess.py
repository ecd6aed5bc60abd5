"""How fast images become a ShardSet: files of 256 and 512 pixels, JPEG and PNG, to 64x64.

    python -m tests.benchmarks.preprocess [--rounds 3] [--quick]
    python -m tests.benchmarks.preprocess --scale [--quick]
    python -m tests.benchmarks.preprocess --decoders [--quick]

The stage `preprocess` with two workers, from files to a committed ShardSet (listing, hashing,
decoding, resizing, Parquet, manifest), against

- Ray Data on the same two CPUs, `read_images -> map_batches -> write_parquet`, in two forms. In the
  first map_batches resizes, bicubic. In the second read_images does it, bilinear, so that no image
  of full size is ever put in a block. The images are written as one column of fixed-length binary,
  as ours are, since its tensor column is far slower. The faster of the two counts, the other has
  one turn. It neither hashes, nor sets aside a bad image, nor can it be resumed;
- the floor: a bare loop in one process that reads each file and gives it to the decoder of
  pipeline/data/images.py, times the number of workers; and as many such loops at the same time,
  each over its share of the files, by which one sees what the cores take from each other;
- what lies between the floor and us: the work that our promises ask for beside decoding, in as many
  bare processes, without Ray. Each file is read and hashed before anything is made of it, since the
  hashes are the name of what is made; then our task reads it again, sees by its hash that it is the
  same, decodes, writes Parquet with checksums, hashes that and waits for the disk.

Ray and its workers are started, and the files read once, before any clock; then all arms run in
alternation, and medians count. The images are made here, of smooth noise in several octaves with
sharp edges.

--scale shows instead that time grows linearly and memory does not: 1, 4 and 16 times as many 64x64
images. --decoders compares ways to decode and resize: images/s in one process, and how far the
pixels are from those of a JPEG decoded whole and resized by Pillow's bicubic filter.
"""

import argparse
import contextlib
import io
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is imported

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline import storage
from pipeline.config import RunConfig, load_config
from pipeline.data.config import DataConfig
from pipeline.data.images import decode
from pipeline.data.input_shards import InputShard, cut
from pipeline.data.items import FileGroup, group_files, look
from pipeline.data.listing import list_files
from pipeline.data.preprocess import preprocess_shard
from pipeline.data.source import Source, scan
from tests.benchmarks import program
from tests.benchmarks.own_ray import run_stage, started_ray
from tests.benchmarks.processes import at_once
from tests.benchmarks.program import CONFIGS, Figure, figure

TARGET, WORKERS = 64, 2
IMAGES = {("JPEG", 256): 32_000, ("JPEG", 512): 24_000, ("PNG", 256): 8_000, ("PNG", 512): 3_000}
"""So many that our arm takes 10 seconds or more, its last tasks a small part of them; --quick takes
a fortieth."""
DECODER_ROUNDS = 3
SCALES = (12_500, 50_000, 200_000)
NUM_PICTURES = 64
"""Different ones a kind; the files differ by a few bytes behind the image, so none is a double."""
GOAL_RAY_DATA, GOAL_FLOOR = 3.0, 0.9
BICUBIC = Image.Resampling.BICUBIC


def main() -> None:
    options = program.parser(__doc__)
    options.add_argument("--scale", action="store_true", help="time and memory over the images")
    options.add_argument("--decoders", action="store_true", help="ways to decode and resize")
    options.add_argument("--rounds", type=int, default=3, help="turns of each arm")
    packages = ("pillow", "pyarrow", "numpy", "ray", "simplejpeg", "opencv-python-headless")
    program.run(options, measure, *packages)


def measure(options: argparse.Namespace) -> list[Figure]:
    print(f"{WORKERS} workers of 1 thread")
    if options.decoders:
        return compare_decoders(options.quick)
    with tempfile.TemporaryDirectory() as folder, started_ray(WORKERS):
        if options.scale:
            return measure_scale(Path(folder), options.quick)
        return compare_pipelines(
            Path(folder), options.quick, 1 if options.quick else options.rounds
        )


# --- images -------------------------------------------------------------------------------------


def picture(rng: np.random.Generator, size: int) -> Image.Image:
    """Smooth noise, weaker the finer it is, and a few discs with sharp edges: (size, size) RGB."""
    field = np.zeros((size, size, 3))
    cells, weight = 2, 1.0
    while cells <= size:
        for channel in range(3):
            few = Image.fromarray(rng.normal(size=(cells, cells)).astype(np.float32))
            field[..., channel] += weight * np.asarray(few.resize((size, size), BICUBIC))
        cells, weight = 2 * cells, 0.5 * weight
    y, x = np.mgrid[:size, :size] / size
    for x0, y0, radius in rng.random((6, 3)):
        field[(x - x0) ** 2 + (y - y0) ** 2 < (0.3 * radius) ** 2] += rng.normal(size=3)
    field = 128 + 50 * (field - field.mean()) / field.std()
    return Image.fromarray(field.clip(0, 255).astype(np.uint8))


def pictures(format: str, size: int, count: int) -> list[bytes]:
    """Encoded ones, always the same."""
    rng = np.random.default_rng(size)
    files = []
    for _ in range(count):
        buffer = io.BytesIO()
        picture(rng, size).save(buffer, format, **({"quality": 90} if format == "JPEG" else {}))
        files.append(buffer.getvalue())
    return files


def write_folder(folder: Path, files: list[bytes], suffix: str, count: int) -> str:
    """`count` files in ten sub-folders."""
    for label in range(10):
        (folder / f"class_{label}").mkdir(parents=True)
    for i in range(count):
        path = folder / f"class_{i % 10}" / f"{i:06d}.{suffix}"
        path.write_bytes(files[i % len(files)] + i.to_bytes(4, "big"))
    return str(folder)


# --- arms ---------------------------------------------------------------------------------------


def config_of(source: str, uri: str) -> RunConfig:
    values = {
        "storage": uri,
        "data.source": source,
        "data.image_size": TARGET,
        "data.channels": 3,
        "data.images_per_shard": DataConfig.model_fields["images_per_shard"].default,
        "network.attention_at": "[]",
    }
    return load_config(
        str(CONFIGS / "digits.yaml"), [f"{key}={value}" for key, value in values.items()]
    )


def preprocess(source: str, folder: Path, count: int) -> float:
    """The seconds that the stage takes, from listing the source to the manifest."""
    config = config_of(source, f"{folder}/{time.monotonic_ns()}")
    begin = time.perf_counter()
    made = run_stage(config, "preprocess")
    seconds = time.perf_counter() - begin
    manifest = storage.read_manifest(made)
    assert manifest is not None
    assert sum(manifest.stats["num_images"].values()) == count
    return seconds


def resize_and_pack(batch: dict[str, np.ndarray]) -> pa.Table:
    small = [Image.fromarray(image).resize((TARGET, TARGET), BICUBIC) for image in batch["image"]]
    return pack({**batch, "image": np.stack([np.asarray(image) for image in small])})


def pack(batch: dict[str, np.ndarray]) -> pa.Table:
    size = TARGET * TARGET * 3
    buffers = [None, pa.py_buffer(batch["image"].tobytes())]
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(size), len(batch["image"]), buffers)
    return pa.table({"image": column, "key": pa.array(batch["path"].tolist(), pa.string())})


def ray_data(source: str, folder: Path, count: int, resized_by_reader: bool) -> float:
    """The seconds that Ray Data takes from files to Parquet."""
    import ray.data

    out = f"{folder}/{time.monotonic_ns()}"
    size = (TARGET, TARGET) if resized_by_reader else None
    begin = time.perf_counter()
    images = ray.data.read_images(source, mode="RGB", size=size, include_paths=True)
    small = images.map_batches(
        pack if resized_by_reader else resize_and_pack, batch_format="numpy", batch_size=128
    )
    small.write_parquet(out, compression="lz4", use_dictionary=False)
    seconds = time.perf_counter() - begin
    assert sum(pq.read_metadata(path).num_rows for path in Path(out).glob("*")) == count
    return seconds


def decode_all(paths: list[Path], ready: Barrier | None = None) -> float:
    """The seconds that a bare loop over the files takes."""
    decode(paths[0].read_bytes(), TARGET, 3)
    if ready:
        ready.wait()
    begin = time.perf_counter()
    for path in paths:
        decode(path.read_bytes(), TARGET, 3)
    return time.perf_counter() - begin


def floor(source: str) -> float:
    """Of one process, by the number of workers."""
    return decode_all(sorted(Path(source).rglob("*.*"))) / WORKERS


def floor_at_once(source: str) -> float:
    """Of as many processes as workers, a part of the files each."""
    paths = sorted(Path(source).rglob("*.*"))
    return max(at_once(decode_all, [(paths[i::WORKERS],) for i in range(WORKERS)]))


def look_and_preprocess(
    first: int,
    groups: list[FileGroup],
    shards: list[InputShard],
    source: Source,
    config: DataConfig,
    folder: str,
    ready: Barrier,
) -> float:
    """The seconds that it takes to look into a part of the files, and our task for as many shards.

    Args:
        first: of the groups and of the shards; then each WORKERS-th. There may be none for it.
        ready: waited for before either.
    """
    one_image = replace(shards[0], items=shards[0].items.slice(0, 1))
    look(groups[0])  # imports what it needs, as does the next
    preprocess_shard(one_image, config, source.class_names, f"{folder}/first-{first}")
    ready.wait()
    begin = time.perf_counter()
    for group in groups[first::WORKERS]:
        look(group, f"{folder}/index")
    ready.wait()
    for shard in shards[first::WORKERS]:
        preprocess_shard(shard, config, source.class_names, folder)
    return time.perf_counter() - begin


def same_work_at_once(source: str, folder: Path) -> float:
    """Of all that the promises ask for in as many processes as workers; the listing is left out."""
    out = f"{folder}/{time.monotonic_ns()}"
    config = config_of(source, out).data
    groups, scanned = group_files(*list_files(source)), scan(config)
    shards = cut(scanned, config.images_per_shard)
    work = [(i, groups, shards, scanned, config, out) for i in range(WORKERS)]
    return max(at_once(look_and_preprocess, work))


# --- comparisons --------------------------------------------------------------------------------


def compare_pipelines(folder: Path, quick: bool, rounds: int) -> list[Figure]:
    arms: dict[tuple[str, int], dict[str, Callable[[], float]]] = {}
    for (format, size), images in IMAGES.items():
        count = images // 40 if quick else images
        files = pictures(format, size, 8 if quick else NUM_PICTURES)
        source = write_folder(folder / f"{format}{size}", files, format.lower(), count)
        work = (source, folder, count)
        arms[format, size] = {
            "ours": lambda work=work: preprocess(*work),
            "Ray Data, map_batches resizes": lambda work=work: ray_data(*work, False),
            "Ray Data, read_images resizes": lambda work=work: ray_data(*work, True),
            f"the same work, {WORKERS} at once": lambda of=source: same_work_at_once(of, folder),
            f"decoder, {WORKERS} at once": lambda source=source: floor_at_once(source),
            f"decoder x {WORKERS}": lambda source=source: floor(source),
        }
    seconds: dict[tuple[str, int], dict[str, list[float]]] = {
        kind: {name: [] for name in of} for kind, of in arms.items()
    }
    for arm in arms["JPEG", 256].values():
        arm()  # the workers start, and import what each arm needs
    for turn in range(rounds):
        for kind, of in arms.items():
            for path in (folder / "{}{}".format(*kind)).rglob("*.*"):
                path.read_bytes()  # from the disk once, or the first arm would pay for all
            forms = [name for name in of if name.startswith("Ray Data")]
            slower = max(forms, key=lambda name: seconds[kind][name][:1])
            for name, arm in of.items():
                if turn == 0 or name != slower:
                    seconds[kind][name].append(arm())

    results = []
    print(
        f"{'images/s, median (least to most)':<34}" + "".join(f"{f'{f} {s}':<26}" for f, s in arms)
    )
    rates = {}
    for kind in arms:
        count = IMAGES[kind] // 40 if quick else IMAGES[kind]
        rates[kind] = {name: [count / s for s in of] for name, of in seconds[kind].items()}
    for name in next(iter(rates.values())):
        cells = [program.spread(of[name], 0) for of in rates.values()]
        print(f"{name:<34}" + "".join(f"{cell:<26}" for cell in cells))
    for (format, size), of in rates.items():
        medians = program.medians(of)
        ours, *forms, same_work, two_loops, decoder = medians
        form = max(forms, key=lambda name: medians[name])
        what = f"preprocess {size}-pixel {format} to {TARGET}x{TARGET}"
        for name, goal in (
            (form, GOAL_RAY_DATA),
            (decoder, GOAL_FLOOR),
            (two_loops, GOAL_FLOOR),
            (same_work, GOAL_FLOOR),
        ):
            results.append(figure(what, medians[ours], medians[name], name, goal))
        what = f"the same work in bare processes, {size}-pixel {format}"
        results.append(figure(what, medians[same_work], medians[two_loops], two_loops, GOAL_FLOOR))
    return results


def measure_scale(folder: Path, quick: bool) -> list[Figure]:
    counts = [count // 25 for count in SCALES] if quick else list(SCALES)
    files = pictures("JPEG", TARGET, NUM_PICTURES)
    preprocess(write_folder(folder / "first", files, "jpeg", 200), folder, 200)
    print(f"{'images':>10}{'seconds':>10}{'images/s':>10}{'driver MB':>11}{'a worker MB':>13}")
    rates = []
    for count in counts:
        source = write_folder(folder / str(count), files, "jpeg", count)
        with peak_memory() as peak:
            seconds = preprocess(source, folder, count)
        rates.append(count / seconds)
        print(
            f"{count:>10,}{seconds:>10.1f}{rates[-1]:>10,.0f}"
            f"{peak['driver'] / 1e6:>11,.0f}{peak['worker'] / 1e6:>13,.0f}",
            flush=True,
        )
    what = f"preprocess {counts[-1]:,} images of {TARGET}x{TARGET}"
    return [figure(what, rates[-1], rates[0], f"the same with {counts[0]:,} images", 0.9)]


@contextlib.contextmanager
def peak_memory() -> Iterator[dict[str, int]]:
    """The largest resident memory, in bytes, of this process and of any one worker of Ray."""
    peak = {"driver": 0, "worker": 0}
    over = threading.Event()

    def watch() -> None:
        this = psutil.Process()
        while not over.wait(0.1):
            peak["driver"] = max(peak["driver"], this.memory_info().rss)
            for child in this.children(recursive=True):
                with contextlib.suppress(psutil.Error, IndexError):
                    if child.cmdline()[0].startswith("ray::"):
                        peak["worker"] = max(peak["worker"], child.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


# --- decoders -----------------------------------------------------------------------------------


def ways_to_decode() -> dict[str, Callable[[bytes], np.ndarray]]:
    """Ways from an encoded file to (64, 64, 3) uint8; `reduced` is to at least so many pixels."""

    def pillow(reduced: int | None, gap: float | None = None) -> Callable[[bytes], np.ndarray]:
        def way(raw: bytes) -> np.ndarray:
            image = Image.open(io.BytesIO(raw))
            if reduced:
                image.draft("RGB", (reduced, reduced))
            return np.asarray(image.resize((TARGET, TARGET), BICUBIC, reducing_gap=gap))

        return way

    ways = {
        "Pillow": pillow(None),
        "Pillow, reducing_gap 3": pillow(None, 3.0),
        "Pillow, reducing_gap 2": pillow(None, 2.0),
        f"Pillow, draft {3 * TARGET}": pillow(3 * TARGET),
        f"Pillow, draft {2 * TARGET}": pillow(2 * TARGET),
        f"Pillow, draft {TARGET}": pillow(TARGET),
        "pipeline.data.images.decode": lambda raw: decode(raw, TARGET, 3).pixels,
    }
    with contextlib.suppress(ImportError):
        import simplejpeg

        def turbo(raw: bytes, side: int = 2 * TARGET) -> np.ndarray:
            least = {"min_height": side, "min_width": side}
            exact = {"fastdct": False, "fastupsample": False}
            pixels: np.ndarray = simplejpeg.decode_jpeg(raw, "RGB", **exact, **least)
            return pixels

        def turbo_and_pillow(raw: bytes) -> np.ndarray:
            return np.asarray(Image.fromarray(turbo(raw)).resize((TARGET, TARGET), BICUBIC))

        ways[f"simplejpeg {2 * TARGET}, Pillow"] = turbo_and_pillow
        with contextlib.suppress(ImportError):
            import cv2

            cv2.setNumThreads(1)
            ways[f"simplejpeg {2 * TARGET}, cv2 area"] = lambda raw: cv2.resize(
                turbo(raw), (TARGET, TARGET), interpolation=cv2.INTER_AREA
            )
    return ways


def _decode_each(way: Callable[[bytes], np.ndarray], files: list[bytes]) -> None:
    for raw in files:
        way(raw)


def compare_decoders(quick: bool) -> list[Figure]:
    results = []
    for format, size in IMAGES:
        files = pictures(format, size, 8 if quick else NUM_PICTURES)
        whole = ways_to_decode()["Pillow"]
        want = np.stack([whole(raw) for raw in files]).astype(int)
        ways = {
            name: way
            for name, way in ways_to_decode().items()
            if format == "JPEG" or not ("draft" in name or "simplejpeg" in name)
        }
        arms = {name: partial(_decode_each, way, files) for name, way in ways.items()}
        # one thread each: other work does not count
        seconds = program.in_turn(arms, 2 if quick else DECODER_ROUNDS, time.process_time)
        rates = {name: len(files) / took for name, took in program.medians(seconds).items()}
        print(f"{f'{format} {size} to {TARGET}':<30}{'images/s':>10}{'mean diff':>11}{'max':>5}")
        for name, way in ways.items():
            apart = np.abs(np.stack([way(raw) for raw in files]) - want)
            print(f"{name:<30}{rates[name]:>10,.0f}{apart.mean():>11.2f}{apart.max():>5}")
        ours = rates["pipeline.data.images.decode"]
        what = f"decode and resize {size}-pixel {format}"
        results.append(figure(what, ours, rates["Pillow"], "Pillow, decoded whole", 1.0))
    return results


if __name__ == "__main__":
    main()
