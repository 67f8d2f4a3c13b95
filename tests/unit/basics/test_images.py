"""Images: every kind of file comes out RGB and upright, or is refused in one line before it costs memory."""

import hashlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from shared.basics.errors import GranaryError
from shared.basics.images import MOST_PIXELS, EncodedImage, encoded_image

Image = pytest.importorskip("PIL.Image")


def saved(image: object, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[attr-defined]
    return buffer.getvalue()


def decoded(data: bytes) -> np.ndarray:
    image = EncodedImage(data, "rows.parquet row 3").decode()
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (10_000, 10)])
def test_an_rgb_image_keeps_its_pixels(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    assert np.array_equal(decoded(saved(Image.fromarray(pixels))), pixels)


def test_orientation_alpha_cmyk_and_grey() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    assert np.array_equal(decoded(saved(Image.fromarray(pixels), exif=exif)), np.rot90(pixels, -1))
    clear = np.dstack([pixels, np.zeros((4, 6), np.uint8)])
    clear[0, 0, 3] = 255
    shown = decoded(saved(Image.fromarray(clear, "RGBA")))
    assert np.array_equal(shown[0, 0], pixels[0, 0])
    assert (shown.reshape(-1, 3)[1:] == 255).all()
    plain = Image.new("CMYK", (3, 2), (0, 255, 255, 0))
    red = decoded(saved(plain, "JPEG"))[0, 0]
    assert red[0] > 240
    assert red[1:].max() < 15
    fine = decoded(saved(Image.fromarray(np.full((2, 2), 0x80FF, np.uint16))))
    assert (fine == 0x80).all()
    spotted = Image.new("P", (2, 1))
    spotted.putpalette([10, 20, 30, 40, 50, 60])
    spotted.putdata([0, 1])
    assert decoded(saved(spotted, transparency=0)).tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_the_hash_is_of_the_encoded_bytes() -> None:
    image = Image.new("RGB", (3, 3), (1, 2, 3))
    png, jpeg = saved(image), saved(image, "JPEG")
    assert EncodedImage(png, "").sha256 == hashlib.sha256(png).hexdigest() != EncodedImage(jpeg, "").sha256


def png_of(width: int, height: int) -> bytes:
    """A PNG that says it is so large, in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(8192, 8193), (11_000, 11_000), (40_000, 40_000), (2_000_000_000, 1)])
def test_a_bomb_is_refused_by_its_header(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert size[0] * size[1] > MOST_PIXELS
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("it was decoded"))
    with pytest.raises(GranaryError, match=r"rows\.parquet row 3.*(pixels|large)"):
        EncodedImage(png_of(*size), "rows.parquet row 3").decode()


@pytest.mark.parametrize("kind", ["cut", "text", "empty header", "svg"])
def test_a_broken_image_is_one_line_with_its_row(kind: str) -> None:
    whole = saved(Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)), "JPEG")
    data = {"cut": whole[:-300], "text": b"not an image", "empty header": png_of(0, 5), "svg": b"<svg/>"}[kind]
    with pytest.raises(GranaryError) as caught:
        EncodedImage(data, "rows.parquet row 3, image 2").decode()
    told = str(caught.value)
    assert told.startswith("rows.parquet row 3, image 2")
    assert "\n" not in told
    assert "0x" not in told


def test_values_of_a_corpus(tmp_path: Path) -> None:
    data = saved(Image.new("RGB", (2, 2)))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.png").write_bytes(data)
    for value in ({"bytes": data, "path": None}, data, {"bytes": None, "path": "a/b.png"}, "a/b.png"):
        found = encoded_image(value, tmp_path, "row 1")
        assert found is not None
        assert found.data == data
    assert encoded_image({"bytes": data, "path": "cat.png"}, None, "row 1").path == "cat.png"  # type: ignore[union-attr]
    assert encoded_image(None, tmp_path, "row 1") is None


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("../secret.png", "lies outside of"),
        ("/etc/passwd", "lies outside of"),
        ("link/secret.png", "lies outside of"),
        ("a/gone.png", "can't be read: No such file"),
        ("https://example.org/cat.png", "nothing is fetched"),
        ("data:image/png;base64,AAAA", "nothing is fetched"),
        ("a\0b", "can't be read"),
        ({"bytes": None, "path": None}, "holds no image"),
        (3, "holds no image"),
        ({}, "holds no image"),
    ],
)
def test_a_path_stays_in_its_folder_and_nothing_is_fetched(value: object, told: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "images" / "link").symlink_to(tmp_path)
    with pytest.raises(GranaryError, match=f"row 7.*{told}"):
        encoded_image(value, tmp_path / "images", "rows.jsonl row 7")
    with pytest.raises(GranaryError, match="no local folder"):
        encoded_image("a.png", None, "rows.jsonl row 7")
