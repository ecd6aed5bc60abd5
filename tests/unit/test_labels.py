"""Labels that stand in a file of their own."""

from pathlib import Path

import fsspec
import pytest

from pipeline.data.labels import find_label, read_labels
from pipeline.errors import DataError, StorageError

NAMES = {"a.png": "cat", "b/c.png": "dog"}


@pytest.mark.parametrize(
    ("name", "text", "labels"),
    [
        ("l.csv", "file,label\na.png,cat\nb/c.png,dog\n", NAMES),
        ("l.csv", "a.png,cat\nb/c.png,dog\n", NAMES),
        ("l.csv", '\ufeffclass,width,file_name\n cat ,3,a.png\n"dog",4,b/c.png\n\n', NAMES),
        ("l.tsv", "id\tcategory\na.png\tcat\nb/c.png\tdog\n", NAMES),
        ("l.csv", "a.png,0\nb.png,12\n", {"a.png": 0, "b.png": 12}),
        ("l.csv", "a.png,0\nb.png,1a\n", {"a.png": "0", "b.png": "1a"}),
        ("l.json", '{"a.png": "cat", "b/c.png": "dog"}', NAMES),
        ("l.json", '{"labels": [["a.png", 3], ["b.png", 0]]}', {"a.png": 3, "b.png": 0}),
        ("l.json", '{"labels": {"a.png": 3}}', {"a.png": 3}),
        ("l.json", '[{"file": "a.png", "label": 1, "x": 0}, {"file": "b.png"}]', {"a.png": 1}),
        ("l.jsonl", '{"file_name": "a.png", "label": "cat"}\n\n', {"a.png": "cat"}),
    ],
)
def test_each_form_of_a_label_file_is_read(
    tmp_path: Path, name: str, text: str, labels: dict[str, int | str]
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_labels(str(tmp_path / name)) == labels


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("l.csv", "", "it is empty"),
        ("l.csv", "file,kind,x\na.png,1,2\n", "none of its columns file, kind, x is named label"),
        ("l.csv", "what,label\na.png,1\n", "none of its columns what, label is named file"),
        ("l.csv", "file,label\na.png\n", "the line 'a.png' has too few columns"),
        ("l.csv", "a.png,cat\na.png,dog\n", "'a.png' stands twice, as 'cat' and as 'dog'"),
        ("l.csv", "file,label\n", "it holds no label"),
        ("l.csv", "a.png,\nb.png,x\n", "a label is a number from 0 or a class's name"),
        ("l.json", '{"a.png": -1}', "'a.png' has the label -1"),
        ("l.json", '{"a.png": 1.5}', "'a.png' has the label 1.5"),
        ("l.json", '{"a.png": true}', "is not a file's name and its label"),
        ("l.json", "[1, 2]", "neither {name: label} nor a list"),
        ("l.json", "{", "Expecting property name"),
        ("l.txt", "a.png,1", "ends in none of .csv, .tsv, .json and .jsonl"),
        ("l.csv", "\udcff", "is not UTF-8 text"),
    ],
)
def test_a_label_file_that_cannot_be_used_is_refused_in_one_sentence(
    tmp_path: Path, name: str, text: str, sentence: str
) -> None:
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError) as refused:
        read_labels(str(tmp_path / name))
    assert sentence in str(refused.value)
    assert str(refused.value).startswith("data.labels=")
    assert "\n" not in str(refused.value)


def test_a_label_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="labels.csv' does not exist"):
        read_labels(str(tmp_path / "labels.csv"))


def test_an_image_is_found_by_its_path_or_its_name_with_or_without_suffix() -> None:
    labels: dict[str, int | str] = {"x/a.png": 1, "x/b": 2, "c.png": 3, "d": 4, "e.v1": 5}
    found = [find_label(labels, key) for key in ("x/a.png", "x/b.jpg", "y/c.png", "y/d.webp")]
    assert found == [1, 2, 3, 4]
    assert find_label(labels, "e.v1.png") == 5
    assert find_label(labels, "x.y/e") is None
    assert find_label(labels, "z/a.png") is None


def test_labels_that_may_not_be_read_are_named_with_their_own_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> bytes:
        raise PermissionError(13, "Permission denied")  # root may read all

    monkeypatch.setattr(type(fsspec.filesystem("file")), "cat_file", refuse)
    with pytest.raises(StorageError, match=r"permission denied; .* --set data\.labels=FILE"):
        read_labels(str(tmp_path / "l.csv"))
