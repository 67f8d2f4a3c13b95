"""The column of images beside a column of documents: the one reader of its values, whatever holds the rows."""

from pathlib import Path
from typing import Any

import numpy as np

from shared.basics.errors import GranaryError
from shared.basics.images import encoded_image
from stage_harvest.corpus.base import Content, Pictured
from stage_harvest.corpus.files import SourceFile


def pictured_in(content: Content, images: Any, file: SourceFile, row: str, column: str) -> Pictured:
    """`pictured` of a row or line of `file`; files of images lie below the folder of a local one."""
    folder = Path(file.path).parent if file.is_local else None
    return pictured(content, images, column, where=f"{file.path} {row}", row=f"{file.name} {row}", folder=folder)


def pictured(
    content: Content, images: Any, column: str, *, where: str, row: str, folder: Path | None = None
) -> Pictured:
    """A document with the images of its row: a list of what `shared.basics.images.encoded_image` takes, one, or null.

    Files of images lie below `folder`; None: there are none. `row` is what the store records. Raises GranaryError
    naming `where` for what is no image, and for token ids, which have no placeholders.
    """
    if isinstance(content, np.ndarray | Pictured):
        raise GranaryError(f"{where} holds token ids beside {column!r}: images need text or chat messages")
    values = images if isinstance(images, list) else [images]
    found = [encoded_image(one, folder, f"{where}, image {number}") for number, one in enumerate(values, 1)]
    return Pictured(content, tuple(one for one in found if one is not None), row)
