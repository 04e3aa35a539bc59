"""From files to 8-bit RGB: deep images are scaled by what is declared, or refused."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from treelora_cli.data import pixels
from treelora_cli.data.pixels import looks_like_image, open_image, pixels_of
from treelora_cli.errors import DataError


def encoded(values: Any, kind: str = "TIFF", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(values)).save(buffer, format=kind, **options)
    return buffer.getvalue()


def grey(data: bytes, **options: Any) -> list[int]:
    image = open_image(data, "x", **options)
    assert image.mode == "RGB"
    channels = np.asarray(image)
    assert (channels == channels[..., :1]).all()
    found: list[int] = channels[0, :, 0].tolist()
    return found


TWELVE_BITS = np.array([[0, 1024, 2048, 4095]], np.uint16)


def tags(**values: Any) -> TiffImagePlugin.ImageFileDirectory_v2:
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for name, value in values.items():
        directory[int(name.removeprefix("t"))] = value
    return directory


@pytest.mark.parametrize(
    "declared",
    [
        {"t281": 4095},
        {"t341": 4095},
        {"t270": "ImageJ=1.53t\nunit=um\nmin=0.0\nmax=4095.0\n"},
        {"t270": '<OME><Pixels BigEndian="false" SignificantBits="12" Type="uint16"/></OME>'},
    ],
)
def test_twelve_bits_in_sixteen_are_scaled_by_the_declared_range(declared: dict[str, Any]) -> None:
    assert grey(encoded(TWELVE_BITS, tiffinfo=tags(**declared))) == [0, 63, 127, 255]


def test_a_declared_lower_end_is_black() -> None:
    assert grey(encoded(TWELVE_BITS, tiffinfo=tags(t280=1024, t281=4095))) == [0, 0, 85, 255]


@pytest.mark.parametrize("kind", ["TIFF", "PNG"])
def test_twelve_bits_in_sixteen_without_a_declared_range_are_refused(kind: str) -> None:
    with pytest.raises(DataError, match=r"^x: values from 0 to 4095, which leaves open how many bits are used, and"):
        open_image(encoded(TWELVE_BITS, kind), "x")
    assert grey(encoded(TWELVE_BITS, kind), largest=4095) == [0, 63, 127, 255]
    assert grey(encoded(TWELVE_BITS, kind), largest=65535) == [0, 3, 7, 15]


def test_sixteen_bits_that_are_used_are_scaled_by_their_type() -> None:
    assert grey(encoded(np.array([[0, 32768, 65535]], np.uint16))) == [0, 127, 255]
    assert grey(encoded(np.array([[0, 20000]], np.uint16), "PNG")) == [0, 77]


def test_floats_from_0_to_1_and_from_0_to_255() -> None:
    assert grey(encoded(np.array([[0.0, 0.5, 1.0]], np.float32))) == [0, 127, 255]
    assert grey(encoded(np.array([[0.0, 50.0, 200.0]], np.float32))) == [0, 50, 200]
    assert grey(encoded(np.array([[0.0, 5.0]], np.float32), tiffinfo=tags(t341=10.0))) == [0, 127]


@pytest.mark.parametrize(
    "values", [np.array([[-0.5, 0.5]]), np.array([[0.0, 3.0]]), np.array([[0.0, 3000.0]]), np.array([[-1000.0, 200.0]])]
)
def test_floats_of_another_range_are_refused(values: Any) -> None:
    with pytest.raises(DataError, match=r"neither from 0 to 1 nor from 0 to 255, and the file declares no range\."):
        open_image(encoded(values.astype(np.float32)), "x")


def test_floats_that_are_not_finite_are_refused() -> None:
    with pytest.raises(DataError, match=r"^x: pixel values that are not finite\."):
        open_image(encoded(np.array([[0.0, np.nan]], np.float32)), "x")


def test_integers_of_32_bits_need_a_range() -> None:
    data = encoded(np.array([[0, 70000]], np.int32))
    with pytest.raises(DataError, match=r"values from 0 to 70000, of a type without a usual range"):
        open_image(data, "x")
    assert grey(data, largest=140000) == [0, 127]


def test_integers_of_32_bits_without_a_sign_reach_to_the_end_of_their_range() -> None:
    signed, plain = (struct.pack("<HHIHH", 339, 3, 1, kind, 0) for kind in (2, 1))
    data = encoded(np.array([[0, 2**31 - 1, -(2**31), -1]], np.int32)).replace(signed, plain)
    assert grey(data, largest=2**32 - 1) == [0, 127, 127, 255]


def test_a_declared_range_that_most_values_exceed_is_refused() -> None:
    with pytest.raises(DataError, match=r"^x: most values lie above 1000, which the file declares as the largest\.$"):
        open_image(encoded(TWELVE_BITS, tiffinfo=tags(t281=1000)), "x")


def test_a_pgm_declares_its_range() -> None:
    body = np.array([0, 2048, 4095], ">u2").tobytes()
    assert grey(b"P5 3 1 4095\n" + body) == [0, 127, 255]


@pytest.mark.parametrize("values", [np.array([[0, 65535]], np.uint16), np.array([[0.0, 1.0]], np.float32)])
def test_white_may_be_zero(values: Any) -> None:
    assert grey(encoded(values, tiffinfo=tags(t262=0))) == [255, 0]


def tiff_of_16_bit_colour(values: Any, colours: int, planar: int) -> bytes:
    """Write a TIFF of one row of 16-bit samples, all of a pixel together (planar 1) or a plane each (2)."""
    rows = np.asarray(values, "<u2")
    body = (rows.T if planar == 2 else rows).tobytes()
    samples, head = rows.shape[1], 8 + len(body)
    counts = [len(body) // samples] * samples if planar == 2 else [len(body)]
    starts = [8 + sum(counts[:place]) for place in range(len(counts))]
    later: list[bytes] = []

    def entry(tag: int, kind: int, numbers: list[int]) -> bytes:
        form = "<" + ("H" if kind == 3 else "I") * len(numbers)
        packed = struct.pack(form, *numbers)
        if len(packed) > 4:
            place = head + 2 + 12 * 10 + 4 + sum(map(len, later))
            later.append(packed)
            packed = struct.pack("<I", place)
        return struct.pack("<HHI", tag, kind, len(numbers)) + packed.ljust(4, b"\0")

    entries = [
        entry(256, 3, [len(rows)]),
        entry(257, 3, [1]),
        entry(258, 3, [16] * samples),
        entry(259, 3, [1]),
        entry(262, 3, [colours]),
        entry(273, 4, starts),
        entry(277, 3, [samples]),
        entry(278, 3, [1]),
        entry(279, 4, counts),
        entry(284, 3, [planar]),
    ]
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", head) + body + directory + b"".join(later)


def test_planes_of_16_bit_colour_are_refused() -> None:
    rows = [(65535, 0, 32768), (0, 65535, 0)]
    together = np.asarray(open_image(tiff_of_16_bit_colour(rows, 2, 1), "x"))[0].tolist()
    assert together == [[255, 0, 128], [0, 255, 0]]
    with pytest.raises(DataError, match=r"^x: a TIFF of 16-bit colours that lie apart would be misread\."):
        open_image(tiff_of_16_bit_colour(rows, 2, 2), "x")


def test_inks_of_12_bits_in_16_are_refused() -> None:
    inks = [(0, 4095, 0, 0), (4095, 0, 0, 0)]
    with pytest.raises(DataError, match=r"^x: a colour image of 16 bits that uses a part of its range"):
        open_image(tiff_of_16_bit_colour(inks, 5, 1), "x")


def png_of_16_bit_colour(values: Any) -> bytes:
    """Write a PNG of one row of 16-bit RGB; Pillow cannot."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = np.asarray(values, ">u2")
    head = struct.pack(">IIBBBBB", len(rows), 1, 16, 2, 0, 0, 0)
    body = zlib.compress(b"\0" + rows.tobytes())
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_colour_of_16_bits_is_scaled_where_it_uses_them() -> None:
    image = open_image(png_of_16_bit_colour([[0, 32768, 65535]]), "x")
    assert image.getpixel((0, 0)) == (0, 128, 255)
    for most in (4095, 255):
        line = rf"a colour image of 16 bits that uses a part of its range \(up to {most}\)\."
        with pytest.raises(DataError, match=line):
            open_image(png_of_16_bit_colour([[0, most // 2, most]]), "x")
    assert open_image(png_of_16_bit_colour([[0, 2048, 4095]]), "x", largest=65535).getpixel((0, 0)) == (0, 8, 15)


def test_first_bytes_of_images() -> None:
    for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"):
        assert looks_like_image(encoded(np.zeros((2, 2), np.uint8), kind)[:32]), kind
    assert not any(looks_like_image(text) for text in (b"BMW is a car", b"Plain", b"%PDF-1.7", b"RIFF....WAVE", b""))


def test_eight_bits_with_a_sign_are_refused() -> None:
    data = encoded(np.array([[0, 100, 251]], np.uint8), tiffinfo=tags(t339=2))
    with pytest.raises(DataError, match=r"^x: 8-bit values with a sign would be read without it\."):
        open_image(data, "x")


@pytest.mark.parametrize(
    ("data", "name", "reason"),
    [
        (b"", "x.png", "it is empty"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "x.jpg", "HEIC; pip install pillow-heif, or convert it to PNG or JPEG"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0", "x", "HEIC; pip install pillow-heif"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "x.svg", "SVG, which is not read here"),
        (b"8BPS\0\1", "x.psd", "Photoshop, which is not read here"),
        (b"II*\0x", "x.NEF", "a camera's raw format, which is not read here"),
        (b"II*\0x", "x.tif", "a damaged or unusual TIFF, which is not read here"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "x.png",
            "a pointer of Git LFS; fetch the files",
        ),
        (b"<html>404</html>", "x.png", "a web page; download the image again"),
        (b"\n<!DOCTYPE html><html>", "x.jpg", "a web page; download the image again"),
        (b'{"error": "not found"}', "x.jpg", "a text, as a server writes for an error"),
        (b"<?xml version='1.0'?><!-- by x --><svg width='1'/>", "x.png", "SVG, which is not read here"),
        (b"\0" * 128 + b"DICM\2\0", "x", "DICOM, which is not read here"),
        (b"\0" * 128, "x.dcm", "DICOM, which is not read here"),
        (b"%PDF-1.7", "x.jpg", "PDF, which is not read here"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "x.jpg", "a video, which is not read here"),
        (b"\0\0\0\x18ftypavif\0\0\0\0", "x.avif", "no known format"),
        (b"no picture", "x.png", "no known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "x.eps", "EPS, which is not read here"),
    ],
)
def test_what_is_no_picture_here_is_named(data: bytes, name: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "_decodes_heic", lambda: False)
    with pytest.raises(DataError, match=rf"^{name}: unreadable or truncated image \({reason}.*--skip-bad\.$"):
        open_image(data, name)
    with pytest.raises(DataError, match=rf"^{name}: unreadable or truncated image \({reason}.*\)\.$"):
        pixels_of(data, name)


def test_heic_is_decoded_where_pillow_heif_is_installed() -> None:
    heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    heif.from_pillow(Image.new("RGB", (64, 48), (200, 40, 40))).save(buffer)
    assert looks_like_image(buffer.getvalue()[:32])
    found = open_image(buffer.getvalue(), "x")
    assert found.size == (64, 48) and pixels_of(buffer.getvalue(), "x") == 64 * 48
    assert np.abs(np.asarray(found).astype(int) - (200, 40, 40)).max() < 8


@pytest.mark.parametrize("read", [open_image, pixels_of])
def test_an_image_that_calls_a_program_is_not_opened(
    monkeypatch: pytest.MonkeyPatch, read: Callable[[bytes, str], object]
) -> None:
    """Pillow hands EPS to Ghostscript, which runs what the file says."""
    monkeypatch.setattr("subprocess.check_call", lambda *_a, **_k: pytest.fail("a program was called"))
    monkeypatch.setattr("PIL.EpsImagePlugin.has_ghostscript", lambda: True)
    with pytest.raises(DataError, match="no known format"):
        read(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "x.png")


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_cameras_turns_are_undone_in_every_format(turn: int, kind: str) -> None:
    image = Image.new("RGB", (4, 2))
    exif = image.getexif()
    exif[0x0112] = turn
    buffer = io.BytesIO()
    image.save(buffer, kind, exif=exif)
    assert open_image(buffer.getvalue(), "x").size == ((2, 4) if turn > 4 else (4, 2))


@pytest.mark.parametrize("size", [(1, 1), (100_000, 1), (1, 3000)])
def test_images_of_any_shape_are_read(size: tuple[int, int]) -> None:
    assert open_image(encoded(np.zeros((size[1], size[0]), np.uint8), "PNG"), "x").size == size


def test_the_first_picture_of_several_is_taken() -> None:
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF", "MPO"):
        buffer = io.BytesIO()
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
        red, _, blue = open_image(buffer.getvalue(), "x").getpixel((0, 0))
        assert red > 200 > 50 > blue, kind


@pytest.mark.parametrize(("ink", "paper"), [((0, 0, 0), 255), ((255, 255, 255), 0), ((200, 30, 30), 255)])
def test_a_drawing_that_only_its_transparency_holds_is_seen(ink: tuple[int, int, int], paper: int) -> None:
    drawing = Image.new("RGBA", (3, 1), (*ink, 0))
    drawing.putpixel((1, 0), (*ink, 255))
    seen = np.asarray(open_image(encoded(drawing, "PNG"), "x.png"))[0].tolist()
    assert seen == [[paper] * 3, list(ink), [paper] * 3]


def test_transparency_beside_colours_is_left_out() -> None:
    mixed = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    mixed.putpixel((1, 0), (40, 50, 60, 255))
    assert np.asarray(open_image(encoded(mixed, "PNG"), "x.png"))[0].tolist() == [[10, 20, 30], [40, 50, 60]]
    clear = Image.new("LA", (2, 1), (50, 0))
    assert np.asarray(open_image(encoded(clear, "PNG"), "x.png"))[0].tolist() == [[50] * 3] * 2
