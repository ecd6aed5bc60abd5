"""Every format of images: what independent writers make is read, and no damage does more harm."""

import errno
import gzip
import io
import json
import os
import resource
import struct
import tarfile
import tracemalloc
import uuid
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.core import url_to_fs
from PIL import Image
from sklearn.datasets import load_digits

from pipeline.data.formats import arrays, cifar, digits, idx, loose, parquet, tar_files, zip_files
from pipeline.data.formats.common import Member, read_up_to
from pipeline.data.place import Place
from pipeline.data.shards import encode_part
from pipeline.errors import DataError
from pipeline.storage import sha256

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (11, 6, 5), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (7, 4, 5, 3), dtype=np.uint8)
CLASSES = np.array([2, 0, 1, 2, 2, 1, 0, 1, 2, 0, 1], np.uint8)


def png(i: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(COLOUR[i]).save(buffer, "PNG")
    return buffer.getvalue()


PNG = [png(i) for i in range(len(COLOUR))]
LARGE = np.random.default_rng(1).integers(0, 256, (64, 512, 512), dtype=np.uint8)


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """An empty folder, on two file systems."""
    if request.param == "local":
        yield Place(str(tmp_path))
        return
    uri = f"memory://{uuid.uuid4().hex}"
    yield Place(uri)
    fs, root = url_to_fs(uri)
    if fs.exists(root):
        fs.rm(root, recursive=True)


@pytest.fixture
def local(tmp_path: Path) -> Place:
    return Place(str(tmp_path))


def put(place: Place, name: str, data: bytes) -> None:
    fs, root = url_to_fs(place.uri)
    fs.makedirs(os.path.dirname(f"{root}/{name}"), exist_ok=True)
    fs.pipe_file(f"{root}/{name}", data)


def look(module: ModuleType, place: Place, name: str) -> dict[str, Member]:
    members = list(module.index(place, name))
    found = {member.name: member for member in members}
    assert len(found) == len(members)
    return found


def contents(
    module: ModuleType, place: Place, name: str, members: list[Member]
) -> list[bytes | np.ndarray]:
    return list(module.read(place, name, [member.where for member in members]))


def check(module: ModuleType, place: Place, name: str, wanted: dict[str, object]) -> None:
    """The file holds just these images; any run of them can be read, and has the digest it had."""
    members = look(module, place, name)
    assert list(members) == list(wanted)
    assert not [member.bad for member in members.values() if member.bad]
    for run in (list(members.values()), list(members.values())[2:4]):
        read = contents(module, place, name, run)
        for member, content in zip(run, read, strict=True):
            expected = wanted[member.name]
            if isinstance(expected, np.ndarray):
                assert isinstance(content, np.ndarray)
                assert (content.shape, content.dtype) == (expected.shape, np.uint8)
                assert np.array_equal(content, expected)
                content = content.tobytes()
            else:
                assert content == expected
            assert sha256(content) == member.digest


def labels(module: ModuleType, place: Place, name: str) -> dict[str, int | str | None]:
    return {member.name: member.label for member in module.index(place, name)}


def bad(module: ModuleType, place: Place, name: str) -> dict[str, str]:
    return {member.name: member.bad for member in module.index(place, name) if member.bad}


# --- loose --------------------------------------------------------------------------------------


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


# --- tar ----------------------------------------------------------------------------------------


def tar(entries: dict[str, bytes] | list[tuple[str, bytes]], mode: str = "w") -> bytes:
    """As Python writes it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in entries.items() if isinstance(entries, dict) else entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


LONG = "d" * 90 + "/" + "e" * 60 + ".png"
TREE = {"cat/a.png": PNG[0], "cat/deep/b.JPG": PNG[1], "dog/ü.webp": PNG[2], "c.png": PNG[3]} | {
    LONG: PNG[4]
}


@pytest.mark.parametrize(
    ("name", "mode"), [("a.tar", "w"), ("a.tar.gz", "w:gz"), ("a.tgz", "w:gz")]
)
def test_a_tar_of_class_folders_is_read(place: Place, name: str, mode: str) -> None:
    litter = {"cat/notes.txt": b"no image", "cat/._a.png": b"litter", ".cache/x.png": b"hidden"}
    put(place, name, tar(TREE | litter, mode))
    check(tar_files, place, name, dict(TREE))
    assert list(labels(tar_files, place, name).values()) == ["cat", "cat", "dog", None, "d" * 90]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_form_of_tar_is_read(local: Place, tmp_path: Path, form: int) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as archive:
        for name, data in TREE.items():
            (tmp_path / "x").write_bytes(data)
            archive.add(tmp_path / "x", name)
    check(tar_files, local, "a.tar", dict(TREE))


def test_a_leading_dot_folder_is_dropped_as_tar_of_the_current_folder_writes_it(
    local: Place,
) -> None:
    put(local, "a.tar", tar({"./cat/a.png": PNG[0], "./b.png": PNG[1]}))
    assert labels(tar_files, local, "a.tar") == {"cat/a.png": "cat", "b.png": None}


WEBDATASET = [
    ("0001.cls", b"3\n"),
    ("0001.jpg", PNG[0]),
    ("0002.seg.png", PNG[1]),
    ("0002.png", PNG[2]),
    ("0002.json", json.dumps({"label": "cat", "caption": "x"}).encode()),
    ("0002.txt", b"a caption"),
    ("0003.png", PNG[3]),
    ("0003.json", json.dumps({"cls": 7}).encode()),
    ("0003.cls", b"otter"),
    ("dog/0004.png", PNG[4]),
    ("dog/0004.json", json.dumps({"label": [1, 2]}).encode()),
    ("dog/0005.png", PNG[5]),
    ("dog/0005.cls", b""),
    ("0006.png", PNG[6]),
    ("0006.json", b'{"class": true}'),
]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_webdataset_labels_are_found_before_and_behind_their_images(
    place: Place, mode: str
) -> None:
    name = "shard-000.tar" + ".gz" * (mode == "w:gz")
    put(place, name, tar(WEBDATASET, mode))
    assert labels(tar_files, place, name) == {
        "0001.jpg": 3,
        "0002.seg.png": "cat",
        "0002.png": "cat",
        "0003.png": "otter",
        "dog/0004.png": "dog",
        "dog/0005.png": "dog",
        "0006.png": 1,
    }
    check(tar_files, place, name, {k: v for k, v in WEBDATASET if k.endswith((".png", ".jpg"))})


@pytest.mark.parametrize(
    ("raw", "label"),
    [
        (b"-1", -1),
        (b"9" * 18, int("9" * 18)),
        (b"9" * 5000, "9" * 5000),
        (b"1_000", "1_000"),
        (b"\xff", "\\xff"),
        (b"  a b \r\n", "a b"),
    ],
)
def test_a_cls_file_is_a_whole_number_or_a_name(local: Place, raw: bytes, label: int | str) -> None:
    put(local, "a.tar", tar({"0.png": PNG[0], "0.cls": raw}))
    assert labels(tar_files, local, "a.tar") == {"0.png": label}


def test_a_name_that_is_not_utf_8_can_be_stored_and_the_label_beside_it_is_found(
    local: Place,
) -> None:
    data = tar([("x\udcff.cls", b"3"), ("x\udcff.png", PNG[0])])
    assert b"x\xff.png" in data
    put(local, "a.tar", data)
    assert labels(tar_files, local, "a.tar") == {"x\\xff.png": 3}


@pytest.mark.parametrize("raw", [b"{", b"\xff", b"[" * 100_000])
def test_a_json_file_that_is_none_makes_its_image_bad(local: Place, raw: bytes) -> None:
    put(local, "a.tar", tar({"0.png": PNG[0], "0.json": raw, "1.png": PNG[1]}))
    assert bad(tar_files, local, "a.tar") == {
        "0.png": "its label cannot be read: the .cls or .json file beside it is damaged"
    }


def test_what_a_label_holds_can_be_stored(local: Place) -> None:
    put(local, "a.tar", tar({"0.png": PNG[0], "0.json": b'{"label": "\\ud800"}'}))
    put(local, "b.tar", tar({"0.png": PNG[0], "0.json": b'{"label": 1%s}' % (b"0" * 30)}))
    assert labels(tar_files, local, "a.tar") == {"0.png": "\\ud800"}
    assert labels(tar_files, local, "b.tar") == {"0.png": 2**63 - 1}


def test_a_large_file_beside_an_image_is_not_read(
    local: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = {"0.json": b'{"label": 1, "x": "%s"}' % (b"x" * 2**20), "0.mp4": bytes(2**20)}
    put(local, "a.tar", tar(large | {"0.png": PNG[0]}))
    sizes = []

    def count(file: io.BytesIO, size: int) -> bytes:
        sizes.append(size)
        return read_up_to(file, size)

    monkeypatch.setattr(tar_files, "read_up_to", count)
    assert labels(tar_files, local, "a.tar") == {"0.png": None}
    assert sizes == [len(PNG[0])]


def test_names_that_lead_out_and_names_that_stand_twice_are_bad(place: Place) -> None:
    names = ["/etc/a.png", "../b.png", "c/../../d.png", "e.png", "./e.png", "f.png"]
    put(place, "a.tar", tar([(name, PNG[i]) for i, name in enumerate(names)]))
    members = list(tar_files.index(place, "a.tar"))
    out = "its name leads out of the archive"
    assert [member.bad for member in members] == [
        out,
        out,
        out,
        "",
        "the archive holds this name twice",
        "",
    ]
    read = contents(tar_files, place, "a.tar", [members[3], members[5]])
    assert read == [PNG[3], PNG[5]]


def test_links_and_devices_are_left_out_and_an_empty_image_is_a_member(place: Place) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"{kind.decode()}.png")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        folder = tarfile.TarInfo("folder.png")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        archive.addfile(tarfile.TarInfo("empty.png"))
    put(place, "a.tar", buffer.getvalue())
    check(tar_files, place, "a.tar", {"empty.png": b""})


def test_a_sparse_image_is_bad_and_what_follows_it_is_found(local: Place) -> None:
    plain = bytearray(tar({"a.png": bytes(1024), "b.png": PNG[1]}))
    plain[156:157] = b"S"  # GNU's old form: one piece of 1,024 bytes in a file of 5,000
    plain[386:410] = b"%011o\0%011o\0" % (0, 1024)
    plain[483:495] = b"%011o\0" % 5000
    plain[148:156] = b"        "
    plain[148:156] = b"%06o\0 " % sum(plain[:512])
    with tarfile.open(fileobj=io.BytesIO(plain)) as archive:
        assert archive.next().issparse()  # type: ignore[union-attr]
    put(local, "a.tar", bytes(plain))
    reason = "it is stored with holes (as a sparse file); write the archive without them"
    assert bad(tar_files, local, "a.tar") == {"a.png": reason}
    b = look(tar_files, local, "a.tar")["b.png"]
    assert contents(tar_files, local, "a.tar", [b]) == [PNG[1]]


ENDS = "the archive ends within this file: it is truncated"


@pytest.mark.parametrize(
    ("cut", "whole", "name"),
    [
        (512 + 10, 0, "0.png"),  # within the content of the first
        (1024, 1, "(byte 1024)"),  # right behind it
        (1024 + 100, 1, "(byte 1024)"),  # within the next header
        (1024 + 512 + 1, 1, "1.png"),
        (3 * 1024, 3, "(byte 3072)"),  # only the mark of the end is missing
    ],
)
def test_of_a_truncated_tar_stays_what_was_whole(
    place: Place, cut: int, whole: int, name: str
) -> None:
    data = tar({f"{i}.png": PNG[i] for i in range(3)})
    put(place, "a.tar", data[:cut])
    members = list(tar_files.index(place, "a.tar"))
    assert [(m.name, m.bad) for m in members[whole:]] == [(name, ENDS)]
    assert contents(tar_files, place, "a.tar", members[:whole]) == PNG[:whole]


def test_of_a_truncated_tar_gz_stays_what_was_whole(place: Place) -> None:
    noise = {f"{i}.png": RNG.bytes(5000) for i in range(3)} | {"2.txt": RNG.bytes(5000)}
    data = tar(noise, "w:gz")
    found = {}
    for cut in (len(data) * 2 // 5, len(data) * 3 // 5, len(data) - 4):
        put(place, "a.tar.gz", data[:cut])
        members = list(tar_files.index(place, "a.tar.gz"))
        assert [member.bad for member in members] == [""] * (len(members) - 1) + [ENDS]
        whole = members[:-1]
        assert contents(tar_files, place, "a.tar.gz", whole) == list(noise.values())[: len(whole)]
        found[cut] = len(whole)
    assert list(found.values()) == [1, 2, 3]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_label_that_is_cut_off_is_no_label(place: Place, mode: str) -> None:
    name = "a.tar" + ".gz" * (mode == "w:gz")
    data = tar([("0.png", RNG.bytes(1024)), ("0.cls", RNG.bytes(2000).hex().encode())], mode)
    put(place, name, data[: len(data) * 3 // 5] if mode == "w:gz" else data[: 2048 + 100])
    first, last = tar_files.index(place, name)
    assert (first.name, first.label, last.bad) == ("0.png", None, ENDS)
    assert first.bad.startswith("its label cannot be read")


def test_damage_in_the_middle_of_a_tar_does_not_pass_for_its_end(place: Place) -> None:
    data = bytearray(tar({f"{i}.png": PNG[i] for i in range(3)}))
    data[1024 + 3] ^= 1  # in the header of the second
    put(place, "a.tar", bytes(data))
    members = list(tar_files.index(place, "a.tar"))
    reason = "the archive is damaged here, and what follows is not found"
    assert [(m.name, m.bad) for m in members] == [("0.png", ""), ("(byte 1024)", reason)]


def test_a_checksum_of_gzip_that_does_not_fit_is_noticed(place: Place) -> None:
    data = bytearray(tar({"a.png": PNG[0]}, "w:gz"))
    data[-6] ^= 1
    put(place, "a.tgz", bytes(data))
    with pytest.raises(DataError, match=r"a.tgz is truncated or damaged \(CRC check failed"):
        list(tar_files.index(place, "a.tgz"))


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("a.tar", b"", r"a.tar is not a tar archive \(empty file\)"),
        ("a.tar", b"no tar" * 200, "a.tar is not a tar archive"),
        ("a.tar", PNG[0][:300], "a.tar is not a tar archive"),
        ("a.tar.gz", b"no gzip", "a.tar.gz is truncated or damaged .Not a gzipped file"),
        ("a.tar.gz", gzip.compress(b"no tar" * 200, mtime=0), "a.tar.gz is not a tar archive"),
        ("a.tar.gz", gzip.compress(bytes(1024), mtime=0)[:12], "a.tar.gz is truncated or damaged"),
    ],
)
def test_what_is_no_tar_is_refused_in_one_sentence(
    place: Place, name: str, data: bytes, sentence: str
) -> None:
    put(place, name, data)
    with pytest.raises(DataError, match=sentence) as refused:
        list(tar_files.index(place, name))
    assert "\n" not in str(refused.value)


def header_of_size(size: bytes, kind: bytes) -> bytes:
    """A tar header with a size of twelve bytes as they are given."""
    header = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.GNU_FORMAT))
    header[124:136], header[156:157] = size, kind
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header[:512])
    return bytes(header)


@pytest.mark.parametrize("kind", [b"0", b"L", b"x", b"S"])
@pytest.mark.parametrize(
    "size",
    [
        b"\xff" * 12,
        b"\xff" * 10 + b"\xfa\x00",
        b"%011o\0" % 2**29,
        b"77777777777\0",
        b"\x80" + b"\xff" * 11,
    ],
    ids=["minus one", "minus 1536, to the first header", "512 MiB", "8 GiB", "2^88"],
)
def test_a_hostile_size_in_a_tar_neither_hangs_nor_takes_memory(
    local: Place, monkeypatch: pytest.MonkeyPatch, kind: bytes, size: bytes
) -> None:
    asked = []

    class Watched(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            asked.append(size)
            return super().read(size)

    first = tar({"0.png": PNG[0]})[:1024]
    data = first + header_of_size(size, kind) + bytes(2048)
    monkeypatch.setattr(Place, "open", lambda *_: Watched(data))
    sound, *others = tar_files.index(local, "a.tar")
    assert (sound.name, sound.bad) == ("0.png", "")
    assert 1 <= len(others) <= 2
    assert all(member.bad for member in others)
    assert 0 <= min(asked) <= max(asked) <= 2**22


# --- zip ----------------------------------------------------------------------------------------


def zipped(entries: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """As Python writes it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_of_class_folders_is_read(place: Place, method: int) -> None:
    litter = {"cat/": b"", "x.png/": b"", "cat/notes.txt": b"", "__MACOSX/cat/._a.png": b"litter"}
    put(place, "a.zip", zipped(TREE | litter, method))
    check(zip_files, place, "a.zip", dict(TREE))
    assert list(labels(zip_files, place, "a.zip").values()) == ["cat", "cat", "dog", None, "d" * 90]


def test_a_zip_behind_other_bytes_and_one_of_an_unseekable_writer_are_read(local: Place) -> None:
    put(local, "a.zip", b"#!/bin/sh\n" + zipped(TREE))
    check(zip_files, local, "a.zip", dict(TREE))

    class Pipe(io.RawIOBase):
        data = b""

        def writable(self) -> bool:
            return True

        def write(self, data: bytes) -> int:  # type: ignore[override]
            self.data += bytes(data)
            return len(data)

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:  # type: ignore[arg-type]
        for name, data in TREE.items():
            archive.writestr(name, data)
    put(local, "b.zip", pipe.data)  # its sizes stand behind the contents
    check(zip_files, local, "b.zip", dict(TREE))


def test_names_in_utf_8_are_read_though_the_zip_does_not_say_so(local: Place) -> None:
    put(local, "a.zip", central(zipped({"hühner/a.png": PNG[0]}), FLAGS + 1, b"\0"))
    assert labels(zip_files, local, "a.zip") == {"hühner/a.png": "hühner"}
    other = central(zipped({"hühner/a.png": PNG[0]}), 46 + 1, "ü".encode("cp437") + b"x")
    put(local, "b.zip", central(other, FLAGS + 1, b"\0"))
    assert labels(zip_files, local, "b.zip") == {"hüxhner/a.png": "hüxhner"}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([["00/a.png", 3], ["01/b.png", 0]], [3, 0, None]),
        ({"00/a.png": 3, "01/b.png": "cat"}, [3, "cat", None]),
        (None, [None, None, None]),
    ],
)
def test_labels_stand_in_dataset_json_as_stylegan_and_edm_write_it(
    place: Place, given: object, wanted: list[object]
) -> None:
    images = {"00/a.png": PNG[0], "01/b.png": PNG[1], "01/c.png": PNG[2]}
    put(place, "a.zip", zipped(images | {"dataset.json": json.dumps({"labels": given}).encode()}))
    assert list(labels(zip_files, place, "a.zip").values()) == wanted


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (b"{", "that is not as StyleGAN and EDM write it"),
        (b"[]", "that is not as StyleGAN and EDM write it"),
        (b"{}", "that is not as StyleGAN and EDM write it"),
        (b'{"labels": [1, 2]}', "that is not as StyleGAN and EDM write it"),
        (b'{"labels": {"a.png": [0, 1]}}', r"the label \[0, 1\] for 'a.png': a label is a number"),
        (b"[" * 100_000, "that is not as StyleGAN and EDM write it"),
    ],
)
def test_another_dataset_json_is_refused_in_one_sentence(
    local: Place, raw: bytes, sentence: str
) -> None:
    put(local, "a.zip", zipped({"a.png": PNG[0], "dataset.json": raw}))
    with pytest.raises(DataError, match=f"a.zip holds a dataset.json .*{sentence}"):
        list(zip_files.index(local, "a.zip"))


def test_reading_a_zip_does_not_read_its_table_of_contents_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(place, "a.zip", zipped(TREE))
    members = list(look(zip_files, place, "a.zip").values())
    monkeypatch.setattr(zipfile.ZipFile, "__init__", lambda *_: pytest.fail("opened again"))
    assert contents(zip_files, place, "a.zip", members) == list(TREE.values())


def test_names_in_a_zip_that_lead_out_or_stand_twice_are_bad(place: Place) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("../a.png", PNG[0])
        archive.writestr("/b.png", PNG[1])
        archive.writestr("c.png", PNG[2])
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("c.png", PNG[3])
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    put(place, "a.zip", buffer.getvalue())
    members = list(zip_files.index(place, "a.zip"))
    out = "its name leads out of the archive"
    assert [member.bad for member in members] == [out, out, "", "the archive holds this name twice"]
    assert contents(zip_files, place, "a.zip", [members[2]]) == [PNG[2]]


def central(data: bytes, field: int, value: bytes, entry: int = 0) -> bytes:
    """The zip with bytes of the table of contents changed, at `field` of an entry."""
    position = -1
    for _ in range(entry + 1):
        position = data.index(b"PK\1\2", position + 1)
    return data[: position + field] + value + data[position + field + len(value) :]


FLAGS, METHOD, CRC, PACKED, SIZE, OFFSET = 8, 10, 16, 20, 24, 42
TWO = {"a.png": PNG[0], "b.png": PNG[1]}
ZEROS = bytes(10_000_000)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (central(zipped(TWO), FLAGS, b"\1"), "it is encrypted"),
        (
            central(zipped(TWO), METHOD, b"\x0c"),
            "it is compressed by method 12; stored and deflated are read",
        ),
        (
            central(zipped(TWO), CRC, bytes(4)),
            "its content does not have the CRC that the archive announces",
        ),
        (
            central(zipped({"a.png": ZEROS, "b.png": PNG[1]}), SIZE, struct.pack("<I", 1000)),
            "it inflates to more than the 1000 bytes that the archive announces",
        ),
        (
            central(zipped(TWO), SIZE, struct.pack("<I", 1000)),
            "it inflates to less than the 1000 bytes that the archive announces",
        ),
        (
            central(zipped(TWO), SIZE, struct.pack("<I", 2**31)),
            "it has more than 1,073,741,824 bytes",
        ),
        (
            central(zipped(TWO), PACKED, struct.pack("<I", 2**20)),
            "the archive ends within this file: it is truncated",
        ),
        (
            central(zipped(TWO), OFFSET, struct.pack("<I", 5)),
            "its header within the archive is damaged",
        ),
    ],
)
def test_a_damaged_entry_of_a_zip_is_bad_and_the_others_are_read(
    place: Place, data: bytes, reason: str
) -> None:
    put(place, "a.zip", data)
    members = look(zip_files, place, "a.zip")
    assert members["b.png"].bad == ""
    assert contents(zip_files, place, "a.zip", [members["b.png"]]) == [PNG[1]]
    assert members["a.png"].digest == ""
    assert members["a.png"].bad == reason


def test_a_deflated_entry_that_is_damaged_is_bad(place: Place) -> None:
    data, start = zipped(TREE), 30 + len("cat/a.png")
    put(place, "a.zip", data[:start] + b"\xff" * 8 + data[start + 8 :])
    (reason,) = bad(zip_files, place, "a.zip").values()
    assert reason.startswith("it cannot be inflated: ")


def test_a_zip_bomb_takes_no_more_memory_than_it_announces(local: Place) -> None:
    put(local, "a.zip", central(zipped({"a.png": ZEROS}), SIZE, struct.pack("<I", 1000)))
    tracemalloc.start()
    try:
        assert list(bad(zip_files, local, "a.zip")) == ["a.png"]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20, "of 10 MB"


@pytest.mark.parametrize(
    "data",
    [b"", b"no zip" * 100, zipped(TWO)[:-10], zipped(TWO)[200:], central(zipped(TWO), 0, b"XX")],
)
def test_what_is_no_sound_zip_is_refused_in_one_sentence(place: Place, data: bytes) -> None:
    put(place, "a.zip", data)
    with pytest.raises(DataError, match="a.zip is not a sound zip archive") as refused:
        list(zip_files.index(place, "a.zip"))
    assert "\n" not in str(refused.value)


# --- parquet ------------------------------------------------------------------------------------


def table(data: pa.Table, **options: object) -> bytes:
    sink = io.BytesIO()
    pq.write_table(data, sink, **options)
    return sink.getvalue()


def hugging_face(
    images: list[bytes | None], labels: list[int] | None = None, column: str = "image"
) -> pa.Table:
    """As `datasets` writes Image and ClassLabel."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [
        None if raw is None else {"bytes": raw, "path": f"{i}.png"} for i, raw in enumerate(images)
    ]
    fields, columns = [(column, kind)], [pa.array(rows, kind)]
    features: dict[str, object] = {column: {"_type": "Image"}}
    if labels is not None:
        fields.append(("label", pa.int64()))
        columns.append(pa.array(labels, pa.int64()))
        features["label"] = {"names": ["cat", "dog", "owl"], "_type": "ClassLabel"}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.Table.from_arrays(columns, schema=pa.schema(fields, metadata=metadata))


def numbered(contents: list[object]) -> dict[str, object]:
    return {f"{i:05d}": content for i, content in enumerate(contents)}


@pytest.mark.parametrize("column", ["image", "img", "picture"])
def test_parquet_is_read_as_hugging_face_writes_it(place: Place, column: str) -> None:
    data = hugging_face(PNG, [0, 2, 1, 0, -1, 2, 1], column)
    put(place, "a.parquet", table(data, row_group_size=3))
    check(parquet, place, "a.parquet", numbered(list(PNG)))
    found = list(labels(parquet, place, "a.parquet").values())
    assert found == ["cat", "owl", "dog", "cat", None, "owl", "dog"]
    assert [m.where for m in parquet.index(place, "a.parquet")][2:5] == [(0, 2), (1, 0), (1, 1)]


@pytest.mark.parametrize(
    ("kind", "values", "wanted"),
    [
        (pa.int8(), [4, 0, None], [4, 0, None]),
        (pa.uint64(), [2**64 - 1, 0, 1], [2**63 - 1, 0, 1]),
        (pa.string(), ["a", "", None], ["a", None, None]),
        (pa.dictionary(pa.int8(), pa.string()), ["a", "b", "a"], ["a", "b", "a"]),
        (pa.list_(pa.int64()), [[1], [2], []], [None, None, None]),
    ],
)
@pytest.mark.parametrize("image", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_binary_columns_and_every_kind_of_label_are_read(
    local: Place, image: pa.DataType, kind: pa.DataType, values: list[object], wanted: list[object]
) -> None:
    data = pa.table(
        {"photo": pa.array(PNG[:3], image), "cls": pa.array(values, kind), "n": [1, 2, 3]}
    )
    put(local, "a.parquet", table(data))
    check(parquet, local, "a.parquet", numbered(list(PNG[:3])))
    assert list(labels(parquet, local, "a.parquet").values()) == wanted


@pytest.mark.parametrize("shape", [(6, 5, 1), (4, 5, 3)])
def test_the_parts_of_a_shard_set_are_a_source_of_pixels(
    place: Place, shape: tuple[int, int, int]
) -> None:
    images = GREY[..., None] if shape[2] == 1 else COLOUR
    numbers = [None, *[i % 2 for i in range(len(images) - 1)]]
    keys = [f"k/{i}" for i in range(len(images))]
    put(place, "p.parquet", encode_part(images, numbers, keys, ["cat", "dog"]))
    check(parquet, place, "p.parquet", numbered(list(images)))
    assert list(labels(parquet, place, "p.parquet").values())[:3] == [None, "cat", "dog"]


def test_a_null_image_and_a_label_without_a_name_are_bad(place: Place) -> None:
    put(place, "a.parquet", table(hugging_face([PNG[0], None, PNG[2], PNG[3]], [0, 0, 3, -2])))
    assert bad(parquet, place, "a.parquet") == {
        "00001": "it is null",
        "00002": "its label is 3, of 3 classes",
        "00003": "its label is -2, of 3 classes",
    }


def test_only_the_row_groups_and_the_column_that_are_asked_for_are_read(
    local: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(local, "a.parquet", table(hugging_face(PNG, [0] * 7), row_group_size=2))
    members = list(parquet.index(local, "a.parquet"))
    asked = []
    real = pq.ParquetFile.iter_batches

    def watch(self: pq.ParquetFile, *args: object, **options: object) -> Iterator[pa.RecordBatch]:
        asked.append((options["row_groups"], options["columns"]))
        return real(self, *args, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watch)
    run = [members[6], members[3], members[2]]  # in any order
    assert contents(parquet, local, "a.parquet", run) == [PNG[6], PNG[3], PNG[2]]
    groups = [3, 1, 1]  # who goes back within a group reads it again
    assert asked == [([group], ["image.bytes"]) for group in groups]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "is truncated or damaged"),
        (b"PAR1" * 30, "is truncated or damaged"),
        (table(hugging_face(PNG))[:-20], "is truncated or damaged"),
        (table(pa.table({"a": [1], "url": ["x"]})), "has none of its columns a, url as images"),
        (
            table(pa.table({"a": PNG[:1], "b": PNG[:1]})),
            r"has several \(a, b\) of its columns a, b as images: name one image",
        ),
        (
            table(pa.table({"image": pa.array([b"123"], pa.binary(3))})),
            "has none of its columns image as images",
        ),
    ],
)
def test_a_parquet_file_without_images_is_refused_in_one_sentence(
    place: Place, data: bytes, sentence: str
) -> None:
    put(place, "a.parquet", data)
    with pytest.raises(DataError, match=f"a.parquet {sentence}") as refused:
        list(parquet.index(place, "a.parquet"))
    assert "\n" not in str(refused.value)


def test_of_a_small_file_that_unpacks_to_gigabytes_little_is_held_at_once(local: Place) -> None:
    page = bytes(2**20)
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), pa.array([page]))
    data = table(pa.table({"image": column}), store_schema=False)  # it is then simply binary
    assert len(data) < 2**20
    put(local, "a.parquet", data)
    held = []
    for member, _ in zip(parquet.index(local, "a.parquet"), range(70), strict=False):
        assert member.digest == sha256(page)
        held.append(pa.total_allocated_bytes())
    assert len(held) == 70
    assert max(held) < 150 * 2**20  # of 3 GB


PAGES: dict[str, Any] = {"compression": None, "use_dictionary": False, "write_batch_size": 1}
"""So that they are of 1 MiB; pyarrow else makes one of all images of a row group."""


def test_of_a_large_row_group_little_is_held_at_once(
    local: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [image.tobytes() for image in LARGE]
    put(local, "a.parquet", table(pa.table({"image": cells}), **PAGES))
    asked: list[int] = []
    real = Place.open

    class Watched(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:  # type: ignore[override]
            asked.append(size or 0)
            return super().read(size)  # type: ignore[return-value]

    monkeypatch.setattr(Place, "open", lambda self, name: Watched(real(self, name).name))
    before, held = pa.total_allocated_bytes(), []
    members = []
    for member in parquet.index(local, "a.parquet"):
        members.append(member)
        held.append(pa.total_allocated_bytes() - before)
    for content, cell in zip(
        parquet.read(local, "a.parquet", [member.where for member in members]), cells, strict=True
    ):
        assert content == cell
        held.append(pa.total_allocated_bytes() - before)
    assert max(asked) <= 2 * 2**20, "of 16 MiB"
    assert max(held) < 13 * 2**20, "32 images of 256 KiB, and what is read ahead of them"


def test_a_cell_of_an_unlikely_size_is_bad(local: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "MAX_IMAGE_BYTES", len(PNG[0]))
    put(local, "a.parquet", table(hugging_face([PNG[0], PNG[0] + b"x"])))
    assert bad(parquet, local, "a.parquet") == {"00001": "it has more than 1,073,741,824 bytes"}


# --- IDX ----------------------------------------------------------------------------------------


def idx_bytes(values: np.ndarray) -> bytes:
    """The IDX file of a uint8 array, by the format's description."""
    header = bytes([0, 0, 8, values.ndim])
    return header + b"".join(n.to_bytes(4, "big") for n in values.shape) + values.tobytes()


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
GREY_IMAGES = numbered(list(GREY[..., None]))


@pytest.mark.parametrize("dash", ["-", "."])
@pytest.mark.parametrize("packed", [(False, False), (True, True), (True, False), (False, True)])
def test_idx_images_come_with_the_labels_beside_them(
    place: Place, dash: str, packed: tuple[bool, bool]
) -> None:
    files = {IMAGES: idx_bytes(GREY), LABELS: idx_bytes(CLASSES)}
    names = []
    for (name, data), pack in zip(files.items(), packed, strict=True):
        names.append("set/" + name.replace("-idx", f"{dash}idx") + ".gz" * pack)
        put(place, names[-1], gzip.compress(data, mtime=0) if pack else data)
    check(idx, place, names[0], GREY_IMAGES)
    assert list(labels(idx, place, names[0]).values()) == CLASSES.tolist()
    assert idx.is_images(names[0]) and not idx.is_images(names[1])
    assert idx.stem(names[0]) == "set/train"


def test_idx_images_without_a_file_of_labels_have_none(place: Place) -> None:
    put(place, IMAGES, idx_bytes(GREY))
    check(idx, place, IMAGES, GREY_IMAGES)
    assert set(labels(idx, place, IMAGES).values()) == {None}


HEAD = 16


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (
            {IMAGES: b"\x89PNG" + bytes(100)},
            f"{IMAGES} begins with the bytes 89 50 4e 47, an IDX file of unsigned bytes with 3 "
            "axes begins with 00 00 08 03",
        ),
        ({LABELS: idx_bytes(GREY)}, f"{LABELS} begins with the bytes 00 00 08 03"),
        ({IMAGES: b""}, f"{IMAGES} begins with the bytes none"),
        ({IMAGES: idx_bytes(GREY)[: HEAD - 1]}, f"{IMAGES} ends within its header"),
        (
            {IMAGES: idx_bytes(GREY)[:-1]},
            f"{IMAGES} holds 329 bytes after its header, which announces 330 .11 x 6 x 5.: it is "
            "truncated",
        ),
        ({IMAGES: idx_bytes(GREY) + b"\0"}, f"{IMAGES} holds 331 bytes after its header"),
        ({LABELS: idx_bytes(CLASSES) + b"\0"}, f"{LABELS} holds 12 bytes after its header"),
        ({LABELS: idx_bytes(CLASSES)[:-1]}, f"{LABELS} holds 10 bytes after its header"),
        (
            {IMAGES: bytes([0, 0, 8, 3]) + b"\xff" * 12 + bytes(9)},
            "announces 79228162458924105385300197375",
        ),
        (
            {LABELS: idx_bytes(CLASSES[:-1])},
            f"{IMAGES} has 11 images, but {LABELS} has 10 labels: the two files do not belong",
        ),
        ({IMAGES: idx_bytes(GREY[:0]), LABELS: idx_bytes(CLASSES[:0])}, "holds no image"),
        ({IMAGES: idx_bytes(GREY[:, :0])}, r"holds no image: it has the shape \(11, 0, 5\)"),
    ],
)
def test_a_damaged_idx_file_is_refused_in_one_sentence(
    place: Place, files: dict[str, bytes], sentence: str
) -> None:
    for name, data in ({IMAGES: idx_bytes(GREY), LABELS: idx_bytes(CLASSES)} | files).items():
        put(place, name, data)
    with pytest.raises(DataError, match=sentence) as refused:
        list(idx.index(place, IMAGES))
    assert str(refused.value).startswith(f"data.source: {place.uri}/train-")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("damage", [lambda data: data[:100], lambda data: b"no gzip"])
@pytest.mark.parametrize("name", [f"{IMAGES}.gz", f"{LABELS}.gz"])
def test_a_damaged_gz_is_named(place: Place, damage: Callable[[bytes], bytes], name: str) -> None:
    files = {f"{IMAGES}.gz": idx_bytes(GREY), f"{LABELS}.gz": idx_bytes(CLASSES) + RNG.bytes(200)}
    for other, data in files.items():
        put(place, other, gzip.compress(data, mtime=0))
    put(place, name, damage(gzip.compress(files[name], mtime=0)))
    with pytest.raises(DataError, match=f"{name} is truncated or damaged"):
        list(idx.index(place, f"{IMAGES}.gz"))


# --- CIFAR --------------------------------------------------------------------------------------

PHOTOS = RNG.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)


def cifar_bytes(*labels: list[int]) -> bytes:
    """By the description at the data set's page: labels, then the red, green and blue plane."""
    rows = zip(*labels, PHOTOS, strict=True)
    return b"".join(
        bytes(row[:-1]) + b"".join(row[-1][:, :, c].tobytes() for c in range(3)) for row in rows
    )


TEN = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
HUNDRED = [f"class_{i}" for i in range(100)]


def test_cifar_10_is_read_with_its_names_and_without(place: Place) -> None:
    put(place, "c/data_batch_1.bin", cifar_bytes([6, 9, 9, 4, 0]))
    check(cifar, place, "c/data_batch_1.bin", numbered(list(PHOTOS)))
    assert list(labels(cifar, place, "c/data_batch_1.bin").values()) == [6, 9, 9, 4, 0]
    put(place, "c/batches.meta.txt", "\n".join(TEN).encode() + b"\n\n")
    named = list(labels(cifar, place, "c/data_batch_1.bin").values())
    assert named == ["frog", "truck", "truck", "deer", "airplane"]


def test_cifar_100_has_its_fine_labels(place: Place) -> None:
    put(place, "train.bin", cifar_bytes([0, 1, 2, 3, 4], [99, 0, 50, 7, 100]))
    members = look(cifar, place, "train.bin")
    assert [member.label for member in members.values()] == [99, 0, 50, 7, None]
    assert bad(cifar, place, "train.bin") == {"00004": "its label is 100, of 100 classes"}
    assert np.array_equal(contents(cifar, place, "train.bin", [members["00003"]])[0], PHOTOS[3])
    put(place, "fine_label_names.txt", "\n".join(HUNDRED).encode())
    assert look(cifar, place, "train.bin")["00002"].label == "class_50"


def test_a_size_that_fits_both_forms_is_settled_by_the_names_beside(
    local: Place,
) -> None:
    put(local, "a.bin", bytes(3073 * 3074))
    assert len(look(cifar, local, "a.bin")) == 3074
    put(local, "fine_label_names.txt", "\n".join(HUNDRED).encode())
    assert len(look(cifar, local, "a.bin")) == 3073


@pytest.mark.parametrize("data", [b"", b"x", cifar_bytes([0] * 5)[:-1]])
def test_a_bin_file_of_another_size_is_refused(place: Place, data: bytes) -> None:
    put(place, "a.bin", data)
    with pytest.raises(
        DataError, match=rf"a.bin has {len(data)} bytes, no multiple of 3073 \(CIFAR"
    ):
        list(cifar.index(place, "a.bin"))


@pytest.mark.parametrize("names", ["\n".join(TEN[:9]), "\n".join(["a"] * 10), "\udcff"])
def test_names_of_classes_that_do_not_fit_are_refused(place: Place, names: str) -> None:
    put(place, "a.bin", cifar_bytes([0] * 5))
    put(place, "batches.meta.txt", names.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=r"batches.meta.txt (has \d names|is truncated or damaged)"):
        list(cifar.index(place, "a.bin"))


# --- arrays -------------------------------------------------------------------------------------


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def npz(save: Callable[..., None] = np.savez, **values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    save(buffer, **values)
    return buffer.getvalue()


RGBA = RNG.integers(0, 256, (3, 4, 5, 4), dtype=np.uint8)


@pytest.mark.parametrize("values", [GREY, GREY[..., None], COLOUR, RGBA])
def test_npy_is_read_as_numpy_saves_it(place: Place, values: np.ndarray) -> None:
    put(place, "a.npy", npy(values))
    check(arrays, place, "a.npy", numbered(list(values if values.ndim == 4 else values[..., None])))
    assert set(labels(arrays, place, "a.npy").values()) == {None}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_read_with_the_labels_that_are_named_as_its_images(
    place: Place, save: Callable[..., None]
) -> None:
    values = {
        "train_images": COLOUR,
        "train_labels": np.arange(7, dtype=np.uint8)[:, None],
        "x_test": GREY[:2],
        "y_test": np.array([-5, 300], ">i2"),
        "X": GREY[2:4],
        "y": np.array([1, 2]),
        "scale": np.array(0.5),
        "image": RGBA,
    }
    put(place, "a.npz", npz(save, **values))
    wanted = {
        f"{array}/{i:05d}": image if image.ndim == 3 else image[..., None]
        for array in ("train_images", "x_test", "X", "image")
        for i, image in enumerate(values[array])
    }
    check(arrays, place, "a.npz", wanted)
    found = list(labels(arrays, place, "a.npz").values())
    assert found == [*range(7), -5, 300, 1, 2, None, None, None]


def test_the_digests_of_arrays_are_of_their_pixels_whatever_file_they_are_in(local: Place) -> None:
    put(local, "a.npy", npy(GREY))
    put(local, "a.npz", npz(x=GREY))
    put(local, "a-images-idx3-ubyte", idx_bytes(GREY))
    digests = [
        [member.digest for member in module.index(local, name)]
        for module, name in ((arrays, "a.npy"), (arrays, "a.npz"), (idx, "a-images-idx3-ubyte"))
    ]
    assert digests[0] == digests[1] == digests[2] == [sha256(image.tobytes()) for image in GREY]


PICKLED = io.BytesIO()
np.save(PICKLED, np.array([{"a": 1}], object), allow_pickle=True)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "does not begin as an array of NumPy does"),
        (PNG[0], "does not begin as an array of NumPy does"),
        (npy(GREY)[:50], "does not begin as an array of NumPy does"),
        (npy(GREY).replace(b"(11,", b"(((,"), "does not begin as an array of NumPy does"),
        (npy(GREY).replace(b"(11,", b"(-1,"), "does not begin as an array of NumPy does"),
        (PICKLED.getvalue(), r"holds object of the shape \(1,\): images are uint8"),
        (npy(GREY.astype(np.float32)), r"holds float32 of the shape \(11, 6, 5\): images are"),
        (npy(COLOUR.transpose(0, 3, 1, 2).copy()), r"holds uint8 of the shape \(7, 3, 4, 5\)"),
        (npy(np.asfortranarray(GREY)), "holds uint8 of .* in Fortran order: images are"),
        (npy(GREY[:0]), "holds no image"),
        (npy(GREY)[:-1], "holds 329 bytes after its header, which announces 330"),
        (npy(GREY) + b"x", "holds 331 bytes after its header, which announces 330"),
    ],
)
def test_another_npy_is_refused_in_one_sentence(place: Place, data: bytes, sentence: str) -> None:
    put(place, "a.npy", data)
    with pytest.raises(DataError, match=f"a.npy {sentence}") as refused:
        list(arrays.index(place, "a.npy"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "is not a sound zip archive"),
        (npz(a=np.arange(3)), r"has no array of images \(a, int64 of the shape \(3,\)\): images"),
        (
            npz(images=GREY, labels=CLASSES[:-1]),
            "has 11 images in images, but the labels in labels",
        ),
        (npz(x=GREY, y=np.ones(11)), "the labels in y are float64 of the shape .11,.: labels are"),
        (npz(x=GREY, y=np.ones((11, 2), int)), r"the labels in y are int64 of the shape \(11, 2\)"),
        (central(npz(x=GREY), FLAGS, b"\1"), "cannot be read: it is encrypted"),
        (central(npz(x=GREY), CRC, b"\1\2\3\4"), "is truncated or damaged .Bad CRC-32"),
        (zipped({"x.npy": npy(GREY)[:-1]}), "holds 329 bytes after its header"),
        (
            zipped({"x.npy": npy(GREY), "y.npy": npy(CLASSES) + b"\0"}),
            "y.npy holds 12 bytes after its header",
        ),
    ],
)
def test_another_npz_is_refused_in_one_sentence(place: Place, data: bytes, sentence: str) -> None:
    put(place, "a.npz", data)
    with pytest.raises(DataError, match=f"a.npz.*{sentence}") as refused:
        list(arrays.index(place, "a.npz"))
    assert "\n" not in str(refused.value)


# --- digits -------------------------------------------------------------------------------------


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


# --- every format -------------------------------------------------------------------------------

SOUND: dict[str, tuple[ModuleType, bytes, dict[str, bytes]]] = {
    "a.tar": (tar_files, tar(WEBDATASET + list(TREE.items())), {}),
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
