"""Every format of images: what is read is what was listed, and no damage does more harm."""

import errno
import gzip
import resource
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pytest
from sklearn.datasets import load_digits

from pipeline.data.formats import arrays, cifar, digits, idx, loose, parquet, tar_files, zip_files
from pipeline.data.formats.common import Member
from pipeline.data.place import Place
from pipeline.data.shards import encode_part
from pipeline.errors import DataError
from pipeline.storage import sha256
from tests.unit.formats import (
    CLASSES,
    COLOUR,
    GREY,
    IMAGES,
    LABELS,
    LARGE,
    PAGES,
    PNG,
    TEN,
    TREE,
    bad,
    check,
    cifar_bytes,
    contents,
    hugging_face,
    idx_bytes,
    look,
    npy,
    npz,
    put,
    table,
    tar,
    zipped,
)

WEBDATASET = {"0.cls": b"3", "0.png": PNG[0], "1.png": PNG[1], "1.json": b'{"label": "cat"}'}


# --- loose ----------------------------------------------------------------------------------------


def test_an_image_file_is_one_member_without_a_name(place: Place) -> None:
    put(place, "cats/a.png", PNG[0])
    check(loose, place, "cats/a.png", {"": PNG[0]})


def test_a_missing_file_is_an_image_that_cannot_be_read(place: Place) -> None:
    assert bad(loose, place, "a.png") == {"": "the file cannot be read (it is missing)"}
    assert look(loose, place, "a.png")[""].digest == ""
    with pytest.raises(DataError, match=r"a.png cannot be read \(it is missing\)"):
        contents(loose, place, "a.png", [Member("", None, "")])


def test_a_dangling_link_and_a_forbidden_file_cannot_be_read(
    local: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").symlink_to("nowhere.png")
    assert bad(loose, local, "a.png") == {"": "the file cannot be read (it is missing)"}

    def forbid(self: Place, name: str) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", name)  # root may read all

    monkeypatch.setattr(Place, "read", forbid)
    assert bad(loose, local, "a.png") == {"": "the file cannot be read (there is no permission)"}


@pytest.mark.parametrize("module", [loose, tar_files, zip_files, parquet, idx, cifar, arrays])
def test_a_server_that_is_away_is_not_the_fault_of_a_file(
    module: ModuleType, local: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> bytes:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(Place, "open", away)
    monkeypatch.setattr(Place, "read", away)
    with pytest.raises(ConnectionError):
        list(module.index(local, "a.npz"))


@pytest.mark.parametrize("module", [tar_files, zip_files, parquet, idx, cifar, arrays])
def test_an_archive_that_is_missing_is_named(module: ModuleType, place: Place) -> None:
    for use in (lambda: module.index(place, "a/b.npz"), lambda: module.read(place, "a/b.npz", [])):
        with pytest.raises(DataError, match=r"a/b.npz cannot be read \(it is missing\)"):
            list(use())


# --- digits ---------------------------------------------------------------------------------------


def test_the_builtin_digits_are_the_real_ones() -> None:
    place = Place("builtin:")
    members = list(digits.index(place, "digits"))
    assert len(members) == 1797
    assert (members[12].name, members[12].label) == ("0012", "2")
    assert {member.label for member in members} == set("0123456789")
    zero, last = contents(digits, place, "digits", [members[0], members[-1]])
    assert isinstance(zero, np.ndarray)
    assert (zero.shape, zero.dtype) == ((8, 8, 1), np.uint8)
    # the first row of the first image of the data set is 0 0 5 13 9 1 0 0 of 16
    assert zero[0, :, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]
    assert sha256(last.tobytes()) == members[-1].digest  # type: ignore[union-attr]
    theirs = load_digits()
    pixels, labels = digits.all_digits()
    assert np.array_equal(labels, theirs.target)
    assert np.array_equal(pixels[..., 0], np.rint(theirs.images * (255 / 16)))


# --- every format ---------------------------------------------------------------------------------

SOUND: dict[str, tuple[ModuleType, bytes, dict[str, bytes]]] = {
    "a.tar": (tar_files, tar(TREE | WEBDATASET), {}),
    "a.tar.gz": (tar_files, tar(WEBDATASET, "w:gz"), {}),
    "a.zip": (zip_files, zipped(TREE | {"dataset.json": b'{"labels": [["c.png", 1]]}'}), {}),
    "a.parquet": (parquet, table(hugging_face(PNG, [0, 1, 2, 0, 1, 2, 0]), row_group_size=3), {}),
    "part.parquet": (parquet, bytes(encode_part(COLOUR, [0] * 7, list("abcdefg"), ["x"])), {}),
    f"{IMAGES}": (idx, idx_bytes(GREY), {LABELS: idx_bytes(CLASSES)}),
    f"{IMAGES}.gz": (idx, gzip.compress(idx_bytes(GREY), mtime=0), {LABELS: idx_bytes(CLASSES)}),
    "a.bin": (cifar, cifar_bytes([1] * 5), {"batches.meta.txt": "\n".join(TEN).encode()}),
    "a.npy": (arrays, npy(GREY), {}),
    "a.npz": (arrays, npz(np.savez_compressed, x=GREY, y=CLASSES), {}),
    "a.png": (loose, PNG[0], {}),
}


@pytest.mark.parametrize("name", [name for name in SOUND if name != "a.png"])
def test_an_image_that_is_gone_since_the_listing_is_noticed(place: Place, name: str) -> None:
    module, data, _ = SOUND[name]
    put(place, name, data)
    members = [member for member in module.index(place, name) if not member.bad]
    put(place, name, data[: len(data) // 3])
    try:
        read = contents(module, place, name, members)
    except DataError as error:
        assert name in str(error)
    else:
        pytest.fail(f"{len(read)} images were read of a third of the file")


LARGE_FILES = {f"{i}.png": image.tobytes() for i, image in enumerate(LARGE)}


@pytest.mark.parametrize(
    ("name", "module", "make"),
    [
        ("a.tar", tar_files, lambda: tar(LARGE_FILES)),
        ("a.tar.gz", tar_files, lambda: gzip.compress(tar(LARGE_FILES), 1, mtime=0)),
        ("a.zip", zip_files, lambda: zipped(LARGE_FILES, zipfile.ZIP_STORED)),
        ("a.npy", arrays, lambda: npy(LARGE)),
        ("a.npz", arrays, lambda: npz(x=LARGE)),
        (f"{IMAGES}.gz", idx, lambda: gzip.compress(idx_bytes(LARGE), 1, mtime=0)),
        (
            "a.parquet",
            parquet,
            lambda: table(pa.table({"image": [*LARGE_FILES.values()]}), **PAGES),
        ),
    ],
)
def test_of_a_large_file_one_image_at_a_time_is_held(
    local: Place, name: str, module: ModuleType, make: Callable[[], bytes]
) -> None:
    put(local, name, make())
    tracemalloc.start()
    try:
        members = list(module.index(local, name))
        read = sum(len(content) for content in module.read(local, name, [m.where for m in members]))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(members) == 64 and read > 0
    assert peak < 6 * 2**20, "of 16 MiB"


def hostile(data: bytes) -> Iterator[bytes]:
    """At 60 places, most of them in headers: a bit flipped, a byte raised, the rest cut off."""
    ends = np.unique([*range(24), *(len(data) - 1 - np.arange(12) * 5)])
    between = np.linspace(24, len(data) - 60, 60 - len(ends)).astype(int)
    for position in sorted({int(i) for i in (*ends, *between)}):
        for byte in (data[position] ^ 1, 0xFF):
            yield data[:position] + bytes([byte]) + data[position + 1 :]
        yield data[:position]


@pytest.mark.parametrize("name", SOUND)
def test_hostile_bytes_yield_members_or_a_data_error_and_take_little_memory(
    local: Place, name: str
) -> None:
    module, data, beside = SOUND[name]
    for other, content in beside.items():
        put(local, other, content)
    before, outcomes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, set()
    for damaged in hostile(data):
        put(local, name, damaged)
        try:
            members = list(module.index(local, name))
            assert all(isinstance(member, Member) for member in members)
            outcomes.add("members")
        except DataError:
            outcomes.add("refused")
            continue
        good = [member for member in members if not member.bad]
        read = contents(module, local, name, good)
        for member, content in zip(good, read, strict=True):
            raw = content if isinstance(content, bytes) else content.tobytes()
            assert sha256(raw) == member.digest
    assert outcomes == {"members"} if module is loose else {"members", "refused"}
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200 * 1024, "KiB"
