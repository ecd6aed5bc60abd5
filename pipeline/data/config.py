"""Which images, and the form in which they are stored: the section `data` of a config."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

SCANNED = frozenset({"source", "labels"})
"""Keys of DataConfig that say only where images and labels are. A scan finds what they are, and a
hash of that is what outputs depend on in their place; see `Source.fingerprint`."""
NOT_IN_PARTS = SCANNED | {"class_names", "max_bad_fraction", "images_per_shard"}
"""Keys of DataConfig that make no difference to what becomes of the items of a shard. Any other
key, a new one too, makes parts and their ShardSet different ones."""
MAX_SHARD_BYTES = 2**30
"""Decoded pixels of a shard. A task holds them once, a second time while it writes them, encoded, a
third time if they are encoded as PNG, and once more if the storage is remote."""


class DataConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """Which images, and the form in which they are stored."""

    source: str = Field(min_length=1)
    """A folder, an archive, or a glob of either, as a path or fsspec URI; or `builtin:digits`.
    Each file is read as what its name says: pipeline/data/formats/choice.py."""
    labels: str | None = None
    """A .csv, .tsv, .json or .jsonl file with the label of each image, used instead of the labels
    that the source itself has."""
    class_names: Annotated[tuple[str, ...], Field(strict=False)] | None = None
    """Names of the classes in the order of their numbers, used instead of the source's own; for
    sources whose labels are numbers."""
    image_size: int = Field(ge=4, le=4096)
    """Height and width of a training image in pixels."""
    channels: Literal[1, 3]
    """1 for grey, 3 for RGB."""
    resize: Literal["crop", "exact"] = "crop"
    """crop: the shorter side is resized to image_size, and the centre is kept. exact: both sides
    are resized to it."""
    min_size: int = Field(default=0, ge=0)
    """Images whose shorter side has fewer pixels are left out."""
    max_aspect: float = Field(default=100.0, ge=1.0, allow_inf_nan=False)
    """Images whose longer side is more than this many times the shorter are left out."""
    drop_duplicates: bool = True
    """Whether only the first of several images with the same content is kept."""
    encoding: Literal["raw", "png"] = "raw"
    """How the Parquet parts hold the pixels. raw is read fastest; png is smaller, and other
    programs show it as an image."""
    holdout: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the images that training never sees, chosen by the hash of their path."""
    max_bad_fraction: float = Field(default=0.01, ge=0.0, le=1.0)
    """The stage stops if a larger share of the images cannot be used."""
    images_per_shard: int = Field(default=512, ge=1)
    """Images of a shard, the piece that one task prepares; a shard has between half and twice as
    many."""

    @model_validator(mode="after")
    def _a_shard_fits_in_memory(self) -> "DataConfig":
        largest = MAX_SHARD_BYTES // (2 * self.image_size**2 * self.channels)
        if self.images_per_shard > max(1, largest):
            raise ValueError(
                f"images_per_shard={self.images_per_shard} images of {self.image_size} pixels a "
                f"side are too much for the memory of one task: use at most {max(1, largest)}"
            )
        return self

    @field_validator("class_names")
    @classmethod
    def _names_differ(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if twice := [name for name in names or () if (names or ()).count(name) > 1]:
            raise ValueError(f"the name {twice[0]!r} stands twice, and a request could not tell")
        return names
