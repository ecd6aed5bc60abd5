"""Sources: which files there are, their images with labels and hashes, and how they are cut."""

import functools
import io
import json
import os
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline import storage
from pipeline.data import items
from pipeline.data.config import DataConfig
from pipeline.data.formats import loose
from pipeline.data.formats.choice import format_of
from pipeline.data.input_shards import cut, read
from pipeline.data.listing import absolute, list_files
from pipeline.data.place import Place
from pipeline.data.runs import runs
from pipeline.data.source import Source, scan
from pipeline.errors import DataError, StorageError
from tests import needs
from tests.conftest import ROOT


def png(seed: int) -> bytes:
    """A small image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def config(source: object, **more: Any) -> DataConfig:
    return DataConfig(source=str(source), image_size=8, channels=3, **more)


def found(source: Source) -> dict[str, int | None]:
    """Key -> label."""
    return dict(
        zip(source.items["key"].to_pylist(), source.items["number"].to_pylist(), strict=True)
    )


def contents(source: Source, images_per_shard: int = 3) -> dict[str, Any]:
    return {item.key: raw for shard in cut(source, images_per_shard) for item, raw in read(shard)}


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


FOLDER = {
    "cats/a.png": png(0),
    "cats/deep/b.JPG": png(1),
    "dogs/c.webp": png(2),
    "e.png": png(3),
    "dogs/notes.txt": b"not an image",
    "dogs/._c.png": b"litter of another system",
    ".cache/x.png": b"",
}
LABELS = {"cats/a.png": 0, "cats/deep/b.JPG": 0, "dogs/c.webp": 1, "e.png": None}


# --- what a source stands for -------------------------------------------------------------------


def test_sub_folders_are_the_classes(tmp_path: Path) -> None:
    source = scan(config(write(tmp_path, FOLDER)))
    assert source.class_names == ["cats", "dogs"]
    assert found(source) == LABELS
    assert contents(source) == {key: FOLDER[key] for key in LABELS}


def test_a_glob_chooses_files_and_folders(tmp_path: Path) -> None:
    write(tmp_path, FOLDER)
    assert set(found(scan(config(f"{tmp_path}/c*")))) == {"cats/a.png", "cats/deep/b.JPG"}
    assert set(found(scan(config(f"{tmp_path}/*/*.png")))) == {"cats/a.png"}
    assert set(found(scan(config(f"{tmp_path}/cats/?.png")))) == {"a.png"}


def test_a_folder_whose_name_looks_like_a_glob_is_itself(tmp_path: Path) -> None:
    assert set(found(scan(config(write(tmp_path / "a[1]", FOLDER))))) == set(LABELS)


def test_one_file_is_a_source(tmp_path: Path) -> None:
    write(tmp_path, FOLDER)
    assert contents(scan(config(tmp_path / "e.png"))) == {"e.png": FOLDER["e.png"]}


def archive(kind: str, files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as packed:
            for name, data in files.items():
                packed.writestr(name, data)
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz" if kind == "tar.gz" else "w") as packed:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                packed.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_an_archive_holds_what_a_folder_would(tmp_path: Path, kind: str) -> None:
    (tmp_path / f"x.{kind}").write_bytes(archive(kind, FOLDER))
    source = scan(config(tmp_path))
    assert source.class_names == ["cats", "dogs"]
    assert found(source) == {f"x.{kind}/{key}": label for key, label in LABELS.items()}
    assert contents(source, 2) == {f"x.{kind}/{key}": FOLDER[key] for key in LABELS}


def test_files_of_several_kinds_make_one_source(tmp_path: Path) -> None:
    write(tmp_path, {"cats/a.png": png(0), "more.zip": archive("zip", {"dogs/b.png": png(1)})})
    source = scan(config(tmp_path))
    assert source.class_names == ["cats", "dogs"]
    assert found(source) == {"cats/a.png": 0, "more.zip/dogs/b.png": 1}


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_a_uri_is_a_source_like_a_path(tmp_path: Path, scheme: str) -> None:
    root = f"memory://{tmp_path.name}" if scheme == "memory" else f"file://{tmp_path}"
    for name, data in FOLDER.items():
        storage.write_bytes(f"{root}/set/{name}", data)
    local = scan(config(write(tmp_path / "local", FOLDER)))
    source = scan(config(f"{root}/set"))
    assert source.fingerprint == local.fingerprint
    assert contents(source) == contents(local)
    assert set(found(scan(config(f"{root}/set/*/*.webp")))) == {"dogs/c.webp"}


@pytest.fixture
def website(tmp_path: Path) -> Iterator[str]:
    """The address of a web server that shows the folder `tmp_path`."""

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            if wanted is None or self.path.startswith("/whole/"):
                return super().do_GET()
            data = Path(self.translate_path(self.path)).read_bytes()
            first, last = wanted.removeprefix("bytes=").split("-")
            part = data[int(first) : int(last) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part)

        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Handler, directory=str(tmp_path))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_web_server_is_a_source(tmp_path: Path, website: str) -> None:
    write(tmp_path / "set", FOLDER)
    (tmp_path / "set.zip").write_bytes(archive("zip", FOLDER))
    listed = scan(config(f"{website}/set"))
    assert listed.fingerprint == scan(config(tmp_path / "set")).fingerprint
    assert contents(listed) == {key: FOLDER[key] for key in LABELS}
    packed = scan(config(f"{website}/set.zip"))
    assert found(packed) == {f"set.zip/{key}": label for key, label in LABELS.items()}
    assert contents(packed)["set.zip/e.png"] == FOLDER["e.png"]
    with pytest.raises(DataError, match="nothing.zip' does not exist"):
        scan(config(f"{website}/nothing.zip"))
    (tmp_path / "whole").symlink_to(tmp_path)
    with pytest.raises(DataError, match="doesn't appear to support range requests"):
        scan(config(f"{website}/whole/set.zip"))


def test_paths_are_made_absolute_and_uris_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("photos/*.png") == f"{tmp_path}/photos/*.png"
    assert absolute("s3://bucket/set") == "s3://bucket/set"
    assert absolute("builtin:digits") == "builtin:digits"


@pytest.mark.parametrize(
    ("source", "files", "sentence"),
    [
        ("x", {}, "does not exist: give a folder, an archive, a glob of either, or builtin"),
        ("", {}, r"holds no image \(0 files looked at; images end in .png, "),
        ("", {"a.txt": b"x"}, r"holds no image \(1 files looked at"),
        ("x/*.png", {"x/a.jpg": b""}, "matches no file: mend the pattern"),
        ("builtin:letters", {}, "there is builtin:digits"),
        ("nowhere://x/y", {}, "cannot be read: Protocol not known"),
        ("", {"a.zip": archive("zip", {"a.txt": b""})}, "holds no image: its files are empty"),
    ],
)
def test_a_source_without_images_is_refused_in_one_sentence(
    tmp_path: Path, source: str, files: dict[str, bytes], sentence: str
) -> None:
    write(tmp_path, files)
    with pytest.raises(DataError, match=sentence) as refused:
        scan(config(source if ":" in source else tmp_path / source))
    assert "\n" not in str(refused.value)


# --- labels -------------------------------------------------------------------------------------


def test_a_label_file_takes_the_place_of_the_folders(tmp_path: Path) -> None:
    write(tmp_path / "set", FOLDER)
    (tmp_path / "labels.csv").write_text("file,label\ncats/a.png,tabby\nc.webp,poodle\ne,tabby\n")
    source = scan(config(tmp_path / "set", labels=str(tmp_path / "labels.csv")))
    assert source.class_names == ["poodle", "tabby"]
    assert found(source) == {"cats/a.png": 1, "cats/deep/b.JPG": None, "dogs/c.webp": 0, "e.png": 1}


def test_numbers_are_labels_and_can_be_given_names(tmp_path: Path) -> None:
    write(tmp_path / "set", FOLDER)
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({"a.png": 2, "e.png": 0}))
    source = scan(config(tmp_path / "set", labels=str(labels)))
    assert source.class_names == ["0", "1", "2"]
    assert found(source)["cats/a.png"] == 2
    named = scan(config(tmp_path / "set", labels=str(labels), class_names=("x", "y", "z")))
    assert named.class_names == ["x", "y", "z"]
    assert named.fingerprint != source.fingerprint
    with pytest.raises(DataError, match="class_names has 2 names, but .* has 3 classes"):
        scan(config(tmp_path / "set", labels=str(labels), class_names=("x", "y")))
    with pytest.raises(ValueError, match="the name 'bag' stands twice"):
        config("x", class_names=("bag", "bag"))


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ({"a.png": 2, "e.png": "cat"}, "both names of classes, such as 'cat', and numbers, such"),
        ({"z.png": 2}, "names none of the images of .*: it has 'z.png', the source 'cats/a.png'"),
        ({"a.png": 2**40}, "has the label 1099511627776: labels are numbers from 0"),
    ],
)
def test_labels_that_do_not_fit_are_refused(
    tmp_path: Path, labels: dict[str, Any], sentence: str
) -> None:
    write(tmp_path / "set", FOLDER)
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    with pytest.raises(DataError, match=sentence):
        scan(config(tmp_path / "set", labels=str(tmp_path / "labels.json")))


# --- identity -----------------------------------------------------------------------------------


def test_a_fingerprint_is_of_content_label_and_name(tmp_path: Path) -> None:
    first = scan(config(write(tmp_path / "one", FOLDER)))
    assert scan(config(write(tmp_path / "two", FOLDER))).fingerprint == first.fingerprint
    for change in ({"e.png": png(9)}, {"cats/e.png": png(3)}, {"dogs/new.png": png(8)}):
        changed = write(tmp_path / "two", FOLDER | change)
        assert scan(config(changed)).fingerprint != first.fingerprint


def test_a_second_scan_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "set", FOLDER | {"x.zip": archive("zip", {"cats/z.png": png(7)})})
    index = str(tmp_path / "index")
    first = scan(config(tmp_path / "set"), index, remember=True)

    def refuse(*_: object, **__: object) -> Any:
        raise AssertionError("read again")

    monkeypatch.setattr(items, "look", refuse)
    again = scan(config(tmp_path / "set"), index)
    assert again.fingerprint == first.fingerprint
    assert again.items.equals(first.items)
    (tmp_path / "set" / "e.png").write_bytes(png(9))
    with pytest.raises(AssertionError, match="read again"):
        scan(config(tmp_path / "set"), index)


IDX = {
    "a-images-idx3-ubyte": bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 1]) + b"xy",
    "a-labels-idx1-ubyte": bytes([0, 0, 8, 1, 0, 0, 0, 2]) + bytes([1, 0]),
}
CIFAR = {
    "data_batch_1.bin": bytes([1]) + bytes(3072) + bytes([0]) + b"x" * 3072,
    "batches.meta.txt": b"\n".join(b"c%d" % i for i in range(10)),
}


@pytest.mark.parametrize("chosen", ["", "/*.bin", "/*images*", "/a-images-idx3-ubyte"])
def test_what_is_remembered_of_a_file_goes_with_the_labels_that_lie_beside_it(
    tmp_path: Path, chosen: str
) -> None:
    """They may be no part of the source, where that is a file or a glob."""
    (images, data), (beside, labels) = (CIFAR if "bin" in chosen else IDX).items()
    root = write(tmp_path / "set", {images: data})

    def classes() -> list[str]:
        source = scan(config(f"{root}{chosen}"), str(tmp_path / "index"), remember=True)
        return [source.class_names[n] for n in found(source).values() if n is not None]

    numbers = ["1", "0"] if "bin" in chosen else []
    assert classes() == numbers
    (root / beside).write_bytes(labels)
    named = ["c1", "c0"] if "bin" in chosen else ["1", "0"]
    assert classes() == named
    other = labels.replace(b"c0", b"d0") if "bin" in chosen else labels[:-2] + bytes([0, 1])
    (root / beside).write_bytes(other)
    os.utime(root / beside, (1, 1))
    assert classes() == (["c1", "d0"] if "bin" in chosen else ["0", "1"])
    (root / beside).unlink()
    assert classes() == numbers


def test_a_link_is_read_again_when_what_it_leads_to_has_changed(tmp_path: Path) -> None:
    target = tmp_path / "target.bmp"
    target.write_bytes(b"one")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.bmp").symlink_to(target)
    first = scan(config(tmp_path / "set"), str(tmp_path / "index"), remember=True)
    target.write_bytes(b"two")
    os.utime(target, (1, 1))
    again = scan(config(tmp_path / "set"), str(tmp_path / "index"), remember=True)
    assert again.fingerprint != first.fingerprint


def test_links_to_folders_are_followed_but_not_into_themselves_and_pipes_are_left_out(
    tmp_path: Path,
) -> None:
    write(tmp_path / "elsewhere", FOLDER)
    folder = write(tmp_path / "set", {"cats/a.png": png(7)})
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    (folder / "cats" / "round").symlink_to(folder / "cats")
    os.mkfifo(folder / "cats" / "pipe.png")
    keys = ["cats/a.png", *(f"linked/{key}" for key in LABELS)]
    got = contents(scan(config(folder, drop_duplicates=False)))
    assert sorted(got) == sorted(keys)
    assert got["linked/e.png"] == FOLDER["e.png"]
    by_glob = scan(config(tmp_path / "s*", drop_duplicates=False))
    assert sorted(by_glob.items["key"].to_pylist()) == sorted(f"set/{key}" for key in keys)


def test_a_server_that_does_not_answer_has_not_said_that_there_are_no_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, IDX)
    fs = type(fsspec.filesystem("file"))
    info = fs.info

    def away(self: Any, path: Any, **how: Any) -> Any:
        if "labels" in str(path) and isinstance(path, str):
            raise ConnectionError("no route to host")
        return info(self, path, **how)

    monkeypatch.setattr(fs, "info", away)
    with pytest.raises(DataError, match="a-labels-idx1-ubyte cannot be read: no route to host"):
        scan(config(tmp_path))
    with pytest.raises(ConnectionError):
        Place(str(tmp_path)).exists("a-labels-idx1-ubyte")


def test_a_file_of_which_it_is_not_known_when_it_was_written_is_not_remembered(
    tmp_path: Path, website: str
) -> None:
    write(tmp_path / "set", FOLDER)
    scan(config(f"{website}/set"), str(tmp_path / "index"), remember=True)
    assert not (tmp_path / "index").exists()


def test_a_scan_that_is_not_to_be_remembered_writes_nothing(tmp_path: Path) -> None:
    scan(config(write(tmp_path / "set", FOLDER)), str(tmp_path / "index"))
    assert not (tmp_path / "index").exists()


def test_a_damaged_memory_of_a_scan_is_made_anew(tmp_path: Path) -> None:
    index = tmp_path / "index"
    first = scan(config(write(tmp_path / "set", FOLDER)), str(index), remember=True)
    (path,) = index.iterdir()
    sound = path.read_bytes()
    for place in range(0, len(sound), 7):
        spoiled = bytearray(sound)
        spoiled[place] ^= 1 << place % 8
        path.write_bytes(spoiled if place % 2 else sound[:place])
        (group,) = items.group_files(*list_files(str(tmp_path / "set")))
        assert items.recall(group, str(index)) is None, place
    again = scan(config(tmp_path / "set"), str(index), remember=True)
    assert again.items.equals(first.items)
    assert path.read_bytes() == sound


def test_an_index_that_cannot_be_read_is_not_taken_for_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan(config(write(tmp_path / "set", FOLDER)), str(tmp_path / "index"), remember=True)

    def refuse(*_: object, **__: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(fsspec.filesystem("file")), "cat_file", refuse)
    with pytest.raises(StorageError, match="permission denied"):
        scan(config(tmp_path / "set"), str(tmp_path / "index"), remember=True)


def test_an_image_file_of_an_unlikely_size_is_bad_and_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(write(tmp_path, FOLDER) / "huge.png", "wb") as file:
        file.truncate(2**30 + 1)
    read_file = Place.read

    def watch(self: Place, name: str) -> bytes:
        assert name != "huge.png"
        return read_file(self, name)

    monkeypatch.setattr(Place, "read", watch)
    source = scan(config(tmp_path))
    assert contents(source)["huge.png"] is None
    assert "it has more than 1,073,741,824 bytes" in source.items["bad"].to_pylist()


def test_a_file_that_changes_after_the_scan_is_noticed(tmp_path: Path) -> None:
    source = scan(config(write(tmp_path, FOLDER)))
    (tmp_path / "e.png").write_bytes(b"another")
    with pytest.raises(DataError, match="'e.png' changed while the source was being read"):
        contents(source)
    (tmp_path / "e.png").unlink()
    with pytest.raises(DataError, match="'e.png' changed while the source was being read"):
        contents(source)


def test_a_name_that_is_no_text_is_a_bad_image(tmp_path: Path) -> None:
    write(tmp_path, FOLDER)
    os.rename(os.fsencode(tmp_path / "e.png"), os.fsencode(tmp_path) + b"/\xff.png")
    source = scan(config(tmp_path))
    bad = {
        key: bad
        for key, bad in zip(
            source.items["key"].to_pylist(), source.items["bad"].to_pylist(), strict=True
        )
        if bad
    }
    assert list(bad) == ["\\udcff.png"]
    assert bad["\\udcff.png"].startswith("the file cannot be read")


def test_images_of_an_archive_keep_its_order(tmp_path: Path) -> None:
    names = ["b.png", "a.png", "10.png", "9.png"]
    data = archive("tar", {name: png(i) for i, name in enumerate(names)})
    (tmp_path / "x.tar").write_bytes(data)
    source = scan(config(tmp_path))
    assert source.items["key"].to_pylist() == [f"x.tar/{name}" for name in names]


def test_an_archive_that_changes_after_the_scan_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(archive("tar", FOLDER))
    source = scan(config(tmp_path))
    (tmp_path / "x.tar").write_bytes(archive("tar", {**FOLDER, "cats/a.png": png(5)}))
    with pytest.raises(DataError, match="changed while the source was being read"):
        contents(source)


def test_a_dangling_link_is_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    (write(tmp_path, FOLDER) / "f.png").symlink_to(tmp_path / "nowhere.png")
    source = scan(config(tmp_path))
    got = contents(source)
    assert got["f.png"] is None
    assert sum(raw is not None for raw in got.values()) == 4
    (bad,) = source.items.filter(pa.compute.equal(source.items["key"], "f.png"))["bad"].to_pylist()
    assert bad.startswith("the file cannot be read")


# --- duplicates ---------------------------------------------------------------------------------


def test_of_equal_images_the_first_is_kept_and_the_others_named(tmp_path: Path) -> None:
    copies = {"cats/z.png": png(0), "dogs/a.png": png(0), "f.png": b"", "g.png": b""}
    write(tmp_path, FOLDER | copies)
    source = scan(config(tmp_path))
    assert source.duplicates == [
        ("cats/z.png", "cats/a.png"),
        ("dogs/a.png", "cats/a.png"),
        ("g.png", "f.png"),
    ]
    assert set(found(source)) == {*LABELS, "f.png"}
    everything = scan(config(tmp_path, drop_duplicates=False))
    assert set(found(everything)) == {*LABELS, "cats/z.png", "dogs/a.png", "f.png", "g.png"}
    assert everything.duplicates == []
    assert everything.fingerprint == source.fingerprint


def test_a_bad_image_is_neither_kept_for_a_sound_one_nor_dropped_for_it(tmp_path: Path) -> None:
    same = {f"{i}.png": png(0) for i in range(4)}
    (tmp_path / "x.tar").write_bytes(archive("tar", {**same, "0.json": b"{", "3.json": b"{"}))
    source = scan(config(tmp_path))
    assert source.duplicates == [("x.tar/2.png", "x.tar/1.png")]
    assert [bool(bad) for bad in source.items["bad"].to_pylist()] == [True, False, True]


def test_images_that_cannot_be_read_are_no_duplicates_of_each_other(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).symlink_to(tmp_path / "nowhere")
    assert len(found(scan(config(tmp_path)))) == 2


# --- input shards -------------------------------------------------------------------------------


def cut_keys(keys: list[str], mean: int) -> list[list[str]]:
    return [keys[run.start : run.stop] for run in runs(keys, mean)]


@pytest.mark.parametrize("mean", [1, 2, 7, 64, 1000])
def test_shards_hold_all_in_order_and_from_half_to_twice_the_mean(mean: int) -> None:
    keys = [f"{i:05d}.png" for i in range(5000)]
    found = cut_keys(keys, mean)
    assert [key for run in found for key in run] == keys
    assert all(max(1, mean // 2) <= len(run) <= 2 * mean for run in found[:-1])
    assert 0 < len(found[-1]) <= 2 * mean
    if mean < 1000:
        assert len(keys) / len(found) == pytest.approx(mean, rel=0.2)
    assert cut_keys([], mean) == []


def test_an_image_more_or_less_changes_only_the_shards_near_it() -> None:
    keys = [f"{i:05d}.png" for i in range(5000)]
    before = {tuple(run) for run in cut_keys(keys, 50)}
    for where in (0, 1234, 4999):
        more = {tuple(run) for run in cut_keys([*keys[:where], f"{where:05d}a", *keys[where:]], 50)}
        less = {tuple(run) for run in cut_keys([*keys[:where], *keys[where + 1 :]], 50)}
        assert len(more - before) <= 4
        assert len(less - before) <= 4


# --- what is there ------------------------------------------------------------------------------


def test_the_builtin_digits_are_the_real_ones() -> None:
    source = scan(DataConfig(source="builtin:digits", image_size=8, channels=1))
    assert source.items.num_rows == 1797
    assert source.class_names == list("0123456789")
    zero = contents(source, 256)["digits/0000"]
    assert isinstance(zero, np.ndarray)
    assert (zero.shape, zero.dtype) == ((8, 8, 1), np.uint8)
    # the first row of the first image of the data set is 0 0 5 13 9 1 0 0 of 16
    assert zero[0, :, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]


@needs.DATA_SET.met_if(needs.FASHION_MNIST.exists())
def test_fashion_mnist_is_read_as_debian_installs_it() -> None:
    from pipeline.config import load_config

    settings = load_config(str(ROOT / "configs" / "fashion_mnist.yaml")).data
    source = scan(settings)
    assert np.bincount(source.items["number"].to_numpy()).tolist() == [6000] * 10
    assert source.duplicates == [], "no image stands twice"
    *_, (item, raw) = read(cut(source, settings.images_per_shard)[-1])
    assert (item.key, source.class_names[item.label or 0]) == ("train/59999", "sandal")
    assert isinstance(raw, np.ndarray)
    assert raw.shape == (28, 28, 1)


def test_the_listing_is_sorted_and_has_no_hidden_files(tmp_path: Path) -> None:
    place, files = list_files(str(write(tmp_path, FOLDER)))
    assert place.uri == str(tmp_path)
    names = [file.name for file in files]
    assert names == sorted(names) == [*sorted(LABELS)[:2], "dogs/c.webp", "dogs/notes.txt", "e.png"]
    assert format_of(place, "a.PNG") is loose
    assert format_of(place, "a.txt") is None


def test_of_a_shard_set_the_parts_are_the_images(tmp_path: Path) -> None:
    about = {"manifest.json": b"", "shards.arrow": b"", "contact_sheet.png": png(0)}
    parts = {"train/part-00000.parquet": b"", "parts/00000.json": b""}
    write(tmp_path / "ID", about | parts)
    write(tmp_path, {"a.png": png(1), "shards.arrow": b"", "my_manifest.json": b""})
    _, files = list_files(str(tmp_path / "ID"))
    assert [file.name for file in files] == sorted(parts)
    _, files = list_files(str(tmp_path))
    assert [file.name for file in files] == [
        *sorted(f"ID/{p}" for p in parts),
        "a.png",
        "my_manifest.json",
        "shards.arrow",
    ]


def test_the_builtin_digits_are_in_no_folder(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": png(0), "digits": b"", "of/ten digits": b""})
    assert set(found(scan(config(tmp_path)))) == {"a.png"}
