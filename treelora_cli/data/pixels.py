"""From the bytes of an image file to 8-bit RGB; a range that cannot be known is refused, not guessed.

Deep images (more than 8 bits) are scaled by the first of: the range the user gave, the range the file declares (TIFF
sample values, bits per sample, ImageJ, OME), the range of their type.
"""

from __future__ import annotations

import functools
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from treelora_cli.data.files import LFS_POINTER
from treelora_cli.errors import SKIP_BAD, DataError

IMAGE_SUFFIXES = {
    *(".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"),
    *(".pnm", ".apng", ".jp2", ".avif"),
}
_FORMATS = (
    *("PNG", "JPEG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA", "DDS", "PCX"),
    *("SGI", "QOI"),
)
"""What Pillow may decode; for others, such as EPS, it would call programs."""
_UNREADABLE = {
    **dict.fromkeys((".heic", ".heif", ".hif"), "HEIC"),
    **dict.fromkeys((".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2"), "a camera's raw format"),
    **{".svg": "SVG", ".psd": "Photoshop", ".jxl": "JPEG XL", ".eps": "EPS", ".dcm": "DICOM", ".dicom": "DICOM"},
}
"""Pictures that are not read here; they are named, not passed over."""
_HEIC = re.compile(rb".{4}ftyp(heic|heix|hevc|mif1|msf1)", re.DOTALL)
_MAGIC_UNREADABLE = (
    (_HEIC, "HEIC"),
    (re.compile(rb"8BPS"), "Photoshop"),
    (re.compile(rb"II[*+]\0|MM\0[*+]"), "a damaged or unusual TIFF"),
    (re.compile(rb".{128}DICM", re.DOTALL), "DICOM"),
    (re.compile(rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!DOCTYPE svg.{0,200})?<svg\b", re.DOTALL), "SVG"),
    (re.compile(rb"%PDF-"), "PDF"),
    (re.compile(rb".{4}ftyp(?!avi|jxl|jp2)|RIFF.{4}AVI |\x1aE\xdf\xa3", re.DOTALL), "a video"),
)
_MAGIC_NO_IMAGE = (
    (re.compile(rb"\s*<(!doctype\s+html|html|head|body)\b", re.IGNORECASE), "a web page; download the image again"),
    (re.compile(rb"\s*[{\[<]"), "a text, as a server writes for an error; download the image again"),
)
_HEAD = 1000
_MAGIC = re.compile(
    rb"\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a|BM.{4}\0\0\0\0|RIFF.{4}WEBP|II\*\0|MM\0\*|P[1-6][\s#]|\0\0\0\x0cjP  "
    rb"|.{4}ftyp(?:avif|heic|heix|hevc|mif1|msf1)",
    re.DOTALL,
)
_MAY_HOLD_SEVERAL = re.compile(rb"GIF8|II[*+]\0|MM\0[*+]|RIFF.{4}WEBP|\x89PNG.{0,200}acTL|.{4}ftypavis", re.DOTALL)
_MAX_SAMPLE, _S_MAX_SAMPLE, _BITS, _PHOTOMETRIC, _DESCRIPTION, _MIN_SAMPLE, _S_MIN_SAMPLE, _SIGN, _PLANAR = (
    *(281, 341, 258, 262, 270, 280, 340, 339, 284),
)
_UNSIGNED, _SIGNED = 1, 2
_APART = 2
_BYTE = 8
_TOO_BRIGHT = 0.5
"""More values than this share beyond the declared range contradict it; fewer are what ImageJ shows as white."""
_WHITE_IS_ZERO = 0
_TRANSPARENT = ("RGBA", "RGBa", "LA", "La", "PA")
_NEAR_WHITE = 224
_RANGE_HINT = "If it is right, set base.preprocess.range in treelora.yaml to the largest value (65535, 4095, ...)."


def is_image(path: Path) -> bool:
    """Return whether a file is an image, readable or not, by its ending or, failing that, its first bytes."""
    if path.suffix.lower() in IMAGE_SUFFIXES or path.suffix.lower() in _UNREADABLE:
        return True
    try:
        with path.open("rb") as file:
            return looks_like_image(file.read(32))
    except OSError:
        return False


def looks_like_image(head: bytes) -> bool:
    """Return whether these first bytes open an image file."""
    return _MAGIC.match(head) is not None


def pixels_of(data: bytes, name: str) -> int:
    """Return how many pixels an image's head claims, the most there is beyond Pillow's own limit; nothing is decoded.

    Raises:
        DataError: It is no image.
    """
    from PIL import Image

    try:
        with _opened(data) as opened:
            return int(opened.width * opened.height)
    except Image.DecompressionBombError:
        return sys.maxsize
    except Exception as error:  # see ``open_image``
        raise DataError(f"{name}: unreadable or truncated image ({_reason(error, data, name)}).") from error


def holds_several(data: bytes) -> bool:
    """Return whether a file is an animation or has several pages; ``open_image`` takes the first."""
    if not _MAY_HOLD_SEVERAL.match(data):
        return False
    try:
        with _opened(data) as opened:
            return bool(getattr(opened, "is_animated", False))
    except Exception:  # see ``open_image``
        return False


def _opened(data: bytes) -> Any:
    """Read the head of an image in one of the known formats."""
    from PIL import Image

    Image.init()  # else formats are looked for among the commonest only
    known = [kind for kind in _FORMATS if kind in Image.OPEN]
    if _HEIC.match(data) and _decodes_heic():
        known.append("HEIF")
    return Image.open(io.BytesIO(data), formats=known)


@functools.cache
def _decodes_heic() -> bool:
    """Let Pillow decode HEIC by pillow-heif, and return whether that is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def open_image(data: bytes, name: str, largest: float | None = None) -> Any:
    """Decode an image to 8-bit RGB, upright; grey, palette, RGBA and deep images are converted.

    Args:
        data: The file.
        name: For messages.
        largest: Value of white in images of more than 8 bits; by the file or its type when ``None``.

    Raises:
        DataError: The bytes are not a whole image, or its range cannot be known; the message names it.
    """
    from PIL import ImageOps

    try:
        with _opened(data) as opened:
            _refuse_misread(opened, name)
            deep_colour = _is_deep_colour(opened)
            opened.load()
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith(("I", "F")):
                image = _to_eight_bits(image, opened, name, largest)
            if deep_colour:
                _check_deep_colour(image, opened, name, largest)
            return _to_rgb(image)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        reason = _reason(error, data, name)
        raise DataError(f"{name}: unreadable or truncated image ({reason}).{SKIP_BAD}") from error


def _to_rgb(image: Any) -> Any:
    """Return an image as RGB, without its transparency; where that alone holds the drawing, on white, or else black."""
    from PIL import Image

    if not (image.mode in _TRANSPARENT or "transparency" in image.info):
        return image.convert("RGB")
    image = image.convert("RGBA")
    *colours, (least, most) = image.getextrema()
    if least == most or any(high > low for low, high in colours):
        return image.convert("RGB")
    paper = Image.new("RGBA", image.size, "white" if min(low for low, _ in colours) < _NEAR_WHITE else "black")
    return Image.alpha_composite(paper, image).convert("RGB")


def _reason(error: Exception, data: bytes, name: str) -> str:
    """Return why Pillow does not read a file; its own words for an unknown format name an object in memory."""
    from PIL import UnidentifiedImageError

    return _kind_of(data, name) if isinstance(error, UnidentifiedImageError) else _first_line(error)


def _kind_of(data: bytes, name: str) -> str:
    """Return what a file is that Pillow does not know."""
    if not data:
        return "it is empty"
    if data.startswith(LFS_POINTER):
        return "a pointer of Git LFS; fetch the files with git lfs pull"
    by_bytes = next((kind for magic, kind in _MAGIC_UNREADABLE if magic.match(data[:_HEAD])), None)
    kind = _UNREADABLE.get(Path(name).suffix.lower()) or by_bytes
    if kind == "HEIC" and not _decodes_heic():
        return "HEIC; pip install pillow-heif, or convert it to PNG or JPEG"
    if kind:
        return f"{kind}, which is not read here; convert it to PNG or JPEG"
    return next((what for magic, what in _MAGIC_NO_IMAGE if magic.match(data[:_HEAD])), "no known format")


def _refuse_misread(opened: Any, name: str) -> None:
    """Raise ``DataError`` for what Pillow takes for something else.

    These are 8 bits with a sign, where -1 would be white, and 16 bits of colours that lie apart, each byte of which
    would be a pixel.
    """
    if opened.mode.startswith(("I", "F")):
        return
    if _tag(opened, _SIGN) == _SIGNED:
        raise DataError(f"{name}: 8-bit values with a sign would be read without it. Convert it to plain 8 bits.")
    raw = any(tile[0] == "raw" for tile in opened.tile)
    if raw and _tag(opened, _PLANAR) == _APART and (_tag(opened, _BITS) or 0) > _BYTE:
        raise DataError(f"{name}: a TIFF of 16-bit colours that lie apart would be misread. Convert it to 8 bits.")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _to_eight_bits(image: Any, opened: Any, name: str, largest: float | None) -> Any:
    """Scale a deep grey image (12, 16 or 32 bits, or float) to 8 bits."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image, dtype=np.float64)
    if opened.format == "TIFF" and (_tag(opened, _SIGN) or _UNSIGNED) == _UNSIGNED:
        values = np.where(values < 0, values + 2**32, values)  # Pillow gives the upper half of 32 bits a sign
    if not np.isfinite(values).all():
        raise DataError(f"{name}: pixel values that are not finite.{SKIP_BAD}")
    low, high = _range(opened, values, name, largest)
    scaled = ((values - low) / (high - low)).clip(0, 1)
    if _tag(opened, _PHOTOMETRIC) == _WHITE_IS_ZERO:
        scaled = 1 - scaled  # Pillow turns these over in 8 bits only
    return Image.fromarray((scaled * 255).astype(np.uint8))


def _range(opened: Any, values: Any, name: str, largest: float | None) -> tuple[float, float]:
    """Return the values of black and white.

    Raises:
        DataError: Neither the file nor the type of its values tells them.
    """
    if largest is not None:
        return 0.0, largest
    declared = _declared(opened)
    if declared is not None:
        if (values > declared[1]).mean() > _TOO_BRIGHT:
            raise DataError(f"{name}: most values lie above {declared[1]:g}, which the file declares as the largest.")
        return declared
    least, most = float(values.min(initial=0)), float(values.max(initial=0))
    if opened.mode.startswith("F"):
        if least >= 0 and (most <= 1 or 32 <= most <= 255):
            return 0.0, 1.0 if most <= 1 else 255.0
        kind = "neither from 0 to 1 nor from 0 to 255"
    elif opened.format == "PPM" or (_is_16_bit(opened) and (most > 65535 / 4 or most == 0)):
        return 0.0, 65535.0  # Pillow scales a PPM by the range in its head
    else:
        kind = "which leaves open how many bits are used" if _is_16_bit(opened) else "of a type without a usual range"
    raise DataError(f"{name}: values from {least:g} to {most:g}, {kind}, and the file declares no range. {_RANGE_HINT}")


def _is_16_bit(opened: Any) -> bool:
    return bool(opened.mode.startswith("I;16")) or (opened.mode == "I" and opened.format == "PNG")


def _declared(opened: Any) -> tuple[float, float] | None:
    """Return the range a TIFF declares, if it does."""
    for least, most in ((_S_MIN_SAMPLE, _S_MAX_SAMPLE), (_MIN_SAMPLE, _MAX_SAMPLE)):
        low, high = _tag(opened, least) or 0.0, _tag(opened, most)
        if high is not None and high > low:
            return low, high
    described = _description(opened)
    if described.startswith("ImageJ="):
        ends = [re.search(rf"^{end}=(-?[\d.]+)$", described, re.MULTILINE) for end in ("min", "max")]
        if ends[1] is not None and float(ends[1][1]) > (low := float(ends[0][1]) if ends[0] else 0.0):
            return low, float(ends[1][1])
    bits = re.search(r'SignificantBits="(\d{1,2})"', described)
    depth = int(bits[1]) if bits else _tag(opened, _BITS)
    if depth is not None and opened.mode.startswith("I") and 8 < depth < (17 if bits else 16):
        return 0.0, float(2 ** int(depth) - 1)
    return None


def _description(opened: Any) -> str:
    found = getattr(opened, "tag_v2", {}).get(_DESCRIPTION, "")
    return found if isinstance(found, str) else ""


def _tag(opened: Any, number: int) -> float | None:
    """Return the number in a TIFF's tag; of one per sample the largest."""
    value: Any = getattr(opened, "tag_v2", {}).get(number)
    if isinstance(value, Sequence) and value and not isinstance(value, str | bytes):
        value = max(value)
    try:
        return None if value is None or isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, ZeroDivisionError):
        return None


def _is_deep_colour(opened: Any) -> bool:
    """Return whether Pillow will drop the lower 8 of 16 bits of each colour."""
    if opened.mode.startswith("I"):
        return False
    for tile in opened.tile:
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if any(isinstance(one, str) and ";16" in one for one in arguments):
            return True
    return False


def _check_deep_colour(image: Any, opened: Any, name: str, largest: float | None) -> None:
    """Refuse a colour image of 16 bits that does not use them all: its upper 8 bits are near-black."""
    declared = (0.0, largest) if largest is not None else _declared(opened)
    colours = zip(image.getbands(), image.getextrema(), strict=True)
    most = max(high for band, (_, high) in colours if band not in ("A", "a", "X"))
    full = most >= 64 if declared is None else declared[1] >= 65535 * 0.99
    if not full:
        raise DataError(
            f"{name}: a colour image of 16 bits that uses a part of its range (up to {256 * most + 255})."
            f" Convert it to 8 bits, or, if it is right, set base.preprocess.range to 65535 in treelora.yaml."
        )
