"""Tar archives: class folders, WebDataset, and what a damaged or hostile one does."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest

from pipeline.data.formats import tar_files
from pipeline.data.formats.common import read_up_to
from pipeline.data.place import Place
from tests.unit.formats import (
    PNG,
    RNG,
    TREE,
    TREE_LABELS,
    bad,
    check,
    check_refused,
    contents,
    labels,
    look,
    put,
    tar,
)


@pytest.mark.parametrize(
    ("name", "mode"), [("a.tar", "w"), ("a.tar.gz", "w:gz"), ("a.tgz", "w:gz")]
)
def test_a_tar_of_class_folders_is_read(place: Place, name: str, mode: str) -> None:
    litter = {"cat/notes.txt": b"no image", "cat/._a.png": b"litter", ".cache/x.png": b"hidden"}
    put(place, name, tar(TREE | litter, mode))
    check(tar_files, place, name, dict(TREE))
    assert list(labels(tar_files, place, name).values()) == TREE_LABELS


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
    ("beside", "label"),
    [
        ({"0.cls": b"-1"}, -1),
        ({"0.cls": b"9" * 18}, int("9" * 18)),
        ({"0.cls": b"9" * 5000}, "9" * 5000),
        ({"0.cls": b"1_000"}, "1_000"),
        ({"0.cls": b"\xff"}, "\\xff"),
        ({"0.cls": b"  a b \r\n"}, "a b"),
        ({"0.json": b'{"label": "\\ud800"}'}, "\\ud800"),
        ({"0.json": b'{"label": 1%s}' % (b"0" * 30)}, 2**63 - 1),
    ],
)
def test_what_stands_beside_an_image_becomes_a_label_that_can_be_stored(
    local: Place, beside: dict[str, bytes], label: int | str
) -> None:
    put(local, "a.tar", tar({"0.png": PNG[0]} | beside))
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


def test_names_that_lead_out_and_names_that_stand_twice_are_bad(local: Place) -> None:
    names = ["/etc/a.png", "../b.png", "c/../../d.png", "e.png", "./e.png", "f.png"]
    put(local, "a.tar", tar([(name, PNG[i]) for i, name in enumerate(names)]))
    members = list(tar_files.index(local, "a.tar"))
    out, twice = "its name leads out of the archive", "the archive holds this name twice"
    assert [member.bad for member in members] == [out, out, out, "", twice, ""]
    read = contents(tar_files, local, "a.tar", [members[3], members[5]])
    assert read == [PNG[3], PNG[5]]


def test_links_and_devices_are_left_out_and_an_empty_image_is_a_member(local: Place) -> None:
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
    put(local, "a.tar", buffer.getvalue())
    check(tar_files, local, "a.tar", {"empty.png": b""})


def with_checksum(header: bytearray) -> bytes:
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header[:512])
    return bytes(header)


def test_a_sparse_image_is_bad_and_what_follows_it_is_found(local: Place) -> None:
    plain = bytearray(tar({"a.png": bytes(1024), "b.png": PNG[1]}))
    plain[156:157] = b"S"  # GNU's old form: one piece of 1,024 bytes in a file of 5,000
    plain[386:410] = b"%011o\0%011o\0" % (0, 1024)
    plain[483:495] = b"%011o\0" % 5000
    data = with_checksum(plain)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert archive.next().issparse()  # type: ignore[union-attr]
    put(local, "a.tar", data)
    reason = "it is stored with holes (as a sparse file); write the archive without them"
    assert bad(tar_files, local, "a.tar") == {"a.png": reason}
    b = look(tar_files, local, "a.tar")["b.png"]
    assert contents(tar_files, local, "a.tar", [b]) == [PNG[1]]


SOUND = tar({f"{i}.png": PNG[i] for i in range(3)} | {"2.cls": b"1"})
CUT = "the archive is truncated or damaged here, and what follows is not found"


@pytest.mark.parametrize(
    ("data", "whole", "byte", "why"),
    [
        (SOUND[: 512 + 10], 0, 1024, "it ends within 0.png"),
        (SOUND[:1024], 1, 1024, "no sound header"),
        (SOUND[: 1024 + 100], 1, 1024, "no sound header"),
        (SOUND[: 1024 + 512 + 1], 1, 2048, "it ends within 1.png"),
        (SOUND[: 4 * 1024], 3, 4096, "no sound header"),  # only the mark of the end is missing
        (SOUND[:1027] + b"\xff" + SOUND[1028:], 1, 1024, "no sound header"),
    ],
)
def test_of_a_truncated_or_damaged_tar_stays_what_was_whole(
    local: Place, data: bytes, whole: int, byte: int, why: str
) -> None:
    """Damage in the middle does not pass for the end, as which tarfile takes it."""
    put(local, "a.tar", data)
    *members, last = tar_files.index(local, "a.tar")
    assert contents(tar_files, local, "a.tar", members) == PNG[:whole]
    assert (last.name, last.bad) == (f"(byte {byte})", f"{CUT} ({why})")


def test_of_a_truncated_tar_gz_stays_what_was_whole(local: Place) -> None:
    noise = [RNG.bytes(5000) for _ in range(4)]
    data = tar(dict(zip(["0.png", "1.png", "2.png", "2.txt"], noise, strict=True)), "w:gz")
    for cut, whole in ((len(data) * 2 // 5, 1), (len(data) * 3 // 5, 2), (len(data) - 4, 3)):
        put(local, "a.tar.gz", data[:cut])
        *members, last = tar_files.index(local, "a.tar.gz")
        assert contents(tar_files, local, "a.tar.gz", members) == noise[:whole]
        assert last.bad.startswith(CUT)


def test_a_label_that_is_cut_off_is_no_label(local: Place) -> None:
    put(local, "a.tar", SOUND[: 3 * 1024 + 512])
    *_, image, last = tar_files.index(local, "a.tar")
    assert (image.name, image.label) == ("2.png", None)
    assert image.bad.startswith("its label cannot be read")
    assert last.bad == f"{CUT} (it ends within 2.cls)"


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("a.tar", b"", "empty file"),
        ("a.tar", b"no tar" * 200, "invalid header"),
        ("a.tar", PNG[0][:300], "truncated header"),
        ("a.tar.gz", b"no gzip", "Not a gzipped file"),
        ("a.tar.gz", gzip.compress(b"no tar" * 200, mtime=0), "invalid header"),
        ("a.tar.gz", gzip.compress(SOUND, mtime=0)[:12], "Compressed file ended"),
        ("a.tar.gz", gzip.compress(SOUND, mtime=0)[:-6] + bytes(6), "CRC check failed"),
    ],
)
def test_what_is_no_tar_is_refused_in_one_sentence(
    local: Place, name: str, data: bytes, why: str
) -> None:
    sentence = rf"{name} is truncated or damaged \(.*{why}"
    check_refused(tar_files, local, name, {name: data}, sentence)


@pytest.mark.parametrize("kind", [b"0", b"L", b"x", b"S"])
@pytest.mark.parametrize(
    "size",
    [b"\xff" * 12, b"\xff" * 10 + b"\xfa\x00", b"%011o\0" % 2**29, b"\x80" + b"\xff" * 11],
    ids=["minus one", "minus 1536, to the first header", "512 MiB", "2^88"],
)
def test_a_hostile_size_in_a_tar_neither_hangs_nor_takes_memory(
    local: Place, monkeypatch: pytest.MonkeyPatch, kind: bytes, size: bytes
) -> None:
    asked = []

    class Watched(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            asked.append(size)
            return super().read(size)

    header = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.GNU_FORMAT))
    header[124:136], header[156:157] = size, kind
    data = tar({"0.png": PNG[0]})[:1024] + with_checksum(header) + bytes(2048)
    monkeypatch.setattr(Place, "open", lambda *_: Watched(data))
    sound, *others = tar_files.index(local, "a.tar")
    assert (sound.name, sound.bad) == ("0.png", "")
    assert 1 <= len(others) <= 2
    assert all(member.bad for member in others)
    assert 0 <= min(asked) <= max(asked) <= 2**22
