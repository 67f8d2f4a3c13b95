"""Latents folders, format 3: what each latent of a dictionary does. Names are imported when they are first used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shared.latents.examples import Example
    from shared.latents.folder import Latent, Latents
    from shared.latents.notes import Notes
    from shared.latents.pictures import SeenPicture
    from shared.latents.vocabulary import Piece, Vocabulary

_HOMES = {
    "Example": "examples",
    "Latent": "folder",
    "Latents": "folder",
    "Notes": "notes",
    "Piece": "vocabulary",
    "SeenPicture": "pictures",
    "Vocabulary": "vocabulary",
}

__all__ = ["Example", "Latent", "Latents", "Notes", "Piece", "SeenPicture", "Vocabulary"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"shared.latents.{_HOMES[name]}"), name)
