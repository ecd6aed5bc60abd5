"""What a source's images are like, found from a sample: the same as a scan finds, and bounded."""

import gzip
import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.data import survey as module
from pipeline.data.config import DataConfig
from pipeline.data.source import scan
from pipeline.data.survey import survey
from pipeline.errors import DataError
from tests.unit.test_formats import idx_bytes

RNG = np.random.default_rng(0)
LABELS = [0, 1, 1, 2, 0, 2, 2, 1, 0, 1, 2, 0]
GREY = RNG.integers(0, 256, (len(LABELS), 9, 12), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (len(LABELS), 9, 12, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def files(pixels: np.ndarray = COLOUR) -> dict[str, bytes]:
    """A tree of class folders."""
    return {f"kind {label}/{i:02d}.png": encoded(pixels[i]) for i, label in enumerate(LABELS)}


def write_folder(path: Path) -> None:
    for name, data in files().items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)


def write_tar(path: Path, mode: str = "w") -> None:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in files().items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files().items():
            archive.writestr(name, data)


def write_parquet(path: Path) -> None:
    images = [{"bytes": encoded(pixels)} for pixels in COLOUR]
    table = pa.table({"image": images, "label": [f"kind {label}" for label in LABELS]})
    pq.write_table(table, path, row_group_size=5)


def write_idx(path: Path) -> None:
    path.write_bytes(gzip.compress(idx_bytes(GREY)))
    labels = path.with_name(path.name.replace("images-idx3", "labels-idx1"))
    labels.write_bytes(gzip.compress(idx_bytes(np.array(LABELS, np.uint8))))


def write_cifar(path: Path) -> None:
    rows = RNG.integers(0, 256, (len(LABELS), 3073), dtype=np.uint8)
    rows[:, 0] = LABELS
    path.write_bytes(rows.tobytes())


WRITERS: dict[str, Callable[[Path], None]] = {
    "folder": write_folder,
    "a.tar": write_tar,
    "a.tgz": lambda path: write_tar(path, "w:gz"),
    "a.zip": write_zip,
    "a.parquet": write_parquet,
    "a.npy": lambda path: np.save(path, COLOUR),
    "a.npz": lambda path: np.savez_compressed(path, images=COLOUR, labels=np.array(LABELS)),
    "x-images-idx3-ubyte.gz": write_idx,
    "a.bin": write_cifar,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_survey_finds_what_a_scan_finds(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    found = survey(str(path))
    scanned = scan(DataConfig(source=str(path), image_size=8, channels=3))
    labels = [number for number in scanned.items["number"].to_pylist() if number is not None]
    assert found.num_images == scanned.items.num_rows == len(LABELS)
    assert found.class_names == scanned.class_names
    assert sum(found.class_counts) == len(labels)
    assert found.class_counts == [labels.count(i) for i in range(len(scanned.class_names))]
    assert [image.key for image in found.seen] == scanned.items["key"].to_pylist()
    assert found.is_counted and found.is_whole and not found.bad
    size = (32, 32) if name == "a.bin" else (12, 9)
    assert found.median_size == size
    assert found.num_with_colour == (0 if "idx3" in name else len(LABELS))


def test_colour_is_what_is_seen_not_what_a_file_says(tmp_path: Path) -> None:
    smooth = np.linspace(0, 255, 64 * 64).astype(np.uint8).reshape(64, 64)
    as_rgb = np.stack([smooth] * 3, axis=-1)
    tinted = as_rgb.copy()
    tinted[:16, :16] = [200, 30, 30]
    for name, pixels, kind in (
        ("grey in RGB.png", as_rgb, "PNG"),
        ("grey in RGB.jpg", as_rgb, "JPEG"),
        ("grey.png", smooth, "PNG"),
        ("a sixteenth is red.png", tinted, "PNG"),
    ):
        (tmp_path / name).write_bytes(encoded(pixels, kind))
    found = survey(str(tmp_path))
    assert [image.key for image in found.seen if image.has_colour] == ["a sixteenth is red.png"]


def test_what_cannot_be_used_is_named_and_the_rest_is_measured(tmp_path: Path) -> None:
    write_folder(tmp_path / "in")
    (tmp_path / "in" / "kind 0" / "00.png").write_bytes(b"not an image")
    (tmp_path / "in" / "kind 1" / "copy.png").write_bytes(files()["kind 1/01.png"])
    (tmp_path / "in" / "kind 1" / "large.png").write_bytes(encoded(np.zeros((50, 80), np.uint8)))
    found = survey(str(tmp_path / "in"))
    assert [key for key, _ in found.bad] == ["kind 0/00.png"]
    assert "not a PNG" in found.bad[0][1]
    assert (found.num_sampled, found.num_doubles, len(found.seen)) == (14, 1, 12)
    assert found.shorter_sides.tolist() == [9] * 11 + [50]


@pytest.mark.parametrize("name", ["a.tar", "a.zip"])
def test_damage_within_an_archive_is_of_single_images(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    data = bytearray(path.read_bytes())
    if name == "a.tar":
        del data[data.index(b"kind 0/11.png") + 512 + 30 :]  # within the last image
    else:
        with zipfile.ZipFile(path) as archive:
            at = archive.getinfo("kind 0/11.png").header_offset + 30 + len("kind 0/11.png")
        data[at : at + 40] = bytes(40)  # no deflate stream begins so
    path.write_bytes(data)
    found = survey(str(path))
    assert len(found.seen) == 11
    assert "kind 0/11.png" in [key.removeprefix(f"{name}/") for key, _ in found.bad]


def test_a_large_source_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, decoded = encoded(np.zeros((8, 8), np.uint8)), 0
    for i in range(600):
        (tmp_path / f"{i:03d}.png").write_bytes(image + bytes([i % 256, i // 256]))
    decode = module.decode

    def counted(*arguments: object) -> object:
        nonlocal decoded
        decoded += 1
        return decode(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "decode", counted)
    calls: list[tuple[int, int]] = []
    found = survey(str(tmp_path), lambda done, total: calls.append((done, total)))
    assert found.num_images == 600 and found.num_sampled == decoded == 256
    assert calls == [(i, 256) for i in range(257)]
    keys = [int(image.key[:3]) for image in found.seen]
    assert keys[0] == 0 and keys[-1] == 599 and max(np.diff(keys)) < 30
    assert not found.is_whole


def test_of_many_archives_some_are_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(20):
        write_tar(tmp_path / f"{i:02d}.tar")
    monkeypatch.setattr(module, "MOST_IN_ARCHIVES", 30)
    found = survey(str(tmp_path))
    assert not found.is_counted
    assert found.num_images == 20 * len(LABELS), "the archives have one size"
    assert sum(found.class_counts) == 3 * len(LABELS)


def mixed_labels(folder: Path) -> None:
    write_parquet(folder / "a.parquet")
    write_idx(folder / "x-images-idx3-ubyte.gz")


def nothing(folder: Path) -> None:
    (folder / "notes.txt").write_text("no image")


def broken_archive(folder: Path) -> None:
    (folder / "a.zip").write_bytes(b"PK no archive")


@pytest.mark.parametrize("write", [mixed_labels, nothing, broken_archive])
def test_what_cannot_be_scanned_is_refused_in_the_same_words(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    write(tmp_path)
    for source in (str(tmp_path), str(tmp_path / "nowhere"), f"{tmp_path}/no*match", "nosuch://x"):
        with pytest.raises(DataError) as of_scan:
            scan(DataConfig(source=source, image_size=8, channels=3))
        with pytest.raises(DataError) as of_survey:
            survey(source)
        assert str(of_survey.value) == str(of_scan.value)


def test_a_source_of_damaged_images_alone_is_refused(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"x" * i)
    with pytest.raises(DataError, match=r"none of its 3 images can be used \(0.png: .* empty"):
        survey(str(tmp_path))
