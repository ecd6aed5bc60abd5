"""An image is its recipe: what is written into every file, and read back to make it again."""

import io
import json
import platform
from typing import Literal

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, Field, ValidationError

from pipeline.data.images import png, to_pil
from pipeline.errors import DataError
from pipeline.samplers.config import SamplingConfig
from pipeline.sentences import first_mistake
from pipeline.serving.config import EXACT_ROWS, Mode
from pipeline.serving.engine import ImageRequest

Format = Literal["png", "webp"]
"""Of an image file; both hold the pixels as they are."""
PNG_KEY = "ddpm"
WEBP_TAG = 0x010E  # EXIF's ImageDescription; WebP has no text of its own


class Recipe(BaseModel, frozen=True, extra="forbid"):
    """All that the pixels of an image are a function of."""

    model: str
    """Where the model was found, e.g. `digits@7`; the digest says which it is."""
    model_digest: str
    seed: int
    index: int
    label: int | None
    sampling: SamplingConfig
    mode: Mode = "exact"
    rows: int = Field(default=EXACT_ROWS, ge=2, le=1024)
    made_with: dict[str, str] = {}
    """Software and processor. On others the pixels may differ in the last bit of a value."""

    def request(self) -> ImageRequest:
        return ImageRequest(self.seed, self.index, self.label, self.sampling)


def fingerprint(device: str = "cpu") -> dict[str, str]:
    """What, beside the recipe, decides how a float is rounded."""
    processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    if device == "cuda":
        processor = torch.cuda.get_device_name()
    return {"torch": torch.__version__, "processor": processor, "device": device}


def encode(pixels: np.ndarray, recipe: Recipe, format: Format = "png") -> bytes:
    """(H, W, C) uint8 as a file that carries its recipe."""
    if format == "png":
        return png(pixels, {PNG_KEY: recipe.model_dump_json()})
    exif = Image.Exif()
    exif[WEBP_TAG] = json.dumps(recipe.model_dump(mode="json"))  # in ASCII, as EXIF is
    buffer = io.BytesIO()
    to_pil(pixels).save(buffer, format="WEBP", lossless=True, exif=exif)
    return buffer.getvalue()


def decode(data: bytes, name: str) -> tuple[np.ndarray, Recipe]:
    """The pixels (H, W, C) uint8 and the recipe of a file made by `encode`.

    WebP has no grey images: there they have three equal channels.

    Raises:
        DataError: it is not such a file, or carries no recipe.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=["PNG", "WEBP"])
        image.load()
        text = image.info.get(PNG_KEY) or image.getexif().get(WEBP_TAG)
    except Exception as error:  # Pillow raises a dozen types on damaged files
        raise DataError(f"{name} is not an image that can be read") from error
    if text is None:
        raise DataError(
            f"{name} carries no recipe: it was not made by ddpm, or was saved anew since"
        )
    try:
        recipe = Recipe.model_validate_json(text)
    except ValidationError as error:
        raise DataError(f"the recipe in {name} cannot be read: {first_mistake(error)}") from error
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels, recipe
