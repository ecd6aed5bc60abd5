"""From files of every kind to pixels: real images, real damage."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

from pipeline.data import images
from pipeline.data.images import (
    BadImage,
    decode,
    from_png,
    grid,
    png,
    thumbnail,
    to_uint8,
    to_unit,
)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def gradient(width: int = 16, height: int = 16) -> np.ndarray:
    """A grey ramp from left to right."""
    return np.tile(np.linspace(0, 255, width).astype(np.uint8), (height, 1))


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours, another in every corner."""
    few = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(few).resize((width, height), Image.Resampling.BICUBIC)


def plainly(image: Image.Image, image_size: int, mode: str = "RGB") -> np.ndarray:
    """What decode must give, by Pillow alone and at full size: (H, W, C) as int."""
    small = ImageOps.fit(
        ImageOps.exif_transpose(image).convert(mode),
        (image_size, image_size),
        Image.Resampling.BICUBIC,
    )
    return np.asarray(small).reshape(image_size, image_size, -1).astype(int)


def difference(one: np.ndarray, two: np.ndarray) -> tuple[float, int]:
    """Mean and largest absolute difference."""
    apart = np.abs(one.astype(int) - two)
    return float(apart.mean()), int(apart.max())


def deep_png(pixels: np.ndarray) -> bytes:
    """A PNG of (H, W, C) uint16 pixels, by the format's description: Pillow writes grey only."""
    height, width, channels = pixels.shape
    color_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    )


# --- kinds of file ------------------------------------------------------------------------------

KINDS = {
    "png": encoded(photo(90, 70)),
    "jpeg": encoded(photo(90, 70), "JPEG", quality=95),
    "progressive jpeg": encoded(photo(90, 70), "JPEG", quality=95, progressive=True),
    "webp": encoded(photo(90, 70), "WEBP", quality=95),
    "lossless webp": encoded(photo(90, 70), "WEBP", lossless=True),
    "gif": encoded(photo(90, 70), "GIF"),
    "bmp": encoded(photo(90, 70), "BMP"),
    "tiff": encoded(photo(90, 70), "TIFF"),
    "lzw tiff": encoded(photo(90, 70), "TIFF", compression="tiff_lzw"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_shows_the_same_picture(kind: str) -> None:
    got = decode(KINDS[kind], 32, 3)
    assert (got.pixels.shape, got.pixels.dtype) == ((32, 32, 3), np.uint8)
    assert (got.width, got.height) == (90, 70)
    mean, _ = difference(got.pixels, plainly(photo(90, 70), 32))
    lossless = kind in ("png", "lossless webp", "bmp", "tiff", "lzw tiff")
    assert mean == 0 if lossless else mean < 6  # a GIF has 256 colours
    grey = decode(KINDS[kind], 32, 1).pixels
    assert grey.shape == (32, 32, 1)
    assert difference(grey, plainly(photo(90, 70), 32, "L"))[0] < 6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.3, 0.95])
def test_a_truncated_file_is_bad_and_not_filled_with_grey(kind: str, share: float) -> None:
    data = KINDS[kind]
    with pytest.raises(BadImage, match=r"^(cannot be decoded: \w|it is not a PNG)"):
        decode(data[: int(share * len(data))], 32, 3)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "TIFF", "MPO"])
def test_of_several_frames_the_first_counts(format: str) -> None:
    first, second = Image.new("RGB", (20, 20), (250, 0, 0)), Image.new("RGB", (20, 20), "blue")
    data = encoded(first, format, save_all=True, append_images=[second])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert difference(decode(data, 8, 3).pixels, np.array([250, 0, 0]))[1] <= 4


# --- modes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_every_mode_of_a_grey_ramp_comes_out_as_that_ramp(mode: str) -> None:
    ramp = gradient()
    if mode == "I;16":
        image = Image.fromarray(ramp.astype(np.uint16) * 257)
    elif mode in ("I", "F"):
        image = Image.fromarray(ramp).convert(mode)
    else:
        image = Image.fromarray(ramp).convert("RGB" if mode == "CMYK" else "L").convert(mode)
    data = encoded(image, "TIFF" if mode in ("F", "CMYK", "I") else "PNG")
    got = decode(data, 16, 1).pixels[..., 0]
    tolerance = 255 if mode == "1" else 2
    assert np.abs(got.astype(int) - ramp).max() <= tolerance
    assert got[:, 0].max() == 0
    assert got[:, -1].min() >= 253


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bits_a_channel_become_8(channels: int) -> None:
    deep = np.random.default_rng(0).integers(0, 2**16, (8, 8, channels), dtype=np.uint16)
    has_alpha = channels in (2, 4)
    if has_alpha:
        deep[..., -1] = 65535
    want = np.broadcast_to((deep[..., : channels - has_alpha] / 257).round(), (8, 8, 3))
    assert difference(decode(deep_png(deep), 8, 3).pixels, want)[1] <= 1


def test_a_dark_16_bit_image_stays_dark() -> None:
    deep = np.full((8, 8), 250, np.uint16)
    for data in (deep_png(deep[..., None]), encoded(Image.fromarray(deep), "TIFF")):
        assert (decode(data, 8, 1).pixels == 1).all()


def test_16_bits_in_a_file_of_32_become_8() -> None:
    wide = Image.fromarray(gradient().astype(np.int32) * 257)
    assert wide.mode == "I"
    assert np.array_equal(decode(encoded(wide, "TIFF"), 16, 1).pixels[..., 0], gradient())


def test_a_float_image_from_0_to_1_is_not_black() -> None:
    values = (gradient() / 255).astype(np.float32)
    got = decode(encoded(Image.fromarray(values), "TIFF"), 16, 1).pixels[..., 0]
    assert difference(got, gradient())[1] <= 1
    values[3, 3] = np.nan
    got = decode(encoded(Image.fromarray(values), "TIFF"), 16, 1).pixels[..., 0]
    assert got[3, 3] == 0
    assert np.abs(got[4:].astype(int) - gradient()[4:]).max() <= 1


def test_transparent_pixels_show_white() -> None:
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[:, :4] = (10, 20, 30, 255)
    want = np.full((8, 8, 3), 255)
    want[:, :4] = (10, 20, 30)
    palette = Image.fromarray(clear).quantize(4)
    for data in (
        encoded(Image.fromarray(clear)),
        encoded(Image.fromarray(clear), "WEBP", lossless=True),
        encoded(Image.fromarray(clear), "TIFF"),
        encoded(palette),
        encoded(Image.fromarray(clear), "GIF"),
    ):
        assert np.array_equal(decode(data, 8, 3).pixels, want)
    assert np.array_equal(decode(clear, 8, 3).pixels, want)


@pytest.mark.parametrize("mode", ["LA", "P", "L", "1", "I;16", "RGB"])
def test_every_way_to_say_transparent_is_understood(mode: str) -> None:
    """The right half is transparent and would else be black; the left is grey or white."""
    half = np.zeros((8, 8), np.uint8)
    half[:, :4] = 255 if mode == "1" else 100
    if mode == "LA":
        data = encoded(Image.fromarray(np.stack([half, 255 * (half > 0).astype(np.uint8)], -1)))
    elif mode == "P":
        image = Image.fromarray(half)
        image = image.convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
        black = image.getpixel((7, 0))
        data = encoded(image, transparency=bytes(255 * (i != black) for i in range(2)))
    elif mode == "I;16":
        data = encoded(Image.fromarray(half.astype(np.uint16) * 257), transparency=0)
    else:
        clear = (0, 0, 0) if mode == "RGB" else 0
        data = encoded(Image.fromarray(half).convert(mode), transparency=clear)
    got = decode(data, 8, 1).pixels[..., 0]
    assert (got[:, :4] == half[:, :4]).all()
    assert (got[:, 4:] == 255).all()


def cmyk(red: int, green: int, blue: int) -> tuple[int, int, int, int]:
    return 255 - red, 255 - green, 255 - blue, 0


def test_cmyk_jpegs_as_adobe_writes_them_are_not_negatives() -> None:
    want = (200, 60, 30)
    inverted = encoded(Image.new("CMYK", (32, 32), cmyk(*want)), "JPEG", quality=100)
    assert b"Adobe" in inverted
    assert difference(decode(inverted, 16, 3).pixels, np.array(want))[1] <= 3


def test_ycck_jpegs_as_photoshop_writes_them_have_their_colours() -> None:
    want = (200, 60, 30)
    as_stored = Image.new("RGB", (1, 1), cmyk(*want)[:3]).convert("YCbCr").getpixel((0, 0))
    # Pillow inverts on saving; so this writes Y, Cb, Cr and an inverted K of 0
    data = encoded(
        Image.new("CMYK", (32, 32), (*(255 - value for value in as_stored), 0)), "JPEG", quality=100
    )
    transform = data.index(b"Adobe") + 11
    assert data[transform] == 0
    ycck = data[:transform] + b"\2" + data[transform + 1 :]
    assert difference(decode(ycck, 16, 3).pixels, np.array(want))[1] <= 4


def test_a_lab_tiff_has_its_colours() -> None:
    profiles = [ImageCms.createProfile(space) for space in ("sRGB", "LAB")]
    lab = ImageCms.profileToProfile(photo(16, 16), *profiles, outputMode="LAB")
    assert lab is not None
    data = encoded(lab, "TIFF")
    assert difference(decode(data, 16, 3).pixels, np.asarray(photo(16, 16)))[0] < 2
    assert difference(decode(data, 16, 1).pixels, plainly(photo(16, 16), 16, "L"))[0] < 2


# --- size ---------------------------------------------------------------------------------------


def test_an_image_of_the_right_size_keeps_its_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for resize in ("crop", "exact"):
        assert np.array_equal(decode(encoded(Image.fromarray(pixels)), 8, 3, resize).pixels, pixels)
        assert np.array_equal(decode(pixels, 8, 3, resize).pixels, pixels)
    grey = pixels[..., :1]
    assert np.array_equal(decode(grey, 8, 1).pixels, grey)
    assert np.array_equal(decode(grey, 8, 3).pixels, np.repeat(grey, 3, -1))


def test_the_shortest_side_is_resized_and_the_centre_cropped() -> None:
    wide = np.zeros((20, 60), np.uint8)
    wide[:, 20:40] = 200  # the middle third is what a square crop keeps
    for image in (wide, wide.T):
        got = decode(encoded(Image.fromarray(image)), 10, 1).pixels
        assert (got[2:-2, 2:-2] == 200).all()
        assert (got > 150).all()  # the filter sees a little beyond the crop


def test_exact_brings_both_sides_to_the_size() -> None:
    wide = np.zeros((20, 60), np.uint8)
    wide[:, 20:40] = 200
    got = decode(encoded(Image.fromarray(wide)), 30, 1, "exact").pixels[..., 0]
    assert (got[:, 12:18] == 200).all()
    assert (got[:, :8] == 0).all() and (got[:, 22:] == 0).all()


def test_fine_stripes_become_grey_and_not_a_pattern() -> None:
    stripes = np.tile(np.array([0, 255], np.uint8), (256, 128))
    got = decode(encoded(Image.fromarray(stripes)), 16, 1).pixels
    assert difference(got, np.array(127.5))[1] <= 3


@pytest.mark.parametrize(
    ("width", "height", "reduced"),
    [(127, 300, False), (255, 255, False), (256, 256, True), (515, 389, True), (301, 1033, True)],
)
def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same(
    width: int, height: int, reduced: bool
) -> None:
    data = encoded(photo(width, height), "JPEG", quality=90)
    got = decode(data, 64, 3)
    assert (got.width, got.height) == (width, height)
    mean, largest = difference(got.pixels, plainly(Image.open(io.BytesIO(data)), 64))
    # not a pixel differs where less than twice the size would be left: it was decoded whole
    assert (largest > 0) == reduced
    assert mean < 0.5
    assert largest <= 10


@pytest.mark.parametrize("resize", ["crop", "exact"])
def test_reducing_a_jpeg_does_not_shift_it(resize: str) -> None:
    # 1031 is not a multiple of 8: an eighth ends in a column of three pixels
    ramp = Image.fromarray(gradient(1031, 1031))
    got = decode(encoded(ramp, "JPEG", quality=100), 64, 1, resize).pixels[..., 0]
    assert difference(got, np.asarray(ramp.resize((64, 64), Image.Resampling.BICUBIC)))[1] <= 1


def in_mode(mode: str, width: int, height: int) -> bytes:
    """A file whose image Pillow opens in that mode."""
    grey = np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)
    if mode == "I;16":
        return encoded(Image.fromarray(grey.astype(np.uint16) * 200))
    if mode == "I":
        wide = grey.astype(np.int32)
        wide[0] *= 200  # the largest values, which decide for all
        return encoded(Image.fromarray(wide), "TIFF")
    if mode == "F":
        values = grey.astype(np.float32) / 255
        values[0, 0] = np.nan
        return encoded(Image.fromarray(values), "TIFF")
    if mode == "I;16 with a transparent value":
        return encoded(Image.fromarray(grey.astype(np.uint16)), transparency=100)
    if mode == "P with transparency":
        return encoded(Image.fromarray(grey).convert("P"), transparency=7)
    if mode == "RGBA":
        return encoded(Image.fromarray(np.stack([grey, grey.T.reshape(grey.shape)] * 2, -1)))
    return encoded(Image.fromarray(grey).convert(mode), "TIFF" if mode == "CMYK" else "PNG")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "mode",
    [
        *("1", "L", "LA", "RGB", "RGBA", "CMYK", "I;16", "I", "F"),
        *("I;16 with a transparent value", "P with transparency"),
    ],
)
def test_an_image_that_is_converted_in_bands_has_the_same_pixels(
    monkeypatch: pytest.MonkeyPatch, mode: str, channels: int
) -> None:
    data = in_mode(mode, 90, 70)
    whole = decode(data, 70, channels).pixels
    monkeypatch.setattr(images, "BAND_PIXELS", 90 * 8)
    assert np.array_equal(decode(data, 70, channels).pixels, whole)
    monkeypatch.setattr(images, "BAND_PIXELS", 1)
    assert np.array_equal(decode(data, 70, channels).pixels, whole)


# --- EXIF ---------------------------------------------------------------------------------------


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_an_image_rotated_by_exif_stands_upright(format: str, orientation: int) -> None:
    lossless = {"lossless": True} if format == "WEBP" else {}
    data = encoded(photo(90, 60), format, exif=exif(orientation), **lossless)
    got = decode(data, 16, 3)
    assert (got.width, got.height) == ((60, 90) if orientation >= 5 else (90, 60))
    assert difference(got.pixels, plainly(Image.open(io.BytesIO(data)), 16))[1] <= 8


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_large_jpeg_is_rotated_too(orientation: int) -> None:
    data = encoded(photo(517, 389), "JPEG", exif=exif(orientation))
    got = decode(data, 64, 3)
    assert (got.width, got.height) == ((389, 517) if orientation == 6 else (517, 389))
    mean, largest = difference(got.pixels, plainly(Image.open(io.BytesIO(data)), 64))
    assert mean < 0.5
    assert largest <= 10


@pytest.mark.parametrize(
    "damage",
    [
        b"Exif\0\0nonsense",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\x03",
        exif(6).tobytes()[:-9],
        exif(77).tobytes(),
    ],
)
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_damaged_exif_does_not_make_an_image_bad(format: str, damage: bytes) -> None:
    got = decode(encoded(photo(16, 16), format, exif=damage), 16, 3)
    sound = decode(encoded(photo(16, 16), format), 16, 3)
    assert np.array_equal(got.pixels, sound.pixels)


# --- bad images ---------------------------------------------------------------------------------

BOMB = encoded(Image.new("1", (8, 8)))


def bomb(width: int, height: int) -> bytes:
    """A small PNG whose header claims these sides."""
    header = struct.pack(">II", width, height) + BOMB[24:29]
    return BOMB[:16] + header + zlib.crc32(b"IHDR" + header).to_bytes(4, "big") + BOMB[33:]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "the file is empty"),
        (b"hello", "it is not a PNG, JPEG, WebP, GIF, BMP or TIFF image, or its header is damaged"),
        (b"\x89PNG\r\n\x1a\n", "it is not a PNG"),
        (encoded(photo(8, 8), "EPS"), "it is not a PNG"),  # Pillow would start another program
        (encoded(photo(8, 8), "PPM"), "it is not a PNG"),
        (bytes(5000), "it is not a PNG"),
        (encoded(Image.effect_noise((64, 64), 50))[:500], "cannot be decoded: .*truncated"),
        (bomb(10_001, 10_000), "it has more than 100,000,000 pixels"),
        (bomb(50_000, 50_000), "it has more than 100,000,000 pixels"),
        (bomb(0, 8), "it is not a PNG"),
        (np.zeros((8, 8, 5), np.uint8), r"its shape is \(8, 8, 5\), not \(height, width, 1 to 4"),
        (np.zeros((8, 8), np.uint8), r"its shape is \(8, 8\)"),
        (np.zeros((0, 8, 3), np.uint8), r"its shape is \(0, 8, 3\)"),
        (np.zeros((8, 8, 3), np.float32), "its pixels are float32, not uint8"),
    ],
)
def test_bad_images_are_refused_with_a_reason(raw: bytes | np.ndarray, reason: str) -> None:
    with pytest.raises(BadImage, match=f"^{reason}") as refused:
        decode(raw, 8, 1)
    assert "\n" not in str(refused.value)
    assert "0x" not in str(refused.value), "no address of an object"


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_the_damage_an_image_is_decoded_or_bad(
    kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    outcomes = set()
    for trial in range(60):
        data = bytearray(KINDS[kind])
        for _ in range(rng.integers(1, 8)):
            data[rng.integers(len(data) if trial % 2 else 200)] = rng.integers(256)
        try:
            outcomes.add(decode(bytes(data), 16, 3).pixels.shape)
        except BadImage as error:
            outcomes.add(type(error))
    assert outcomes <= {(16, 16, 3), BadImage}
    assert BadImage in outcomes
    capfd.readouterr()  # libtiff speaks its mind


# --- to the network and back --------------------------------------------------------------------


def test_uint8_survives_the_trip_to_the_network_and_back() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    x = to_unit(torch.from_numpy(pixels))
    assert (x.min().item(), x.max().item(), x.shape) == (-1.0, 1.0, (1, 1, 16, 16))
    assert np.array_equal(to_uint8(x), pixels)
    assert to_uint8(torch.tensor([[[[-9.0, 9.0]]]])).flatten().tolist() == [0, 255]


@pytest.mark.parametrize("channels", [1, 3])
def test_png_keeps_every_pixel(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    assert np.array_equal(from_png(png(pixels)), pixels)
    assert png(pixels) == png(pixels.copy())


@pytest.mark.parametrize("channels", [1, 3])
def test_a_thumbnail_is_smaller_and_never_larger(channels: int) -> None:
    pixels = np.full((300, 200, channels), 77, np.uint8)
    assert np.array_equal(thumbnail(pixels, 30), np.full((30, 20, channels), 77, np.uint8))
    assert np.array_equal(thumbnail(pixels, 300), pixels)


def test_a_grid_shows_every_image_enlarged() -> None:
    images = np.stack([np.full((8, 8, 1), value, np.uint8) for value in (0, 100, 200)])
    sheet = np.asarray(Image.open(io.BytesIO(grid(images, columns=2))))
    assert sheet.shape == (2 * 64 + 3 * 8, 2 * 64 + 3 * 8)
    assert (sheet[8 + 32, 8 + 32], sheet[40, 112], sheet[112, 40]) == (0, 100, 200)
