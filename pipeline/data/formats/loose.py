"""An image file itself: one image, known by its path."""

from collections.abc import Iterator

from pipeline.data.formats.common import Member
from pipeline.data.place import UNREADABLE, Place, why_unreadable
from pipeline.storage import sha256


def index(place: Place, name: str, hashed: bool = True) -> Iterator[Member]:
    """One member without a name; the label, if it is the folder, is for the reader to see."""
    if not hashed:
        yield Member("", None, "")
        return
    try:
        raw = place.read(name)
    except UNREADABLE as error:
        yield Member("", None, "", bad=f"the file cannot be read ({why_unreadable(error)})")
    else:
        yield Member("", None, sha256(raw))


def read(place: Place, name: str, wheres: list[tuple[int, ...]]) -> Iterator[bytes]:
    with place.explained(name):
        raw = place.read(name)
    for _ in wheres:
        yield raw
