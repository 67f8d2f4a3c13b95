"""Sounds and images as corpora: a folder of files, or a column of parquet files; for models that read no text."""

import io
import random
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.parquet

from shared.basics.errors import GranaryError, first_line
from shared.basics.images import EncodedImage, encoded_image
from stage_harvest.corpus.files import SourceFile, describe_files, find_files, ordered, read_whole, reading

ROWS_PER_READ = 8  # of megabytes each
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
M = TypeVar("M", "Sound", EncodedImage)


@dataclass(frozen=True, eq=False, slots=True)
class Sound:
    """Samples of one channel, the mean of several, between -1 and 1."""

    samples: npt.NDArray[np.float32]
    rate: int
    """Samples per second."""
    where: str
    """File, or file and row, for the line that refuses it."""


class MediaFiles(Generic[M]):
    """Each file is one, or each row of `column` in parquet files; nulls are left out."""

    suffixes: tuple[str, ...]

    def __init__(self, files: str, column: str | None) -> None:
        self.files = find_files(files, self.suffixes if column is None else (".parquet",))
        self.column = column

    @property
    def description(self) -> str:
        """One line for a store's metadata; the same wherever the files lie."""
        column = "" if self.column is None else f", column {self.column}"
        return describe_files(type(self).__name__.lower(), self.files) + column

    def items(self, order: random.Random | None = None) -> Iterator[M]:
        """Each in turn; `order` shuffles the files. Raises GranaryError on what can't be read."""
        for file in ordered(self.files, order):
            with reading(file):
                if self.column is None:
                    with file.open(decompress=False) as stream:
                        yield self.of_value(read_whole(stream, file), file, file.path)
                else:
                    yield from self._rows(file, self.column)

    def of_value(self, value: Any, file: SourceFile, where: str) -> M:
        """One from the bytes of a file, or what a column holds."""
        raise NotImplementedError

    def _rows(self, file: SourceFile, column: str) -> Iterator[M]:
        row = 0
        with file.open(decompress=False) as stream:
            try:
                table = pyarrow.parquet.ParquetFile(stream)
            except pyarrow.ArrowInvalid as error:
                raise GranaryError(f"{file.path} is not a parquet file: {first_line(error)}") from error
            names = table.schema_arrow.names
            if column not in names:
                raise GranaryError(f"{file.path} has no column {column!r}: there are {', '.join(names)}")
            for batch in table.iter_batches(batch_size=ROWS_PER_READ, columns=[column]):
                for value in batch.column(0):
                    row += 1
                    if (given := value.as_py()) is not None:
                        yield self.of_value(given, file, f"{file.path} row {row}")


class Sounds(MediaFiles[Sound]):
    """WAV files; in a column their bytes (``{bytes, path}``, or bytes) or ``{array, sampling_rate}``."""

    suffixes = (".wav",)

    def of_value(self, value: Any, file: SourceFile, where: str) -> Sound:
        if isinstance(value, dict) and value.get("array") is not None:
            samples, rate = np.asarray(value["array"], np.float32), value.get("sampling_rate")
            if samples.ndim != 1 or type(rate) is not int or rate < 1 or not np.isfinite(samples).all():
                raise GranaryError(f"{where} holds no sound: array must be a list of numbers beside its sampling_rate")
            return Sound(samples, rate, where)
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise GranaryError(f"{where} holds no sound: give the bytes of a WAV file, or array and sampling_rate")
        return read_wav(data, where)


class Images(MediaFiles[EncodedImage]):
    """Files of images; in a column ``{bytes, path}``, bytes, or paths below the folder of the parquet file."""

    suffixes = IMAGE_SUFFIXES

    def of_value(self, value: Any, file: SourceFile, where: str) -> EncodedImage:
        found = encoded_image(value, Path(file.path).parent if file.is_local else None, where)
        if found is None:
            raise GranaryError(f"{where} holds no image")
        return found


def read_wav(data: bytes, where: str) -> Sound:
    """An uncompressed WAV file of 8, 16, 24 or 32 bits. Raises GranaryError naming `where` for any other bytes."""
    try:
        with wave.open(io.BytesIO(data)) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            frames = file.readframes(file.getnframes())
        if width == 1:
            values = np.frombuffer(frames, np.uint8).astype(np.int32) - 128
        elif width == 3:
            bytes_N3 = np.frombuffer(frames, np.uint8).reshape(-1, 3).astype(np.int32)
            values = (bytes_N3[:, 0] << 8 | bytes_N3[:, 1] << 16 | bytes_N3[:, 2] << 24) >> 8
        else:
            values = np.frombuffer(frames, {2: "<i2", 4: "<i4"}[width]).astype(np.int64)
        samples = (values / 2.0 ** (8 * width - 1)).reshape(-1, channels).mean(1)
    except (wave.Error, EOFError, ValueError, KeyError) as error:
        raise GranaryError(
            f"{where} is no WAV file that can be read ({first_line(error)}): write it uncompressed, as PCM"
        ) from error
    if not samples.size or rate < 1:
        raise GranaryError(f"{where} holds no sound: it is empty")
    return Sound(samples.astype(np.float32), rate, where)
