"""Batches: each image once an epoch, the same for any number of workers, from memory or storage."""

import errno
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data import cache as cache_module
from pipeline.data import shard_list
from pipeline.data.augment import Augmentation, augment
from pipeline.data.batches import Batch, Batches, FullShuffle, drop_labels
from pipeline.data.cache import memory_mapped
from pipeline.data.order import WindowedOrder, global_batch
from pipeline.data.parts import Part, Parts, choose, images_at, keys_at, read_parts
from pipeline.data.prefetch import prefetch
from pipeline.data.shards import NO_LABEL, part_path
from pipeline.data.windows import WindowedShuffle
from pipeline.errors import CorruptArtifact, DataError, StorageError
from pipeline.seeding import key, permutation, uniform
from tests import shard_sets
from tests.conftest import wait_for


def numbered(count: int) -> np.ndarray:
    """Images (count, 2, 2, 1) whose four bytes are their number."""
    return np.arange(count, dtype="<i4").view(np.uint8).reshape(count, 2, 2, 1)


def numbers(images: Any) -> list[int]:
    array: np.ndarray = np.ascontiguousarray(images)
    return array.reshape(-1, 4).view("<i4").ravel().tolist()


def label_of(number: int) -> int | None:
    return None if number % 7 == 0 else number % 5


def write_shard_set(folder: str, sizes: list[int], encoding: Any = "raw") -> str:
    """A ShardSet of numbered images, a part of each of these sizes."""
    which = range(sum(sizes))
    labels, keys = [label_of(number) for number in which], [str(number) for number in which]
    images, names = numbered(len(which)), list("abcde")
    return shard_sets.write_shard_set(folder, images, labels, keys, names, sizes, encoding)


def spoil(path: Path, place: float) -> None:
    """Change one bit of a file, so far from its beginning to its end."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 1
    path.write_bytes(bytes(data))


PARTS = [30, 7, 41, 0, 18, 25, 33, 12, 1, 40]
COUNT = sum(PARTS)


@pytest.fixture(scope="module")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shard_set(str(tmp_path_factory.mktemp("shards")), PARTS)


# --- order --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "batch_size"), [(10, 4), (7, 7), (5, 8), (3, 10), (100, 1)])
def test_every_image_is_seen_once_an_epoch_and_no_tail_is_lost(n: int, batch_size: int) -> None:
    stream = np.concatenate([global_batch(0, step, batch_size, n) for step in range(3 * n)])
    for epoch in range(len(stream) // n):
        seen = stream[epoch * n : (epoch + 1) * n]
        # as it has been since the first run: the permutation that belongs to the epoch
        assert np.array_equal(seen, permutation(key(0, "order", epoch), n))
    assert not np.array_equal(stream[:n], stream[n : 2 * n]) or n < 4


def random_orders(count: int) -> Iterator[WindowedOrder]:
    rng = np.random.default_rng(0)
    for seed in range(count):
        groups = rng.integers(0, 20, rng.integers(1, 30))
        groups[rng.integers(len(groups))] += 1  # one image at least
        batch_size = int(rng.choice([1, 2, 6, 8, 24, 60]))
        window = int(rng.integers(1, 200))
        yield WindowedOrder(seed, batch_size, groups, window, int(rng.choice([1, 2, 3, 8, 50])))


def test_a_windowed_order_shows_every_image_once_an_epoch() -> None:
    for order in random_orders(30):
        n = order.num_images
        num_batches = -(-3 * n // order.batch_size)
        stream = np.concatenate([order.batch(step) for step in range(num_batches)])
        for epoch in range(3):
            seen = stream[epoch * n : (epoch + 1) * n]
            assert np.array_equal(np.sort(seen), np.arange(n)), order


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_find_the_rows_of_the_same_windowed_batches(world_size: int) -> None:
    for order in random_orders(30):
        order = replace(order, batch_size=24)
        share = 24 // world_size
        for step in (0, 1, 5, 10**9):
            pieces = [
                piece
                for rank in range(world_size)
                for piece in order.pieces(step, range(rank * share, (rank + 1) * share))
            ]
            found = [order.indices(p.window)[p.start : p.stop] for p in pieces]
            assert np.array_equal(np.concatenate(found), order.batch(step))


def test_a_lane_reads_neighbours_and_moves_on() -> None:
    """The second derivation: of one lane, an epoch is whole row groups, a window at a time."""
    order = WindowedOrder(5, 8, np.full(40, 16), window=64, lanes=1)
    for epoch in range(2):
        steps = range(epoch * 80, (epoch + 1) * 80)
        groups = np.concatenate([order.batch(step) for step in steps]) // 16
        windows = groups.reshape(10, 64)
        for window in windows:
            assert sorted(Counter(window.tolist()).values()) == [16] * 4
            assert not np.array_equal(window, np.sort(window))
        assert len({group for window in windows for group in set(window.tolist())}) == 40
    other = WindowedOrder(6, 8, np.full(40, 16), window=64, lanes=1)
    assert not np.array_equal(order.batch(0), other.batch(0))
    assert not np.array_equal(order.batch(0), order.batch(80))


def test_a_windowed_batch_of_sorted_classes_is_mixed() -> None:
    label = np.arange(8192) // 1024  # each of 8 classes fills 16 row groups in turn
    order = WindowedOrder(0, 64, np.full(128, 64), window=2048, lanes=8)
    classes = [len(set(label[order.batch(step)].tolist())) for step in range(128)]
    assert np.mean(classes) > 7
    narrow = WindowedOrder(0, 64, np.full(128, 64), window=64, lanes=1)
    classes = [len(set(label[narrow.batch(step)].tolist())) for step in range(128)]
    assert max(classes) == 1, "the figure tells a good order from a bad one"


# --- a batch ------------------------------------------------------------------------------------


def full(n: int, batch_size: int, seed: int = 5) -> FullShuffle:
    return FullShuffle(numbered(n), np.arange(n), seed, batch_size)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_the_ranks_share_the_same_global_batch(world_size: int) -> None:
    for step in (0, 2, 1000):
        parts = [Batches(full(10, 8), rank, world_size).at(step) for rank in range(world_size)]
        together = numbers(torch.cat([part.pixels for part in parts]))
        assert together == global_batch(5, step, 8, 10).tolist()
        assert torch.cat([part.labels for part in parts]).tolist() == together
        assert [row for part in parts for row in part.rows] == list(range(8))
        assert {part.step for part in parts} == {step}
        sizes = [len(part.rows) for part in parts]
        assert max(sizes) - min(sizes) <= 1


def test_label_dropout_belongs_to_the_row_and_has_the_stated_frequency() -> None:
    whole = drop_labels(7, 5, range(8), 0.5)
    assert whole.tolist() == [uniform(key(7, "label_dropout", 5, row)) < 0.5 for row in range(8)]
    parts = [Batches(full(10, 8, 7), rank, 2, 0.5).at(5).drop_label for rank in range(2)]
    assert torch.equal(torch.cat(parts), whole)
    share = drop_labels(0, 0, range(20_000), 0.25).double().mean().item()
    assert share == pytest.approx(0.25, abs=0.015)
    assert not drop_labels(0, 0, range(100), 0.0).any()


# --- augmentation -------------------------------------------------------------------------------


def photographs(count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, 6, 5, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("what", "flipped"),
    [
        (Augmentation(horizontal_flip=1.0), np.s_[:, :, ::-1]),
        (Augmentation(vertical_flip=1.0), np.s_[:, ::-1]),
        (Augmentation(horizontal_flip=1.0, vertical_flip=1.0), np.s_[:, ::-1, ::-1]),
    ],
)
def test_a_certain_flip_is_a_mirror(what: Augmentation, flipped: Any) -> None:
    images = photographs(7)
    assert np.array_equal(augment(images, what, 0, 3, 7, range(7)), images[flipped])


def test_flips_have_their_probability_and_leave_the_others_as_they_are() -> None:
    images = photographs(4000)
    got = augment(images, Augmentation(horizontal_flip=0.3), 0, 3, 4000, range(4000))
    flipped = (got == images[:, :, ::-1]).all((1, 2, 3))
    assert flipped.mean() == pytest.approx(0.3, abs=0.03)
    assert np.array_equal(got[~flipped], images[~flipped])


@pytest.mark.parametrize("shift", [1, 3, 8])
def test_a_shift_is_a_crop_of_the_reflected_image(shift: int) -> None:
    images = photographs(300)
    got = augment(images, Augmentation(shift=shift), 2, 0, 300, range(300))
    padded = np.pad(images, [(0, 0), (shift, shift), (shift, shift), (0, 0)], mode="reflect")
    seen = set()
    for image, wide in zip(got, padded, strict=True):
        places = [
            (y - shift, x - shift)
            for y in range(2 * shift + 1)
            for x in range(2 * shift + 1)
            if np.array_equal(wide[y : y + 6, x : x + 5], image)
        ]
        assert places
        seen.add(places[0])
    assert len(seen) > (40 if shift == 3 else 8)  # of 7 x 7, and 3 x 3 or more


def test_augmentation_knows_nothing_of_the_workers_and_varies_by_step() -> None:
    images, what = photographs(8), Augmentation(0.5, 0.5, 2)
    whole = augment(images, what, 1, 4, 8, range(8))
    halves = [augment(images[rows], what, 1, 4, 8, range(8)[rows]) for rows in np.s_[:4, 4:]]
    assert np.array_equal(np.concatenate(halves), whole)
    assert not np.array_equal(augment(images, what, 1, 5, 8, range(8)), whole)
    shuffle = FullShuffle(images, np.arange(8), 1, 8)
    batch = Batches(shuffle, augmentation=what).at(4)
    raw = Batches(shuffle).at(4).pixels.numpy()
    assert np.array_equal(batch.pixels.numpy(), augment(raw, what, 1, 4, 8, range(8)))


def test_an_image_of_one_pixel_survives_augmentation() -> None:
    images = np.array([3, 4], np.uint8).reshape(2, 1, 1, 1)
    assert np.array_equal(augment(images, Augmentation(1.0, 1.0, 2), 0, 0, 2, range(2)), images)


# --- prefetch -----------------------------------------------------------------------------------


def threads() -> list[str]:
    names = ("prefetch", "windows")
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(names)]


@pytest.mark.parametrize(("start", "stop"), [(0, 9), (3, 9), (0, 2), (4, 4)])
def test_prefetched_batches_are_those_of_their_steps(start: int, stop: int) -> None:
    batches = Batches(full(10, 8))
    coming = list(prefetch(batches.at, range(start, stop), depth=3))
    assert [batch.step for batch in coming] == list(range(start, stop))
    for batch in coming:
        assert torch.equal(batch.pixels, batches.at(batch.step).pixels)
    assert threads() == []


class Counted(FullShuffle):
    """Counts what was asked for; step `bad` cannot be read, step `slow` takes half a second."""

    bad = slow = -1
    asked = 0

    def read(self, step: int, rows: range) -> tuple[np.ndarray, np.ndarray]:
        self.asked += 1
        if step == self.bad:
            raise CorruptArtifact("bad")
        time.sleep(0.5 * (step == self.slow))
        return super().read(step, rows)


def test_prefetch_is_ahead_by_its_depth_and_no_further() -> None:
    shuffle = Counted(numbered(10), np.arange(10), 0, 2)
    coming = prefetch(Batches(shuffle).at, range(100), depth=3)
    for _ in range(5):
        next(coming)
    wait_for(lambda: shuffle.asked == 8, "the batches ahead")
    time.sleep(0.05)
    assert shuffle.asked == 8
    coming.close()
    assert threads() == []


def test_a_closed_prefetch_makes_no_more_batches() -> None:
    shuffle = Counted(numbered(10), np.arange(10), 0, 2)
    shuffle.slow = 1
    coming = prefetch(Batches(shuffle).at, range(100), depth=20)
    next(coming)
    coming.close()
    assert shuffle.asked < 21
    assert threads() == []


def test_an_error_is_raised_at_the_batch_that_it_concerns() -> None:
    shuffle = Counted(numbered(10), np.arange(10), 0, 2)
    shuffle.bad = 2
    coming = prefetch(Batches(shuffle).at, range(100))
    assert [next(coming).step, next(coming).step] == [0, 1]
    with pytest.raises(CorruptArtifact, match="bad"):
        next(coming)
    assert threads() == []


# --- single images ------------------------------------------------------------------------------


def test_images_are_read_at_their_indices_in_any_order(shard_set: str) -> None:
    indices = np.array([COUNT - 1, 0, 7, 7, 3])
    got = images_at(shard_set, "train", indices)
    assert numbers(got.images) == indices.tolist()
    want = [NO_LABEL if (label := label_of(i)) is None else label for i in indices.tolist()]
    assert got.labels.tolist() == want
    assert len(images_at(shard_set, "train", np.arange(0))) == 0


def test_all_are_chosen_of_few_and_the_same_ones_of_many() -> None:
    assert choose(5, 5, seed=0).tolist() == [0, 1, 2, 3, 4]
    chosen = choose(1000, 50, seed=0)
    assert (np.diff(chosen) > 0).all()
    assert len(chosen) == 50
    assert 300 < chosen.mean() < 700
    assert np.array_equal(chosen, choose(1000, 50, seed=0))
    assert not np.array_equal(chosen, choose(1000, 50, seed=1))


# --- a cache on the node ------------------------------------------------------------------------


def test_a_cached_split_is_the_split(shard_set: str, tmp_path: Path) -> None:
    images, labels = memory_mapped(shard_set, "train", str(tmp_path))
    assert numbers(images) == list(range(COUNT))
    want = [NO_LABEL if (label := label_of(i)) is None else label for i in range(COUNT)]
    assert labels.tolist() == want
    assert not images.flags.writeable
    (file,) = tmp_path.glob("*/images.npy")
    before = file.stat().st_mtime_ns
    memory_mapped(shard_set, "train", str(tmp_path))
    assert file.stat().st_mtime_ns == before, "it is made once"
    (mapped,) = [
        line for line in Path("/proc/self/maps").read_text().split("\n") if str(file) in line
    ]
    assert " r--s " in mapped, "one copy for all processes"


def test_the_same_parts_are_cached_once_and_others_apart(shard_set: str, tmp_path: Path) -> None:
    """Whatever the folder and id of a ShardSet are: it is the content that counts."""
    same = write_shard_set(str(tmp_path / "same"), PARTS)
    other = write_shard_set(str(tmp_path / "other"), [5, 6], "png")
    for folder in (shard_set, same, other):
        memory_mapped(folder, "train", str(tmp_path / "cache"))
    assert len(list((tmp_path / "cache").glob("*/images.npy"))) == 2
    assert numbers(memory_mapped(other, "train", str(tmp_path / "cache"))[0]) == list(range(11))


def test_a_split_without_images_is_refused(shard_set: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no images in holdout: give it more, or lower"):
        memory_mapped(shard_set, "holdout", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no complete ShardSet"):
        memory_mapped(str(tmp_path), "train", str(tmp_path))


def test_a_damaged_part_is_never_cached(tmp_path: Path) -> None:
    folder = write_shard_set(str(tmp_path / "set"), [400, 400])
    spoil(tmp_path / "set" / part_path("train", 1), 0.15)
    with pytest.raises(CorruptArtifact, match="part-00001.parquet does not match its sha256"):
        memory_mapped(folder, "train", str(tmp_path / "cache"))
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_too_little_room_is_one_sentence_with_remedies(
    shard_set: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = cache_module.shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: usage)
    sentence = (
        rf"need {COUNT * (4 + 8):,} bytes at {tmp_path}, where 100 are free: .*"
        r"cluster\.cache=FOLDER.*training\.shuffle=windowed"
    )
    with pytest.raises(StorageError, match=sentence):
        memory_mapped(shard_set, "train", str(tmp_path))
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written_is_one_sentence_with_remedies(
    shard_set: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    remedy = r"choose another folder with --set cluster\.cache=FOLDER"
    with pytest.raises(StorageError, match=f"a part of the path is a file, not a folder; {remedy}"):
        memory_mapped(shard_set, "train", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"ray-ddpm-cache-{os.getuid()}").write_text("")
    with pytest.raises(StorageError, match=f"cannot make .*: File exists; {remedy}"):
        memory_mapped(shard_set, "train")

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(StorageError, match=f"it is read-only; {remedy}"):
        memory_mapped(shard_set, "train", str(tmp_path / "new"))


def test_a_cache_that_someone_cut_short_is_refused(shard_set: str, tmp_path: Path) -> None:
    memory_mapped(shard_set, "train", str(tmp_path))
    (file,) = tmp_path.glob("*/images.npy")
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(StorageError, match=r"images.npy is not as it was written .*: remove"):
        memory_mapped(shard_set, "train", str(tmp_path))


def test_the_default_folder_belongs_to_this_user_alone(
    shard_set: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    memory_mapped(shard_set, "train")
    (folder,) = tmp_path.iterdir()
    assert folder.name == f"ray-ddpm-cache-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(StorageError, match="is not a folder that this user alone can write to"):
        memory_mapped(shard_set, "train")
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="is not a folder that this user alone can write to"):
        memory_mapped(shard_set, "train")


# --- windows from storage -----------------------------------------------------------------------


@pytest.fixture
def opened() -> Iterator[list[WindowedShuffle]]:
    """Those in this list are closed."""
    shuffles: list[WindowedShuffle] = []
    yield shuffles
    for shuffle in shuffles:
        shuffle.close()
    assert threads() == []


@pytest.mark.parametrize("place", ["local", "memory://windows"])
@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_windows_are_read_as_the_order_says(
    tmp_path: Path, opened: list[WindowedShuffle], place: str, encoding: str
) -> None:
    folder = str(tmp_path) if place == "local" else f"{place}/{encoding}"
    # the last part has three row groups
    parts = read_parts(write_shard_set(folder, [*PARTS, 1100], encoding), "train")
    assert parts.group_sizes.tolist()[-3:] == [512, 512, 76]
    assert parts.group_sizes.tolist() == [size for part in parts for size in part.group_sizes]
    shuffle = WindowedShuffle(parts, 3, 24, 200, 4)
    opened.append(shuffle)
    for step in [*range(2 * (COUNT + 1100) // 24), 10**7, 3]:
        images, labels = shuffle.read(step, range(6, 18))
        want = shuffle.order.batch(step)[6:18].tolist()
        assert numbers(images) == want
        expected = [NO_LABEL if (label := label_of(i)) is None else label for i in want]
        assert labels.tolist() == expected


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_rank_reads_its_share_and_holds_no_more_than_stated(
    opened: list[WindowedShuffle],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    world_size: int,
) -> None:
    read: Counter[tuple[str, int]] = Counter()
    read_group = Part.read_group

    def counted(part: Part, group: int) -> tuple[np.ndarray, np.ndarray]:
        read[part.uri, group] += 1
        return read_group(part, group)

    monkeypatch.setattr(Part, "read_group", counted)
    g, lanes, batch_size, window = 20, 4, 16, 320
    folder = write_shard_set(str(tmp_path), [g] * 96)
    n, share = 96 * g, batch_size // world_size
    shuffle = WindowedShuffle(read_parts(folder, "train"), 1, batch_size, window, lanes)
    opened.append(shuffle)
    bound = lanes // world_size * (2 * (window // lanes + g) + batch_size // lanes)
    most = 0
    for step in range(n // batch_size):
        shuffle.read(step, range(share))
        held = [len(future.result().images) for future in shuffle._held.values()]
        most = max(most, sum(held))
    assert n / 10 / world_size < most <= bound
    # of the next epoch, the first windows; and a row group where a segment begins
    assert set(read.values()) <= {1, 2}
    allowed = 96 / world_size + lanes / world_size * (window / lanes / g + 1) + 1
    assert 96 / world_size <= read.total() <= allowed


def test_a_step_far_away_is_reached_by_reading_its_windows_alone(
    shard_set: str, opened: list[WindowedShuffle]
) -> None:
    straight, jumped = [
        WindowedShuffle(read_parts(shard_set, "train"), 9, 8, 40, 2) for _ in range(2)
    ]
    opened += [straight, jumped]
    for step in range(40):
        images, labels = straight.read(step, range(8))
    again, labels_again = jumped.read(39, range(8))
    assert np.array_equal(again, images)
    assert np.array_equal(labels_again, labels)
    assert len(jumped._held) <= 4


def test_no_part_is_opened_before_an_image_of_it_is_read(tmp_path: Path) -> None:
    folder = write_shard_set(str(tmp_path), [1100, 20])
    (tmp_path / part_path("train", 0)).unlink()
    parts = read_parts(folder, "train")
    assert parts.num_images.tolist() == [1100, 20]
    assert parts.group_sizes.tolist() == [512, 512, 76, 20]
    images, _ = parts.read_group(3)
    assert numbers(images) == list(range(1100, 1120))
    assert keys_at(parts, np.array([1119, 1101])) == ["1119", "1101"]
    assert numbers(images_at(folder, "train", np.array([1107])).images) == [1107]
    with pytest.raises(CorruptArtifact, match=r"part-00000.parquet is missing: delete"):
        parts.read_group(2)


def test_a_part_of_another_size_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    folder = write_shard_set(str(tmp_path), [20, 20])
    path = tmp_path / part_path("train", 1)
    size = path.stat().st_size
    os.truncate(path, size - 10)
    parts = read_parts(folder, "train")
    parts.read_group(0)
    why = f"00001.parquet has {size - 10:,} bytes, the list of shards says {size:,}"
    with pytest.raises(CorruptArtifact, match=why):
        parts.read_group(1)


def test_a_part_with_other_images_than_the_list_says_is_refused(tmp_path: Path) -> None:
    folder = write_shard_set(str(tmp_path), [20, 20])
    shards = shard_list.read(folder)
    column = shards.schema.get_field_index("train_images")
    parts = Parts(folder, "train", shards.set_column(column, "train_images", [[21, 20]]))
    with pytest.raises(CorruptArtifact, match=r"has 20 images, the list of shards says 21: delete"):
        parts.read_group(0)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: spoil(path, 0.5), "does not match its sha256 in the manifest"),
    ],
)
def test_a_damaged_list_of_shards_is_refused(tmp_path: Path, damage: Any, why: str) -> None:
    folder = write_shard_set(str(tmp_path), [20, 20])
    damage(tmp_path / shard_list.SHARDS)
    with pytest.raises(CorruptArtifact, match=f"shards.arrow {why}: delete"):
        read_parts(folder, "train")


@pytest.mark.parametrize("place", [0.15, 0.999])
def test_a_part_that_changed_in_place_is_noticed_when_it_is_read(
    tmp_path: Path, opened: list[WindowedShuffle], place: float
) -> None:
    folder = write_shard_set(str(tmp_path), [400])
    spoil(tmp_path / part_path("train", 0), place)
    with pytest.raises(CorruptArtifact, match=r"part-00000.parquet is damaged \("):
        opened.append(WindowedShuffle(read_parts(folder, "train"), 0, 8, 40, 2))
        opened[0].read(0, range(8))


def test_an_error_of_the_store_is_not_taken_for_damage(
    shard_set: str, opened: list[WindowedShuffle], monkeypatch: pytest.MonkeyPatch
) -> None:
    shuffle = WindowedShuffle(read_parts(shard_set, "train"), 0, 8, 40, 2)
    opened.append(shuffle)

    class Gone(Exception):
        pass

    def gone(uri: str) -> None:
        raise Gone("the connection was reset")

    monkeypatch.setattr("pipeline.data.parts._open", gone)
    with pytest.raises(StorageError, match=r"cannot read .*: the connection was reset"):
        shuffle.read(0, range(8))


def test_windowed_batches_resume_at_any_step_and_leave_no_thread(shard_set: str) -> None:
    def run(start: int) -> list[Batch]:
        shuffle = WindowedShuffle(read_parts(shard_set, "train"), 4, 8, 64, 4)
        batches = Batches(shuffle, 1, 2, 0.5, Augmentation(0.5, 0.0, 1))
        try:
            return list(prefetch(batches.at, range(start, 80)))
        finally:
            shuffle.close()

    whole, tail = run(0), run(33)
    for a, b in zip(whole[33:], tail, strict=True):
        assert torch.equal(a.pixels, b.pixels)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.drop_label, b.drop_label)
    assert threads() == []
