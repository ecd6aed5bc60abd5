"""Images on a Hugging Face Hub: read by huggingface_hub's own client, from a server of ours."""

import io
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec.config
import numpy as np
import pytest
from fsspec.registry import _registry, known_implementations
from PIL import Image

from pipeline import storage
from pipeline.data import place
from pipeline.data.config import DataConfig
from pipeline.data.input_shards import cut, read
from pipeline.data.listing import absolute
from pipeline.data.source import Source, scan
from pipeline.errors import DataError
from tests import needs
from tests.hub import Hub

huggingface_hub = needs.package("huggingface_hub", "interop")

CLASSES = ("cat", "dog", "owl")
NUM_FILES = 36
LOGIN = "what is private there needs a token: run hf auth login, or set HF_TOKEN"


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(folder: Path) -> None:
    for i in range(NUM_FILES):
        path = folder / CLASSES[i % 3] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))


def write_parquet(path: Path, seeds: range) -> None:
    """As `datasets` writes it, in row groups of 16."""
    datasets = needs.package("datasets", "interop")
    datasets.disable_progress_bars()
    columns = {"image": [png(i) for i in seeds], "label": [i % 3 for i in seeds]}
    names = datasets.ClassLabel(names=list(CLASSES))
    features = datasets.Features({"image": datasets.Image(), "label": names})
    path.parent.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path), batch_size=16)


def write_tar(path: Path) -> None:
    """Samples of a WebDataset."""
    with tarfile.open(path, "w") as archive:
        for i in range(200, 220):
            for suffix, data in (("png", png(i)), ("cls", b"%d" % (i % 3))):
                info = tarfile.TarInfo(f"{i}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A repository of loose images, with what else such a repository has."""
    root = tmp_path / "repository"
    write_images(root / "train")
    (root / ".gitattributes").write_text("*.parquet filter=lfs")
    (root / "README.md").write_text("# A data set")
    return root


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with it, which this process takes for the only one."""
    server = Hub(folder, page=10)
    settings = {"endpoint": server.endpoint, "token": False}
    monkeypatch.setitem(fsspec.config.conf, "hf", settings)
    yield server
    huggingface_hub.close_session()
    server.close()
    as_a_new_process()


def as_a_new_process() -> None:
    """Forget what earlier calls saw, as a Ray worker does not know it."""
    huggingface_hub.HfFileSystem.clear_instance_cache()
    place._open.cache_clear()


def config(source: object, **more: Any) -> DataConfig:
    return DataConfig(source=str(source), image_size=8, channels=3, **more)


def contents(source: Source) -> list[Any]:
    """(item, bytes) of all images, read in shards."""
    return [pair for shard in cut(source, 10) for pair in read(shard)]


def check(remote: Source, local: Source, count: int) -> None:
    """They are the same but for their place."""
    assert remote.items.num_rows == count
    assert remote.items.equals(local.items)
    assert remote.class_names == local.class_names
    assert remote.fingerprint == local.fingerprint
    assert contents(remote) == contents(local)


# --- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["train", "train/*/0[01]*.png", "train/dog/001.png"])
def test_image_files_on_a_hub_are_those_of_the_folder(hub: Hub, folder: Path, source: str) -> None:
    count = {"train": NUM_FILES, "train/dog/001.png": 1}.get(source, 20)
    check(scan(config(f"{hub.uri}/{source}")), scan(config(folder / source)), count)


def test_a_repository_with_archives_is_that_of_the_folder(hub: Hub, folder: Path) -> None:
    for path in sorted(folder.rglob("*.png")):
        path.unlink()
    write_tar(folder / "samples.tar")
    numbered = scan(config(f"{hub.uri}/samples.tar"))
    check(numbered, scan(config(folder / "samples.tar")), 20)
    assert numbered.class_names == ["0", "1", "2"]
    write_parquet(folder / "data" / "train-00000-of-00002.parquet", range(100, 140))
    write_parquet(folder / "data" / "train-00001-of-00002.parquet", range(140, 150))
    named = scan(config(f"{hub.uri}/data/train-*.parquet"))
    check(named, scan(config(folder / "data/train-*.parquet")), 50)
    assert named.class_names == list(CLASSES)
    (folder / "samples.tar").unlink()
    check(scan(config(hub.uri)), scan(config(folder)), 50)
    assert any(path.startswith("/lfs/data/train-00001") for path in hub.requests)


def test_a_listing_of_several_pages_is_followed_to_its_end(hub: Hub) -> None:
    scan(config(f"{hub.uri}/train"))
    pages = [path for path in hub.listings() if "recursive=true" in path]
    assert [re.sub(r".*cursor=", "", path) for path in pages[1:]] == ["10", "20", "30"]


def test_a_revision_and_a_file_of_labels_are_found_on_the_hub(hub: Hub, folder: Path) -> None:
    (folder / "labels.csv").write_text("file,label\n000.png,tabby\n001.png,poodle\n")
    labels = f"{hub.uri}/labels.csv"
    source = scan(config(f"{hub.uri}@main/train", labels=labels))
    assert source.class_names == ["poodle", "tabby"]
    check(source, scan(config(folder / "train", labels=labels)), NUM_FILES)
    with pytest.raises(DataError, match=r"@dev/train' does not exist"):
        scan(config(f"{hub.uri}@dev/train"))


def test_a_new_process_lists_a_folder_once_and_not_with_each_of_its_threads(hub: Hub) -> None:
    source = scan(config(f"{hub.uri}/train/owl"))
    as_a_new_process()
    hub.requests.clear()
    (shard,) = cut(source, 100)
    assert len(list(read(shard))) == NUM_FILES // 3
    # 12 entries in pages of 10
    assert len(hub.listings()) == 2
    assert Counter(hub.reads()).most_common(1)[0][1] == 1
    assert len(hub.requests) == 2 + NUM_FILES // 3 + 1


# --- what is remembered -------------------------------------------------------------------------


def test_a_second_scan_of_a_hub_reads_only_what_changed(
    hub: Hub, folder: Path, tmp_path: Path
) -> None:
    write_parquet(folder / "data" / "train.parquet", range(100, 120))
    index = storage.absolute(str(tmp_path / "index"))
    first = scan(config(hub.uri), index, remember=True)
    # an image is read with one request, and of the Parquet file the footer and the row groups
    assert set(hub.reads()) >= {"data/train.parquet", "train/cat/000.png"}
    hub.requests.clear()
    again = scan(config(hub.uri), index)
    assert hub.reads() == []
    assert again.fingerprint == first.fingerprint
    # of another size: what this process remembers of the old one would cut it short
    write_parquet(folder / "data" / "train.parquet", range(100, 180))
    changed = scan(config(hub.uri), index)
    assert set(hub.reads()) == {"data/train.parquet"}
    check(changed, scan(config(folder)), NUM_FILES + 80)


def test_an_image_that_changes_between_scan_and_reading_is_noticed(hub: Hub, folder: Path) -> None:
    source = scan(config(f"{hub.uri}/train"))
    (folder / "train" / "cat" / "003.png").write_bytes(png(999))
    with pytest.raises(DataError, match="the image 'cat/003.png' changed while the source was"):
        contents(source)


# --- what goes wrong ----------------------------------------------------------------------------


def refused(source: str) -> str:
    """The sentence with which a source is refused."""
    with pytest.raises(DataError) as error:
        scan(config(source))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_not_on_the_hub_or_may_not_be_seen_is_one_sentence(hub: Hub) -> None:
    for source in (f"{hub.uri}-not", f"{hub.uri}/nothing", f"{hub.uri}/train/nothing.png"):
        sentence = refused(source)
        assert sentence.startswith(f"data.source='{source}' does not exist: give a folder, an")
        assert sentence.endswith(LOGIN)
    assert "matches no file: mend the pattern" in refused(f"{hub.uri}/train/*.jpg")
    hub.token = "hf_secret"
    sentence = refused(hub.uri)
    assert "does not exist" in sentence
    assert sentence.endswith(LOGIN)
    assert "(repository not found)" in refused(f"{hub.uri}/*/*.png")


def test_a_gated_repository_says_so_at_the_first_file(hub: Hub) -> None:
    hub.gated = True
    sentence = refused(f"{hub.uri}/train")
    assert re.search(
        r"train/cat/000.png cannot be read: 401 .* gated repo .* You must have", sentence
    )


@pytest.mark.parametrize("status", [403, 500])
def test_an_error_of_the_hub_is_not_taken_for_absence(hub: Hub, status: int) -> None:
    hub.wrong = lambda path: status
    sentence = refused(f"{hub.uri}/train")
    assert re.search(rf"cannot be read: .*{status} .*; check that it can be reached", sentence)
    assert sentence.endswith(LOGIN)


def test_a_hub_that_is_away_is_one_sentence(hub: Hub) -> None:
    hub.close()
    sentence = refused(f"{hub.uri}/train")
    assert re.search(r"/train' cannot be read: .*refused; check that it can be reached", sentence)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds for which the client would have waited before it asked again."""
    seconds: list[float] = []
    clock = SimpleNamespace(sleep=seconds.append)
    monkeypatch.setattr("huggingface_hub.utils._http.time", clock)
    return seconds


def test_a_hub_that_is_busy_is_asked_again(hub: Hub, folder: Path, waits: list[float]) -> None:
    seen: set[str] = set()

    def first_of_each(path: str) -> int:
        new = path not in seen and ("/resolve/" in path or "/tree/" in path)
        seen.add(path)
        return (429, 503)[len(seen) % 2] if new else 0

    hub.wrong = first_of_each
    check(scan(config(f"{hub.uri}/train")), scan(config(folder / "train")), NUM_FILES)
    assert len(waits) >= NUM_FILES


def test_a_hub_that_fails_for_good_while_files_are_read_is_given_up(
    hub: Hub, waits: list[float]
) -> None:
    source = scan(config(f"{hub.uri}/train"))
    hub.wrong = lambda path: 503
    with pytest.raises(DataError, match=r"000.png cannot be read: .*503.*; run the same command"):
        list(read(cut(source, 100)[0]))
    assert 10 < sum(waits) < 60


def test_without_its_package_a_hub_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    missing = {
        "class": "a_package_that_is_not_there.HfFileSystem",
        "err": "Install huggingface_hub to access HfFileSystem",
    }
    monkeypatch.setitem(known_implementations, "hf", missing)
    monkeypatch.delitem(_registry, "hf", raising=False)
    sentence = refused("hf://datasets/owner/set")
    assert sentence == (
        "data.source='hf://datasets/owner/set' cannot be read: "
        "Install huggingface_hub to access HfFileSystem"
    )
    with pytest.raises(DataError, match="Install huggingface_hub"):
        absolute("hf://datasets/owner/set")
