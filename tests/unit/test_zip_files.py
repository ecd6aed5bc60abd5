"""Zip archives: class folders, dataset.json, and what a damaged or hostile one does."""

import io
import json
import struct
import tracemalloc
import zipfile

import pytest

from pipeline.data.formats import zip_files
from pipeline.data.place import Place
from tests.unit.formats import (
    CRC,
    FLAGS,
    METHOD,
    NAME,
    OFFSET,
    PACKED,
    PNG,
    SIZE,
    TREE,
    TREE_LABELS,
    bad,
    central,
    check,
    check_refused,
    contents,
    labels,
    look,
    put,
    zipped,
)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_of_class_folders_is_read(place: Place, method: int) -> None:
    litter = {"cat/": b"", "x.png/": b"", "cat/notes.txt": b"", "__MACOSX/cat/._a.png": b"litter"}
    put(place, "a.zip", zipped(TREE | litter, method))
    check(zip_files, place, "a.zip", dict(TREE))
    assert list(labels(zip_files, place, "a.zip").values()) == TREE_LABELS


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
    data = zipped({"hühner/a.png": PNG[0]})
    unflagged = central(data, FLAGS + 1, b"\0")[:7] + b"\0" + central(data, FLAGS + 1, b"\0")[8:]
    put(local, "a.zip", unflagged)
    check(zip_files, local, "a.zip", {"hühner/a.png": PNG[0]})
    old = unflagged.replace("hü".encode(), "hüx".encode("cp437"))
    put(local, "b.zip", old)
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
    local: Place, given: object, wanted: list[object]
) -> None:
    images = {"00/a.png": PNG[0], "01/b.png": PNG[1], "01/c.png": PNG[2]}
    put(local, "a.zip", zipped(images | {"dataset.json": json.dumps({"labels": given}).encode()}))
    assert list(labels(zip_files, local, "a.zip").values()) == wanted


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (b"{", "that is not as StyleGAN and EDM write it"),
        (b"[]", "that is not as StyleGAN and EDM write it"),
        (b'{"labels": [1, 2]}', "that is not as StyleGAN and EDM write it"),
        (b'{"labels": {"a.png": [0, 1]}}', r"the label \[0, 1\] for 'a.png': a label is a number"),
        (b"[" * 100_000, "that is not as StyleGAN and EDM write it"),
    ],
)
def test_another_dataset_json_is_refused_in_one_sentence(
    local: Place, raw: bytes, sentence: str
) -> None:
    files = {"a.zip": zipped({"a.png": PNG[0], "dataset.json": raw})}
    check_refused(zip_files, local, "a.zip", files, f"a.zip holds a dataset.json .*{sentence}")


def test_reading_a_zip_does_not_read_its_table_of_contents_again(
    local: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(local, "a.zip", zipped(TREE))
    members = list(look(zip_files, local, "a.zip").values())
    monkeypatch.setattr(zipfile.ZipFile, "__init__", lambda *_: pytest.fail("opened again"))
    assert contents(zip_files, local, "a.zip", members) == list(TREE.values())


def test_names_in_a_zip_that_lead_out_or_stand_twice_are_bad(local: Place) -> None:
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
    put(local, "a.zip", buffer.getvalue())
    members = list(zip_files.index(local, "a.zip"))
    out = "its name leads out of the archive"
    assert [member.bad for member in members] == [out, out, "", "the archive holds this name twice"]
    assert contents(zip_files, local, "a.zip", [members[2]]) == [PNG[2]]


TWO = {"a.png": PNG[0], "b.png": PNG[1]}
ZEROS = bytes(10_000_000)
PLAIN = zipped(TWO)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (central(PLAIN, FLAGS, b"\1"), "is encrypted"),
        (central(PLAIN, METHOD, b"\x0c"), "compressed by method 12; stored and deflated are read"),
        (central(PLAIN, CRC, bytes(4)), "Bad CRC-32"),
        (central(PLAIN, SIZE, struct.pack("<I", 10)), "Bad CRC-32"),
        (central(PLAIN, SIZE, struct.pack("<I", 1000)), "it inflates to less than the 1000 bytes"),
        (central(PLAIN, SIZE, struct.pack("<I", 2**31)), "it has more than 1,073,741,824 bytes"),
        (central(PLAIN, OFFSET, struct.pack("<I", 5)), "Bad magic number"),
        (central(PLAIN, NAME, b"c"), "File name in directory 'c.png' and header b'a.png' differ"),
        (PLAIN[:35] + b"\xff" * 8 + PLAIN[43:], "while decompressing data"),
    ],
)
def test_a_damaged_entry_of_a_zip_is_bad_and_the_others_are_read(
    local: Place, data: bytes, reason: str
) -> None:
    put(local, "a.zip", data)
    first, second = zip_files.index(local, "a.zip")
    assert contents(zip_files, local, "a.zip", [second]) == [PNG[1]]
    assert (first.digest, second.bad) == ("", "")
    assert reason in first.bad


def test_a_stored_entry_that_goes_on_behind_the_archive_is_bad(local: Place) -> None:
    data = zipped({"a.png": PNG[0]}, zipfile.ZIP_STORED)
    longer = struct.pack("<I", 2**20)
    put(local, "a.zip", central(central(data, SIZE, longer), PACKED, longer))
    assert list(bad(zip_files, local, "a.zip")) == ["a.png"]


def test_a_zip_bomb_takes_no_more_memory_than_it_announces(local: Place) -> None:
    put(local, "a.zip", central(zipped({"a.png": ZEROS}), SIZE, struct.pack("<I", 1000)))
    tracemalloc.start()
    try:
        assert list(bad(zip_files, local, "a.zip")) == ["a.png"]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20, "of 10 MB"


@pytest.mark.parametrize("data", [b"", b"no zip" * 100, PLAIN[:-10], PLAIN[200:]])
def test_what_is_no_sound_zip_is_refused_in_one_sentence(local: Place, data: bytes) -> None:
    sentence = "a.zip is not a sound zip archive"
    check_refused(zip_files, local, "a.zip", {"a.zip": data}, sentence)
