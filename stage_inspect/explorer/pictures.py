"""Pictures as a latent's page shows them: what is drawn over the thumbnail, and the text beside it."""

import base64
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from shared.basics.images import EncodedImage, thumbnail
from shared.latents import Latents, SeenPicture
from stage_inspect.explorer.explained import short

if TYPE_CHECKING:
    from stage_inspect.regions.looking import Looking

PICTURES = 12  # that a page begins with
LOOKED_AT = 4  # times as many, among which the same image in other documents is told once
IN_A_BOX = 60  # latents listed for a box
TEXT_CHARACTERS = 280  # shown before and behind a picture


def pictures_of(latents: Latents, index: int) -> dict[str, Any] | None:
    """What the page of a latent says of images; None where the folder is of a store of text."""
    if not latents.has_pictures:
        return None
    counts, numbers = latents.meta.counts, latents.latent(index).numbers
    kinds = [
        [kind, int(numbers[f"fired_{kind}"]), int(counts[f"tokens_{kind}"])]
        for kind in ("image", "text", "assistant")
        if f"tokens_{kind}" in counts
    ]
    found = latents.pictures(index, LOOKED_AT * PICTURES)
    return {"kinds": kinds, "shown": [shown(group) for group in by_image(found)[:PICTURES]]}


def by_image(found: Sequence[SeenPicture]) -> list[list[SeenPicture]]:
    """Pictures of the same image together, the strongest first."""
    groups: dict[str, list[SeenPicture]] = {}
    for one in found:
        groups.setdefault(one.sha256, []).append(one)
    return list(groups.values())


def shown(group: Sequence[SeenPicture]) -> dict[str, Any]:
    """The strongest picture of one image; `grids` are rows, columns, x, y, dx, dy, `cells` grid, row, column."""
    one = group[0]
    before, after = one.texts
    return {
        "thumbnail": one.thumbnail,
        "sha256": one.sha256,
        "value": float(f"{one.value:.6g}"),
        "context": one.context,
        "position": one.position,
        "width": one.width,
        "height": one.height,
        "grids": [[grid.rows, grid.cols, *(short(part) for part in (grid.x, grid.y, grid.dx, grid.dy))]
                  for grid in one.grids],
        "cells": [[grid, *cell] for grid, cell in zip(one.grid.tolist(), one.cell.tolist(), strict=True)],
        "a": [short(value) for value in one.values],
        "before": before[-TEXT_CHARACTERS:],
        "after": after[:TEXT_CHARACTERS],
        "others": len(group) - 1,
    }  # fmt: skip


def images_of(looking: "Looking", context: int) -> dict[str, Any]:
    """The images of a context of the store, to draw boxes on. Raises GranaryError for a context that is not there."""
    found = []
    for number, (first, *_) in enumerate(looking.images(context)):
        small = thumbnail(EncodedImage(looking.data(first.sha256), first.row))
        found.append(
            {
                "number": number,
                "sha256": first.sha256,
                "width": first.width,
                "height": first.height,
                "address": address(small),
            }
        )
    return {"context": context, "images": found}


def boxed(looking: "Looking", context: int, number: int, box: Sequence[float]) -> dict[str, Any]:
    """The latents that fire in a box. Raises GranaryError for one that meets no region."""
    found = looking.box(context, number, box)
    listed = [
        {name: short(value) if name != "latent" else value for name, value in asdict(one).items()}
        for one in found.latents
    ]
    orders = [sorted(listed, key=key)[:IN_A_BOX] for key in (contrast, lambda one: -one["strength"])]
    unique = {one["latent"]: one for order in orders for one in order}
    return {"regions": short(found.regions), "latents": list(unique.values()), "total": len(listed)}


def contrast(one: dict[str, Any]) -> float:
    """The smaller, the more the mean inside is above that outside."""
    return float(one["outside"] - one["inside"])


def address(data: bytes) -> str:
    """A thumbnail as a data URI."""
    return f"data:image/webp;base64,{base64.b64encode(data).decode()}"
