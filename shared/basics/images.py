"""Encoded images from strangers: checked by their header before anything is decoded, then RGB and upright.

Needs pillow (the extra ``vision``), which is imported where an image is opened.
"""

import hashlib
import io
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.basics.errors import GranaryError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 64 * 1024 * 1024
MOST_BYTES = 256 << 20
THUMBNAIL, THUMBNAIL_QUALITY = 256, 85
THUMBNAIL_BYTES = 1 << 18
_VP8 = b"\x9d\x01\x2a"  # what a frame of it begins with
_FINE = ("I", "I;16", "I;16B", "I;16L", "I;16N")  # grey of 16 bits
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:", re.ASCII)


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """The bytes of an image file as they came, and where they came from."""

    data: bytes
    where: str
    """File and row, and which image of it, for the line that refuses it."""
    path: str | None = None
    """The file that the bytes are from, as the corpus names it; None where the corpus gives bytes alone."""

    @cached_property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of the encoded bytes."""
        return hashlib.sha256(self.data).hexdigest()

    def decode(self) -> "Image":
        """The image in RGB, turned as its EXIF orientation says, transparent parts on white; the first of several.

        Raises GranaryError naming `where` for bytes that are no whole image, and, before they are decoded, for more
        than `MOST_PIXELS` pixels.
        """
        image_module, ops = pillow()
        try:
            with image_module.open(io.BytesIO(self.data)) as opened:
                width, height = opened.size
                if width * height > MOST_PIXELS:
                    raise GranaryError(
                        f"{self.where}: the image has {width:,} x {height:,} pixels, more than {MOST_PIXELS:,}: make it"
                        " smaller, or leave it out"
                    )
                opened.load()
                return _rgb(ops.exif_transpose(opened))
        except GranaryError:
            raise
        except (image_module.DecompressionBombError, image_module.DecompressionBombWarning) as error:
            raise GranaryError(f"{self.where}: the image is too large: {first_line(error)}") from error
        except Exception as error:  # of a decoder, from bytes that may be anything
            raise GranaryError(f"{self.where} is no image that can be read: {_told(error)}") from error


def encoded_image(value: Any, folder: Path | None, where: str) -> EncodedImage | None:
    """The image that a value of a corpus gives: ``{bytes, path}`` as Hugging Face's Image writes it, bytes, or a path.

    Paths lie in `folder` and may not lead out of it; None for `folder`: there are no files. None for a null. Raises
    GranaryError naming `where` for any other value, a file that is not there, and an address that would be fetched.
    """
    if value is None:
        return None
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if isinstance(data, str):
        data, path = None, data
    if isinstance(data, bytes | bytearray | memoryview) and len(data):
        _check_size(len(data), where)
        return EncodedImage(bytes(data), where, path if isinstance(path, str) else None)
    if not isinstance(path, str) or not path:
        raise GranaryError(f"{where} holds no image: it must be {{bytes, path}}, bytes, or the path of a file")
    return EncodedImage(_read(path, folder, where), f"{where}: {path}", path)


def thumbnail(image: EncodedImage) -> bytes:
    """The image as WebP of at most `THUMBNAIL` pixels a side; raises GranaryError as `EncodedImage.decode` does."""
    small, buffer = image.decode(), io.BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(buffer, "WEBP", quality=THUMBNAIL_QUALITY)
    return buffer.getvalue()


def is_thumbnail(data: bytes) -> bool:
    """Whether bytes begin as those that `thumbnail` makes, of no more pixels: what a browser may be given to decode."""
    if len(data) > THUMBNAIL_BYTES or data[:4] != b"RIFF" or data[8:16] != b"WEBPVP8 " or data[23:26] != _VP8:
        return False
    return all(1 <= int.from_bytes(data[at : at + 2], "little") <= THUMBNAIL for at in (26, 28))


def _read(path: str, folder: Path | None, where: str) -> bytes:
    if _URL.match(path):
        raise GranaryError(f"{where}: {path[:80]} is an address, and nothing is fetched: give bytes or a local file")
    if folder is None:
        raise GranaryError(f"{where}: {path} names a file, and the corpus lies in no local folder: give bytes")
    root = folder.resolve()
    try:
        file = (root / path).resolve()
        if not file.is_relative_to(root):
            raise GranaryError(f"{where}: {path} lies outside of {folder}, where its images must lie")
        _check_size(file.stat().st_size, where)
        return file.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise GranaryError(f"{where}: the image {path} in {folder} can't be read: {reason}") from error


def _check_size(num_bytes: int, where: str) -> None:
    if num_bytes > MOST_BYTES:
        raise GranaryError(f"{where} holds an image of {num_bytes:,} bytes, more than {MOST_BYTES:,}: leave it out")


def _rgb(image: "Image") -> "Image":
    image_module, _ = pillow()
    if image.mode in _FINE:
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = image_module.new("RGBA", layer.size, (255, 255, 255, 255))
        return image_module.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def pillow() -> tuple[Any, Any]:
    """The modules PIL.Image and PIL.ImageOps; raises GranaryError without the package."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise GranaryError("images need the pillow package: pip install 'granary-sae[vision]'") from error
    return Image, ImageOps


def _told(error: Exception) -> str:
    """What a decoder says, without the address of the stream in memory that Pillow writes."""
    return re.sub(r" ?<_io\.BytesIO[^>]*>", " these bytes", first_line(error))
