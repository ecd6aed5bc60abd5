"""Pixels: decoding files to uint8, and uint8 to the [-1, 1] that the network sees."""

import io
import warnings
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

if TYPE_CHECKING:  # a worker that decodes needs no torch, which takes 1.4 s and 180 MB
    from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""No others: some that Pillow knows start other programs."""
MAX_PIXELS = 100_000_000
"""An image that claims more is refused before it is decoded. Pillow holds 4 bytes a pixel, and as
much again where it must change its mode; its WebP decoder takes 12, which makes 1.2 GB."""
TOO_LARGE = f"it has more than {MAX_PIXELS:,} pixels"
BAND_PIXELS = 2**20
"""A large image changes its mode in bands of so many pixels, since each step takes a copy."""

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What an EXIF orientation asks for; from 5 on, the sides change places."""


class BadImage(Exception):
    """An image that cannot be used, with the reason."""


class Decoded(NamedTuple):
    """An image in the form in which it is stored, and how large it was."""

    pixels: np.ndarray
    """(image_size, image_size, channels) uint8"""
    width: int
    """Of the source in pixels, as it is shown: after the rotation that its EXIF asks for."""
    height: int


def decode(
    raw: bytes | np.ndarray,
    image_size: int,
    channels: int,
    resize: Literal["crop", "exact"] = "crop",
) -> Decoded:
    """An encoded file or (H, W, C) uint8 pixels, as a square image of one size.

    The first frame, rotated as its EXIF says, transparent parts over white; the kind of file is
    told by its content. Resized with antialiasing (bicubic): `crop` brings the shortest side to
    `image_size` and keeps the centre, `exact` brings both sides to it. An image that has the size
    already keeps its pixels.

    Args:
        channels: 1 for grey, 3 for RGB.

    Raises:
        BadImage: it cannot be decoded, or is unreasonably large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what is checked here
            image = _from_array(raw) if isinstance(raw, np.ndarray) else _open(raw)
            return _decode(image, image_size, "L" if channels == 1 else "RGB", resize)
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage(
            "it is not a PNG, JPEG, WebP, GIF, BMP or TIFF image, or its header is damaged"
        ) from error
    except Image.DecompressionBombError as error:  # Pillow's own limit, in Image.open
        raise BadImage(TOO_LARGE) from error
    except Exception as error:  # Pillow's decoders raise a dozen types on damaged files
        raise BadImage(f"cannot be decoded: {error or type(error).__name__}") from error


def _open(raw: bytes) -> Image.Image:
    if not raw:
        raise BadImage("the file is empty")
    image = Image.open(io.BytesIO(raw), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(TOO_LARGE)
    return image


def _from_array(pixels: np.ndarray) -> Image.Image:
    if pixels.ndim != 3 or pixels.shape[-1] not in (1, 2, 3, 4) or not pixels.size:
        raise BadImage(f"its shape is {pixels.shape}, not (height, width, 1 to 4 channels)")
    if pixels.dtype != np.uint8:
        raise BadImage(f"its pixels are {pixels.dtype}, not uint8")
    return to_pil(pixels)


def _decode(image: Image.Image, image_size: int, mode: str, resize: str) -> Decoded:
    size = image.size
    # A JPEG is decoded at a half, a quarter or an eighth of its size where that leaves twice what
    # is asked for. From 256 pixels to 64 that is 1.7 times as fast as decoding it whole, from 512
    # 3.5 times, and the pixels differ by 0.3 to 0.4 of 255 on average, by at most 9. To decode at
    # once near the size itself doubles the speed again, with differences of up to 23. simplejpeg
    # gives the same pixels 1.1 to 1.4 times as fast: not worth a second decoder. Measured by
    # tests/benchmarks/preprocess.py --decoders.
    reduced = image.draft(mode, (2 * image_size, 2 * image_size))
    image.load()
    width, height = size if reduced else image.size  # loading may turn a TIFF
    full_w, full_h = reduced[1][2:] if reduced else (width, height)
    kept_w, kept_h = [min(full_w, full_h)] * 2 if resize == "crop" else (full_w, full_h)
    left, top = (full_w - kept_w) / 2, (full_h - kept_h) / 2
    box = (left, top, left + kept_w, top + kept_h)

    orientation = _orientation(image)
    image = _to_mode(image, mode)
    target = (image_size, image_size)
    if image.size != target:
        image = image.resize(target, Image.Resampling.BICUBIC, box=box)
    if orientation in UPRIGHT:  # a square: it may be turned after it was cropped
        image = image.transpose(UPRIGHT[orientation])
    if orientation >= 5:
        width, height = height, width
    pixels = np.asarray(image, np.uint8).reshape(image_size, image_size, -1)
    return Decoded(pixels, width, height)


def _orientation(image: Image.Image) -> int:
    """From 1 to 8; 1, upright, where the image does not say, or its EXIF is damaged."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # as many types as there are kinds of damage
        return 1
    return orientation if orientation in UPRIGHT else 1


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == mode and not image.has_transparency_data:
        return image
    bands, top = _bands(image), _top(image)
    if len(bands) == 1:
        return _band_to_mode(image, mode, top)
    made = Image.new(mode, image.size)
    for box in bands:
        made.paste(_band_to_mode(image.crop(box), mode, top), box)
    return made


def _bands(image: Image.Image) -> list[tuple[int, int, int, int]]:
    """(left, upper, right, lower) of rows that hold about BAND_PIXELS."""
    width, height = image.size
    rows = max(1, BAND_PIXELS // width)
    return [(0, upper, width, min(upper + rows, height)) for upper in range(0, height, rows)]


def _band_to_mode(image: Image.Image, mode: str, top: float) -> Image.Image:
    if _is_wide(image):
        image = _to_8_bits(image, top)
    elif image.mode == "LAB":  # Pillow knows no other way from there
        image = image.convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        image = Image.alpha_composite(white, rgba)
    return image if image.mode == mode else image.convert(mode)


def _is_wide(image: Image.Image) -> bool:
    """Whether it has 16 or 32 bits, which Pillow would clip to 255."""
    return image.mode.startswith("I") or image.mode == "F"


def _values(image: Image.Image) -> np.ndarray:
    """(H, W) float32"""
    return np.nan_to_num(np.asarray(image, np.float32))


def _top(image: Image.Image) -> float:
    """Which value is white: of 16 bits 65535; of 32, where no rule says, the largest decides."""
    if not _is_wide(image) or image.mode.startswith("I;16"):
        return 65535.0
    largest = max(_values(image.crop(box)).max() for box in _bands(image))
    if largest > 255:
        return 65535.0
    return 1.0 if image.mode == "F" and largest <= 1 else 255.0


def _to_8_bits(image: Image.Image, top: float) -> Image.Image:
    """A grey image whose values are from 0 to `top`."""
    wide = _values(image)
    narrow = np.rint(wide.clip(0, top) * (255 / top)).astype(np.uint8)
    if "transparency" in image.info:
        narrow[wide == image.info["transparency"]] = 255
    return Image.fromarray(narrow)


def to_unit(pixels: "Tensor") -> "Tensor":
    """uint8 (B, H, W, C) to float32 (B, C, H, W) in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


def to_uint8(x: "Tensor") -> np.ndarray:
    """float (B, C, H, W) in [-1, 1], clipped and rounded to uint8 (B, H, W, C)."""
    scaled = ((x.float() + 1.0) * 127.5).round().clamp(0, 255)
    pixels: np.ndarray = scaled.byte().permute(0, 2, 3, 1).cpu().numpy()
    return pixels


def to_pil(pixels: np.ndarray) -> Image.Image:
    """(H, W, C) uint8 as a Pillow image, grey for one channel."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def thumbnail(pixels: np.ndarray, side: int) -> np.ndarray:
    """(H, W, C) uint8, made smaller where it is larger than `side`; its proportions stay."""
    image = to_pil(pixels)
    image.thumbnail((side, side))
    return np.asarray(image, np.uint8).reshape(image.height, image.width, -1)


def grid(
    pixels: np.ndarray, columns: int, scale: int | None = None, gap: int | None = None
) -> bytes:
    """A PNG of (N, H, W, C) uint8 images in rows of `columns`, enlarged, with gaps between.

    Small images are enlarged by whole pixels, to about 64 a side, so that a person sees them.
    """
    n, height, width, channels = pixels.shape
    scale = scale or max(1, round(64 / height))
    gap = gap if gap is not None else max(2, scale)
    rows = -(-n // columns)
    cell_h, cell_w = height * scale + gap, width * scale + gap
    sheet = np.full((rows * cell_h + gap, columns * cell_w + gap, channels), 128, np.uint8)
    for i, image in enumerate(pixels):
        top, left = gap + i // columns * cell_h, gap + i % columns * cell_w
        big = image.repeat(scale, axis=0).repeat(scale, axis=1)
        sheet[top : top + height * scale, left : left + width * scale] = big
    return png(sheet, level=1)


def png(pixels: np.ndarray, text: dict[str, str] | None = None, level: int = 6) -> bytes:
    """(H, W, C) uint8 as PNG bytes, with `text` in its metadata.

    Args:
        level: of compression; 1 takes a fifth of the time and makes files up to a sixth larger.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, value in (text or {}).items():
        info.add_itxt(name, value)
    buffer = io.BytesIO()
    to_pil(pixels).save(buffer, format="PNG", pnginfo=info, compress_level=level)
    return buffer.getvalue()


def from_png(data: bytes) -> np.ndarray:
    """The (H, W, C) uint8 pixels of PNG bytes that `png` has made."""
    pixels = np.asarray(Image.open(io.BytesIO(data), formats=["PNG"]))
    return pixels if pixels.ndim == 3 else pixels[..., None]
