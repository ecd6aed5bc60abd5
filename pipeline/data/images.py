"""Pixels: decoding files to uint8, and uint8 to the [-1, 1] that the network sees."""

import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

MAX_PIXELS = 100_000_000
"""An image that claims more than this is refused before it is decoded: it would take 300 MB."""
TOO_LARGE = f"it has more than {MAX_PIXELS:,} pixels"


class BadImage(Exception):
    """An image that cannot be used, with the reason."""


def decode(raw: bytes | np.ndarray, image_size: int, channels: int) -> np.ndarray:
    """An encoded file or a pixel array, as (image_size, image_size, channels) uint8.

    Rotated as its EXIF says, transparent parts over white, the shortest side resized with
    antialiasing (bicubic), the centre cropped. An image that has the size already keeps its pixels.

    Raises:
        BadImage: it cannot be decoded, or is unreasonably large.
    """
    image = _to_mode(_open(raw), "L" if channels == 1 else "RGB")
    if image.size != (image_size, image_size):
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.uint8).reshape(image_size, image_size, channels)


def _open(raw: bytes | np.ndarray) -> Image.Image:
    if isinstance(raw, np.ndarray):
        return Image.fromarray(raw.squeeze(-1) if raw.shape[-1] == 1 else raw)
    if not raw:
        raise BadImage("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what is checked here
            image = Image.open(io.BytesIO(raw))
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BadImage(TOO_LARGE)
            image.load()
            return ImageOps.exif_transpose(image)
    except BadImage:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit, in Image.open
        raise BadImage(TOO_LARGE) from error
    except Exception as error:  # Pillow's decoders raise a dozen types on damaged files
        reason = str(error).split(" <", 1)[0]  # without the repr of the buffer
        raise BadImage(f"cannot be decoded: {reason or type(error).__name__}") from error


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # 16 and 32 bits: Pillow would clip to 255
        wide = np.asarray(image, dtype=np.float64)
        largest = wide.max(initial=0)
        top = 65535.0 if largest > 255 else 255.0 if largest > 1 or image.mode != "F" else 1.0
        image = Image.fromarray(np.rint(wide.clip(0, top) * (255 / top)).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        image = Image.alpha_composite(white, rgba)
    return image.convert(mode)


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 (B, H, W, C) to float32 (B, C, H, W) in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


def to_uint8(x: Tensor) -> np.ndarray:
    """float (B, C, H, W) in [-1, 1], clipped and rounded to uint8 (B, H, W, C)."""
    scaled = ((x.float() + 1.0) * 127.5).round().clamp(0, 255)
    pixels: np.ndarray = scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return pixels


def to_pil(pixels: np.ndarray) -> Image.Image:
    """(H, W, C) uint8 as a Pillow image, grey for one channel."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


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
    return png(sheet)


def png(pixels: np.ndarray, text: dict[str, str] | None = None) -> bytes:
    """(H, W, C) uint8 as PNG bytes, with `text` in its metadata."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, value in (text or {}).items():
        info.add_itxt(name, value)
    buffer = io.BytesIO()
    to_pil(pixels).save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()
