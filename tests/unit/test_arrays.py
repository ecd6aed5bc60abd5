"""Arrays of images as a source: IDX, CIFAR and NumPy's files."""

import gzip
import io
from collections.abc import Callable

import numpy as np
import pytest

from pipeline.data.formats import arrays, cifar, idx
from pipeline.data.place import Place
from pipeline.storage import sha256
from tests.unit.formats import (
    CLASSES,
    COLOUR,
    CRC,
    FLAGS,
    GREY,
    IMAGES,
    LABELS,
    PHOTOS,
    PNG,
    RNG,
    TEN,
    bad,
    central,
    check,
    check_refused,
    cifar_bytes,
    contents,
    idx_bytes,
    labels,
    look,
    npy,
    npz,
    numbered,
    put,
    zipped,
)

# --- IDX ------------------------------------------------------------------------------------------

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
            f"{IMAGES} is truncated: it ends in row 10, and its header announces 11 x 6 x 5",
        ),
        ({IMAGES: idx_bytes(GREY) + b"\0"}, f"{IMAGES} is damaged: it goes on behind its end"),
        ({LABELS: idx_bytes(CLASSES) + b"\0"}, f"{LABELS} is damaged: it goes on behind its end"),
        ({LABELS: idx_bytes(CLASSES)[:-1]}, f"{LABELS} is truncated: it ends in row 10"),
        (
            {IMAGES: bytes([0, 0, 8, 3]) + b"\xff" * 12 + bytes(9)},
            "has images of 18446744065",
        ),
        (
            {LABELS: idx_bytes(CLASSES[:-1])},
            f"{IMAGES} has 11 images, but {LABELS} has 10 labels: the two files do not belong",
        ),
        ({IMAGES: idx_bytes(GREY[:0]), LABELS: idx_bytes(CLASSES[:0])}, "holds no image"),
        ({IMAGES: idx_bytes(GREY[:, :0])}, "holds no image: its header announces 11 x 0 x 5"),
    ],
)
def test_a_damaged_idx_file_is_refused_in_one_sentence(
    local: Place, files: dict[str, bytes], sentence: str
) -> None:
    sound = {IMAGES: idx_bytes(GREY), LABELS: idx_bytes(CLASSES)}
    check_refused(idx, local, IMAGES, sound | files, sentence)


@pytest.mark.parametrize("damaged", [gzip.compress(idx_bytes(GREY), mtime=0)[:100], b"no gzip"])
@pytest.mark.parametrize("name", [f"{IMAGES}.gz", f"{LABELS}.gz"])
def test_a_damaged_gz_is_named(local: Place, damaged: bytes, name: str) -> None:
    files = {f"{IMAGES}.gz": idx_bytes(GREY), f"{LABELS}.gz": idx_bytes(CLASSES)}
    packed = {other: gzip.compress(data, mtime=0) for other, data in files.items()}
    if name.startswith(LABELS):
        damaged = packed[name][:-9] if damaged.startswith(b"\x1f") else damaged
    sentence = f"{name} is truncated or damaged"
    check_refused(idx, local, f"{IMAGES}.gz", packed | {name: damaged}, sentence)


# --- CIFAR ----------------------------------------------------------------------------------------

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
def test_a_bin_file_of_another_size_is_refused(local: Place, data: bytes) -> None:
    sentence = rf"a.bin has {len(data)} bytes, no multiple of 3073 \(CIFAR"
    check_refused(cifar, local, "a.bin", {"a.bin": data}, sentence)


@pytest.mark.parametrize("names", ["\n".join(TEN[:9]), "\n".join(["a"] * 10), "\udcff"])
def test_names_of_classes_that_do_not_fit_are_refused(local: Place, names: str) -> None:
    other = {"batches.meta.txt": names.encode("utf-8", "surrogateescape")}
    sentence = r"batches.meta.txt (has \d names|is truncated or damaged)"
    check_refused(cifar, local, "a.bin", {"a.bin": cifar_bytes([0] * 5)} | other, sentence)


# --- NumPy ----------------------------------------------------------------------------------------

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
        (npy(GREY)[:-1], "is truncated: it ends in row 10, and its header announces 11 x 6 x 5"),
        (npy(GREY) + b"x", "is damaged: it goes on behind its end"),
    ],
)
def test_another_npy_is_refused_in_one_sentence(local: Place, data: bytes, sentence: str) -> None:
    check_refused(arrays, local, "a.npy", {"a.npy": data}, f"a.npy {sentence}")


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
        (central(npz(x=GREY), FLAGS, b"\1"), "is truncated or damaged .File .*is encrypted"),
        (central(npz(x=GREY), CRC, b"\1\2\3\4"), "is truncated or damaged .Bad CRC-32"),
        (zipped({"x.npy": npy(GREY)[:-1]}), "is truncated: it ends in row 10"),
        (
            zipped({"x.npy": npy(GREY), "y.npy": npy(CLASSES) + b"\0"}),
            "y.npy is damaged: it goes on behind its end",
        ),
    ],
)
def test_another_npz_is_refused_in_one_sentence(local: Place, data: bytes, sentence: str) -> None:
    check_refused(arrays, local, "a.npz", {"a.npz": data}, f"a.npz.*{sentence}")
