"""From files to Parquet to batches: real images, real damage."""

import gzip
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline import storage
from pipeline.data import sources
from pipeline.data.batches import Batches, global_batch
from pipeline.data.images import BadImage, decode, grid, png, to_uint8, to_unit
from pipeline.data.shards import (
    NO_LABEL,
    ImageSet,
    encode_part,
    part_path,
    read_split,
    split_of,
)
from pipeline.errors import CorruptArtifact, DataError
from pipeline.storage import Manifest
from tests.conftest import ROOT


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def gradient(width: int = 16, height: int = 16) -> np.ndarray:
    """A grey ramp from left to right."""
    return np.tile(np.linspace(0, 255, width).astype(np.uint8), (height, 1))


# --- sources ------------------------------------------------------------------------------------


def test_the_builtin_digits_are_the_real_ones() -> None:
    source, _ = sources.scan("builtin:digits")
    assert len(source.items) == 1797
    assert source.class_names == list("0123456789")
    shards = sources.cut(source, 256)
    assert [len(shard.items) for shard in shards] == [256] * 7 + [5]
    images = dict((item.key, raw) for item, raw in sources.read(shards[0]))
    zero = images["digits/0000"]
    assert isinstance(zero, np.ndarray)
    assert (zero.shape, zero.dtype) == ((8, 8, 1), np.uint8)
    # the first row of the first image of the data set is 0 0 5 13 9 1 0 0 of 16
    assert zero[0, :, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]


def make_folder(root: Path) -> Path:
    for name in ("cats/a.png", "cats/deep/b.JPG", "dogs/c.webp", "e.png"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(gradient()).convert("RGB").save(path)
    (root / "dogs" / "notes.txt").write_text("not an image")
    (root / "dogs" / "._c.png").write_bytes(b"litter of another system")
    (root / ".cache").mkdir()
    (root / ".cache" / "x.png").write_bytes(b"")
    return root


def test_sub_folders_are_the_classes(tmp_path: Path) -> None:
    source, _ = sources.scan(str(make_folder(tmp_path)))
    assert source.class_names == ["cats", "dogs"]
    labels = {item.key: item.label for item in source.items}
    assert labels == {"cats/a.png": 0, "cats/deep/b.JPG": 0, "dogs/c.webp": 1, "e.png": None}
    read = dict(
        (item.key, raw) for shard in sources.cut(source, 3) for item, raw in sources.read(shard)
    )
    assert read["cats/a.png"] == (tmp_path / "cats" / "a.png").read_bytes()


def test_a_fingerprint_is_of_content_and_a_second_scan_reads_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make_folder(tmp_path / "one")
    first, index = sources.scan(str(one))
    two, _ = sources.scan(str(make_folder(tmp_path / "two")))
    assert first.fingerprint() == two.fingerprint()

    from fsspec.implementations.local import LocalFileSystem

    def refuse(*_: object, **__: object) -> bytes:
        raise AssertionError("read again")

    monkeypatch.setattr(LocalFileSystem, "cat_file", refuse)
    again, _ = sources.scan(str(one), json.loads(json.dumps(index)))
    assert again.fingerprint() == first.fingerprint()
    monkeypatch.undo()

    (one / "e.png").write_bytes((one / "cats" / "a.png").read_bytes() + b"\0")
    changed, _ = sources.scan(str(one), index)
    assert changed.fingerprint() != first.fingerprint()


def test_a_file_that_changes_after_the_scan_is_noticed(tmp_path: Path) -> None:
    source, _ = sources.scan(str(make_folder(tmp_path)))
    (tmp_path / "e.png").write_bytes(b"another")
    (shard,) = sources.cut(source, 10)
    with pytest.raises(DataError, match="'e.png' changed while the source was being read"):
        list(sources.read(shard))


def test_a_dangling_link_is_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    (make_folder(tmp_path) / "f.png").symlink_to(tmp_path / "nowhere.png")
    source, _ = sources.scan(str(tmp_path))
    read = {item.key: raw for item, raw in sources.read(sources.cut(source, 10)[0])}
    assert read["f.png"] is None
    assert sum(raw is not None for raw in read.values()) == 4


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), r"holds no image \(0 files looked at"),
        (lambda path: path.write_text("x"), "is a file: give a folder"),
        (
            lambda path: (path.mkdir(), (path / "a.txt").write_text("x")),
            r"holds no image \(1 files",
        ),
    ],
)
def test_a_source_without_images_is_refused(tmp_path: Path, make: object, sentence: str) -> None:
    make(tmp_path / "source")  # type: ignore[operator]
    with pytest.raises(DataError, match=sentence):
        sources.scan(str(tmp_path / "source"))


def test_an_unknown_builtin_is_refused() -> None:
    with pytest.raises(DataError, match="there is builtin:digits"):
        sources.scan("builtin:letters")


# --- IDX ----------------------------------------------------------------------------------------

FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts it."""


def idx(values: np.ndarray) -> bytes:
    """The IDX file of a uint8 array, by the format's description."""
    header = bytes([0, 0, 8, values.ndim])
    return header + b"".join(n.to_bytes(4, "big") for n in values.shape) + values.tobytes()


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
PIXELS = np.random.default_rng(0).integers(0, 256, (11, 6, 5), dtype=np.uint8)
CLASSES = np.array([2, 0, 1, 2, 2, 1, 0, 1, 2, 0, 1], np.uint8)


def make_idx(folder: Path, compressed: bool = False, **files: bytes) -> str:
    """A folder with IDX files, `images` and `labels` in place of sound ones; returns its source."""
    folder.mkdir(exist_ok=True)
    sound = {"images": idx(PIXELS), "labels": idx(CLASSES)} | files
    for name, data in zip((IMAGES, LABELS), (sound["images"], sound["labels"]), strict=True):
        path = folder / (name + ".gz" * compressed)
        path.write_bytes(gzip.compress(data) if compressed else data)
    return f"idx:{folder}"


@pytest.mark.parametrize("compressed", [False, True])
def test_idx_images_come_with_their_labels_whatever_shard_they_are_in(
    tmp_path: Path, compressed: bool
) -> None:
    source, _ = sources.scan(make_idx(tmp_path, compressed))
    assert source.class_names == ["0", "1", "2"]
    assert [item.key for item in source.items] == [f"train/{i:05d}" for i in range(11)]
    assert [item.label for item in source.items] == CLASSES.tolist()
    shards = sources.cut(source, 4)
    for shard in reversed(shards):  # each on its own, as workers read them
        for item, raw in sources.read(shard):
            i = int(item.key.removeprefix("train/"))
            assert np.array_equal(raw, PIXELS[i, :, :, None])
            assert item.sha256 == hashlib.sha256(PIXELS[i].tobytes()).hexdigest()
    assert sum(len(shard.items) for shard in shards) == 11


def test_idx_is_the_same_compressed_or_not_and_differs_where_a_pixel_does(tmp_path: Path) -> None:
    plain, _ = sources.scan(make_idx(tmp_path / "a"))
    packed, _ = sources.scan(make_idx(tmp_path / "b", compressed=True))
    assert plain.fingerprint() == packed.fingerprint()
    other = PIXELS.copy()
    other[7, 0, 0] ^= 1
    changed, _ = sources.scan(make_idx(tmp_path / "c", images=idx(other)))
    pairs = zip(plain.fingerprint(), changed.fingerprint(), strict=True)
    assert [i for i, (a, b) in enumerate(pairs) if a != b] == [7]


def test_a_worker_reads_no_further_than_its_own_images(tmp_path: Path) -> None:
    source, _ = sources.scan(make_idx(tmp_path))
    (tmp_path / IMAGES).write_bytes(idx(PIXELS)[: 16 + 4 * 30])  # what lies behind is gone
    first, second, _ = sources.cut(source, 4)
    assert len(list(sources.read(first))) == 4
    with pytest.raises(DataError, match="'train/00004' changed while the source was being read"):
        list(sources.read(second))


def test_an_idx_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_idx(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    assert sources.absolute("idx:set") == f"idx:{tmp_path}/set"
    assert sources.absolute("idx:s3://bucket/set") == "idx:s3://bucket/set"
    assert sources.absolute("photos") == f"{tmp_path}/photos"
    assert sources.absolute("builtin:digits") == "builtin:digits"


HEAD = len(idx(PIXELS)) - PIXELS.size


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (
            {"images": b"\x89PNG" + bytes(100)},
            f"{IMAGES} begins with the bytes 89 50 4e 47, an IDX file of unsigned bytes with 3 "
            "axes begins with 00 00 08 03",
        ),
        ({"labels": idx(PIXELS)}, f"{LABELS} begins with the bytes 00 00 08 03"),
        ({"images": b""}, f"{IMAGES} begins with the bytes none"),
        ({"images": idx(PIXELS)[: HEAD - 1]}, f"{IMAGES} ends within its header"),
        (
            {"images": idx(PIXELS)[:-1]},
            f"{IMAGES} holds 329 bytes after its header, which announces 330 .11 x 6 x 5.: it is "
            "truncated",
        ),
        ({"labels": idx(CLASSES) + b"\0"}, f"{LABELS} holds 12 bytes after its header"),
        (
            {"images": bytes([0, 0, 8, 3]) + b"\xff" * 12 + bytes(9)},
            "announces 79228162458924105385300197375",
        ),
        (
            {"labels": idx(CLASSES[:-1])},
            f"has 11 images in {IMAGES} but 10 labels in {LABELS}: the two files do not belong",
        ),
        ({"images": idx(PIXELS[:0]), "labels": idx(CLASSES[:0])}, "holds no image"),
        ({"images": idx(PIXELS[:, :0])}, r"holds no image: .* has the shape \(11, 0, 5\)"),
    ],
)
def test_a_damaged_idx_file_is_refused_in_one_sentence(
    tmp_path: Path, files: dict[str, bytes], sentence: str
) -> None:
    source = make_idx(tmp_path, **files)
    with pytest.raises(DataError, match=sentence) as refused:
        sources.scan(source)
    assert str(refused.value).startswith(f"data.source='{source}'")
    assert "\n" not in str(refused.value)


def test_a_damaged_gz_is_refused_in_one_sentence(tmp_path: Path) -> None:
    source = make_idx(tmp_path, compressed=True)
    packed = (tmp_path / f"{IMAGES}.gz").read_bytes()
    (tmp_path / f"{IMAGES}.gz").write_bytes(packed[:100])
    with pytest.raises(DataError, match=rf"{IMAGES}.gz is truncated or damaged \("):
        sources.scan(source)
    (tmp_path / f"{IMAGES}.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match=f"{IMAGES} cannot be read: Not a gzipped file"):
        sources.scan(source)


@pytest.mark.parametrize("missing", [IMAGES, LABELS])
def test_a_missing_idx_file_is_named(tmp_path: Path, missing: str) -> None:
    source = make_idx(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(DataError, match=f"there is no {missing} or {missing}.gz in that folder"):
        sources.scan(source)


def test_names_of_classes_can_be_given(tmp_path: Path) -> None:
    source = make_idx(tmp_path)
    named, _ = sources.scan(source, class_names=("shirt", "bag", "boot"))
    assert named.class_names == ["shirt", "bag", "boot"]
    with pytest.raises(DataError, match="class_names has 2 names, but .* has 3 classes"):
        sources.scan(source, class_names=("shirt", "bag"))
    with pytest.raises(ValueError, match="the name 'bag' stands twice"):
        sources.DataConfig(source="x", image_size=8, channels=1, class_names=("bag", "bag"))


@pytest.mark.skipif(not FASHION.exists(), reason="apt-get install dataset-fashion-mnist")
def test_fashion_mnist_is_read_as_debian_installs_it() -> None:
    from pipeline.config import load_config

    config = load_config(str(ROOT / "configs" / "fashion_mnist.yaml")).data
    source, _ = sources.scan(config.source, class_names=config.class_names)
    assert np.bincount([item.label or 0 for item in source.items]).tolist() == [6000] * 10
    assert len({item.sha256 for item in source.items}) == 60_000, "no image stands twice"
    last = sources.cut(source, config.images_per_shard)[-1]
    item, raw = list(sources.read(last))[-1]
    assert (item.key, source.class_names[item.label or 0]) == ("train/59999", "sandal")
    assert isinstance(raw, np.ndarray)
    assert raw.shape == (28, 28, 1)
    assert raw.tobytes() == gzip.decompress((FASHION / f"{IMAGES}.gz").read_bytes())[-784:]


# --- images -------------------------------------------------------------------------------------


def test_an_image_of_the_right_size_keeps_its_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert np.array_equal(decode(encoded(Image.fromarray(pixels)), 8, 3), pixels)
    assert np.array_equal(decode(pixels, 8, 3), pixels)


def test_the_shortest_side_is_resized_and_the_centre_cropped() -> None:
    wide = np.zeros((20, 60), np.uint8)
    wide[:, 20:40] = 200  # the middle third is what a square crop keeps
    got = decode(encoded(Image.fromarray(wide)), 10, 1)
    assert (got[:, 2:-2] == 200).all()
    assert (got > 150).all()  # the filter sees a little beyond the crop


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_every_mode_of_a_grey_ramp_comes_out_as_that_ramp(mode: str) -> None:
    ramp = gradient()
    if mode == "I;16":
        image = Image.fromarray(ramp.astype(np.uint16) * 257)
    elif mode in ("I", "F"):
        image = Image.fromarray(ramp).convert(mode)
    else:
        image = Image.fromarray(ramp).convert("RGB" if mode == "CMYK" else "L").convert(mode)
    got = decode(encoded(image, "TIFF" if mode in ("F", "CMYK", "I") else "PNG"), 16, 1)[..., 0]
    tolerance = 255 if mode == "1" else 2
    assert np.abs(got.astype(int) - ramp).max() <= tolerance
    assert got[:, 0].max() == 0
    assert got[:, -1].min() >= 253


def test_a_float_image_from_0_to_1_is_not_black() -> None:
    ramp = Image.fromarray((gradient() / 255).astype(np.float32))
    got = decode(encoded(ramp, "TIFF"), 16, 1)[..., 0]
    assert np.abs(got.astype(int) - gradient()).max() <= 1


def test_transparent_pixels_show_white() -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert (decode(encoded(image), 8, 3) == 255).all()


def test_an_image_rotated_by_exif_stands_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    upright = np.array(Image.fromarray(gradient()).rotate(-90))
    got = decode(encoded(Image.fromarray(gradient()), "PNG", exif=exif), 16, 1)[..., 0]
    assert np.abs(got.astype(int) - upright).max() <= 1


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "the file is empty"),
        (b"hello", "cannot be decoded: cannot identify image file"),
        (encoded(Image.effect_noise((64, 64), 50))[:500], "cannot be decoded"),
        (encoded(Image.new("1", (20_000, 20_000))), "more than 100,000,000 pixels"),
    ],
)
def test_bad_images_are_refused_with_a_reason(raw: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        decode(raw, 8, 1)


def test_uint8_survives_the_trip_to_the_network_and_back() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    x = to_unit(torch.from_numpy(pixels))
    assert (x.min().item(), x.max().item(), x.shape) == (-1.0, 1.0, (1, 1, 16, 16))
    assert np.array_equal(to_uint8(x), pixels)
    assert to_uint8(torch.tensor([[[[-9.0, 9.0]]]])).flatten().tolist() == [0, 255]


def test_a_grid_shows_every_image_enlarged() -> None:
    images = np.stack([np.full((8, 8, 1), value, np.uint8) for value in (0, 100, 200)])
    sheet = np.asarray(Image.open(io.BytesIO(grid(images, columns=2))))
    assert sheet.shape == (2 * 64 + 3 * 8, 2 * 64 + 3 * 8)
    assert (sheet[8 + 32, 8 + 32], sheet[40, 112], sheet[112, 40]) == (0, 100, 200)


# --- shards -------------------------------------------------------------------------------------


def write_shard_set(folder: str, count: int = 20) -> np.ndarray:
    images = np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    files = []
    for index, start in enumerate(range(0, count, 8)):
        rows = slice(start, start + 8)
        labels: list[int | None] = [i % 3 or None for i in range(count)][rows]
        keys = [f"k{i}" for i in range(count)][rows]
        path = part_path("train", index)
        entry = storage.write_bytes(
            storage.join(folder, path), encode_part(images[rows], labels, keys, ["a", "b", "c"])
        )
        files.append(entry.model_copy(update={"path": path}))
    storage.commit(
        folder, Manifest(format=1, stage="preprocess", id="x", inputs={}, config={}, files=files)
    )
    return images


def test_parts_are_read_back_in_order(tmp_path: Path) -> None:
    images = write_shard_set(str(tmp_path))
    got = read_split(str(tmp_path), "train")
    assert np.array_equal(got.images, images)
    assert got.labels.tolist() == [i % 3 or NO_LABEL for i in range(20)]
    assert got.keys == [f"k{i}" for i in range(20)]
    assert len(read_split(str(tmp_path), "holdout")) == 0


def test_any_reader_of_parquet_opens_a_part(tmp_path: Path) -> None:
    images = write_shard_set(str(tmp_path))
    table = pq.read_table(tmp_path / "train" / "part-00000.parquet")
    assert table.column_names == ["image", "label", "key"]
    schema = pq.read_schema(tmp_path / "train" / "part-00000.parquet")
    column = pq.ParquetFile(tmp_path / "train" / "part-00000.parquet").schema.column(0)
    assert column.physical_type == "FIXED_LEN_BYTE_ARRAY"
    shape = json.loads(schema.metadata[b"shape"])
    assert np.array_equal(
        np.frombuffer(table["image"][3].as_py(), np.uint8).reshape(shape), images[3]
    )


def test_the_same_images_give_the_same_bytes() -> None:
    images = np.zeros((3, 4, 4, 1), np.uint8)
    parts = {encode_part(images, [0, None, 1], ["a", "b", "c"], ["x", "y"]) for _ in range(2)}
    assert len(parts) == 1


def test_a_damaged_part_is_noticed(tmp_path: Path) -> None:
    write_shard_set(str(tmp_path))
    path = tmp_path / "train" / "part-00001.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CorruptArtifact, match="part-00001.parquet does not match its sha256"):
        read_split(str(tmp_path), "train")


def test_the_held_out_share_is_about_right_and_belongs_to_the_key() -> None:
    keys = [f"cats/{i}.png" for i in range(10_000)]
    held_out = [key for key in keys if split_of(key, 0.15) == "holdout"]
    assert len(held_out) == pytest.approx(1500, abs=150)
    more = {key for key in keys if split_of(key, 0.3) == "holdout"}
    assert more.issuperset(held_out), "raising the share moves none back to training"
    assert all(split_of(key, 0.0) == "train" for key in keys)


# --- batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "batch_size"), [(10, 4), (7, 7), (5, 8), (100, 1)])
def test_every_image_is_seen_once_an_epoch_and_no_tail_is_lost(n: int, batch_size: int) -> None:
    stream = np.concatenate([global_batch(0, step, batch_size, n) for step in range(3 * n)])
    for epoch in range(len(stream) // n):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert not np.array_equal(stream[:n], stream[n : 2 * n]) or n < 4


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_ranks_share_the_same_global_batch(world_size: int) -> None:
    images = ImageSet(np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1), np.arange(10), [])
    for step in (0, 2, 1000):
        parts = [Batches(images, 8, 5, rank, world_size).at(step) for rank in range(world_size)]
        together = torch.cat([part.pixels for part in parts]).flatten().tolist()
        assert together == global_batch(5, step, 8, 10).tolist()
        assert [row for part in parts for row in part.rows] == list(range(8))


def test_a_batch_that_the_workers_cannot_share_is_refused() -> None:
    images = ImageSet(np.zeros((10, 1, 1, 1), np.uint8), np.zeros(10, np.int64), [])
    with pytest.raises(ValueError, match=r"batch_size=9 must be a multiple of cluster\.workers=2"):
        Batches(images, 9, 0, 0, 2)


def test_png_text_is_kept() -> None:
    image = Image.open(io.BytesIO(png(np.zeros((4, 4, 3), np.uint8), {"ddpm": '{"ε": 1}'})))
    assert image.info["ddpm"] == '{"ε": 1}'
