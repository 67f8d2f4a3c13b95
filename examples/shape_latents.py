"""Which latents of an SAE are the shapes of `examples/shapes.py`, and what the model says when one is set in a box.

    python examples/shape_latents.py shapes runs/shapes runs/shapes_heldout

after the harvests and the training of docs/shapes.md. It prints what it finds and writes ``shapes/found.json``.

The rule. A concept is a pattern of a colour, "striped red". For each, latent and threshold (a tenth to nine tenths of
the latent's largest value) are chosen on pictures that the SAE was trained on, by the intersection over union of the
cells where it fires and the cells that shapes of that name cover by half, summed over all pictures, so that firing
where there is no such shape costs. What is told is the same figure of that latent and threshold on the held-out
pictures. SAEs of random directions, with as many latents, the same k, centre and scale, are searched by the same rule.
"""

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from granary import SAE, Edit, SplicedModel, Store, VisionReader, Where, load, load_tokenizer

try:
    from examples.shapes import COLOURS, GRID, PATCH, PATTERNS, Thing, drawn, said_of, scene
except ModuleNotFoundError:  # started as a script
    from shapes import COLOURS, GRID, PATCH, PATTERNS, Thing, drawn, said_of, scene  # type: ignore

CONCEPTS = tuple(f"{pattern} {colour}" for colour in COLOURS for pattern in PATTERNS)
TENTHS = torch.arange(1, 10) / 10
FOUND = 0.5  # the IoU from which on a concept counts as found


@dataclass(frozen=True)
class Found:
    """The latent of a concept."""

    latent: int
    threshold: float
    """It counts as firing above this."""
    value: float
    """Its mean where it fires."""
    iou: float
    """On the pictures that it was chosen on, or, after `scored`, on others."""


def covered(numbers: Sequence[int]) -> Tensor:
    """Whether the shapes that each concept names cover half of each cell or more, bool [N, CELLS, C]."""
    found = np.zeros((len(numbers), GRID, GRID, len(CONCEPTS)), np.bool_)
    for row, number in enumerate(numbers):
        for thing in scene(number):
            share = thing.mask().reshape(GRID, PATCH, GRID, PATCH).mean((1, 3))
            found[row, ..., CONCEPTS.index(thing.name)] |= share >= 0.5
    return torch.from_numpy(found).flatten(1, 2)


def read(store: Store, limit: int) -> tuple[list[int], Tensor]:
    """The numbers of the first pictures of a store of one site, and the activations of their cells [N, CELLS, D]."""
    contexts, (site,) = range(min(limit, store.num_contexts)), store.hooks
    numbers = [int(Path(store.pictures.rows_of(context)[0].path).stem) for context in contexts]
    is_cell = torch.from_numpy(store.pictures.chosen(contexts, ["image"]))
    return numbers, torch.stack([store.read_context(site, one).float()[is_cell[one]] for one in contexts])


def opened(path: str) -> tuple[Any, VisionReader, Any]:
    """Model, image reader and tokenizer of a folder."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(path).eval(), VisionReader.load(path), load_tokenizer(path)


def heat(sae: SAE, x_NCD: Tensor) -> Tensor:
    """All latents of all cells, dense [N, CELLS, F]."""
    with torch.no_grad():
        return sae.encode(x_NCD).to_dense(sae.config.d_latent)


def ious(fires: Tensor, covers: Tensor) -> Tensor:
    """Intersection over union of cells, summed over pictures, [F, C]; fires [N, CELLS, F], covers [N, CELLS, C]."""
    fires, covers = fires.flatten(0, 1).float(), covers.flatten(0, 1).float()
    both = fires.T @ covers
    return both / (fires.sum(0)[:, None] + covers.sum(0) - both).clamp_min(1)


def chosen(heat_NCF: Tensor, covers: Tensor) -> dict[str, Found]:
    """Of each concept that is shown, the latent and threshold with the highest IoU."""
    most_F = heat_NCF.flatten(0, 1).max(0).values
    table = torch.stack([ious(heat_NCF > tenth * most_F, covers) for tenth in TENTHS])
    found = {}
    for place, concept in enumerate(CONCEPTS):
        if not covers[..., place].any():
            continue
        tenth, latent = divmod(int(table[..., place].argmax()), len(most_F))
        threshold = float(TENTHS[tenth] * most_F[latent])
        seen = heat_NCF[..., latent]
        value = float(seen[seen > threshold].mean())
        found[concept] = Found(latent, threshold, value, float(table[tenth, latent, place]))
    return found


def scored(found: Mapping[str, Found], heat_NCF: Tensor, covers: Tensor) -> dict[str, Found]:
    """The same latents and thresholds on other pictures."""
    made = {}
    for concept, one in found.items():
        iou = ious(heat_NCF[..., [one.latent]] > one.threshold, covers[..., [CONCEPTS.index(concept)]])
        made[concept] = replace(one, iou=float(iou))
    return made


def random_like(sae: SAE, seed: int) -> SAE:
    """An SAE of random directions with the same activation, centre and scale."""
    made = SAE(sae.config, generator=torch.Generator().manual_seed(seed))
    learnt = {"W_enc", "W_dec", "b_enc"}
    made.load_state_dict({name: one for name, one in sae.state_dict().items() if name not in learnt}, strict=False)
    return made


def around(thing: Thing) -> tuple[float, float, float, float]:
    """The cells that a shape touches, as a box in pixels."""
    left, top = (place // PATCH * PATCH for place in (thing.left, thing.top))
    right, bottom = (-(-(place + thing.size) // PATCH) * PATCH for place in (thing.left, thing.top))
    return left, top, right, bottom


@dataclass(frozen=True)
class Steered:
    """Captions of held-out pictures while the left shape's latent is 0 in the box around it, and another's is set."""

    pictures: int
    took: float
    """Share of them in which the left shape was called what the other latent stands for."""
    kept: float
    """Share in which the right shape was called what it was called before."""


def steered(model: Any, reader: VisionReader, tokenizer: Any, sae: SAE, site: str, found: Mapping[str, Found],
            numbers: Sequence[int]) -> Steered:  # fmt: skip
    """Call the left shape of each picture something else; `found` has the concepts that may be taken away and given."""
    said = []
    for number in numbers:
        thing, image = scene(number)[0], drawn(number)
        others = [name for name in found if name != thing.name]
        if thing.name not in found or not others:
            continue
        wanted, where = random.Random(number).choice(others), Where(image=0, box=around(thing))
        values = {found[thing.name].latent: 0.0, found[wanted].latent: found[wanted].value}
        edit = Edit(list(values), "set", list(values.values()), where=where)
        pixels = reader.processor(images=[image], return_tensors="pt").pixel_values
        spliced = SplicedModel(model, sae, site, edits=[edit], pictures=reader.shown([[image]]))
        before, after = (said_of(one, tokenizer, pixels)[0].split(" and ") for one in (model, spliced))
        said.append((after[0].strip() == wanted, after[1:] == before[1:]))
    took, kept = np.mean(said, axis=0) if said else (0.0, 0.0)
    return Steered(len(said), float(took), float(kept))


def strangers(found: Mapping[str, Found], heat_NCF: Tensor) -> dict[str, Found]:
    """For each concept another latent, that fires about as often and is no concept's, set to its own mean."""
    fires_F = (heat_NCF.flatten(0, 1) > 0).float().mean(0)
    free = set(fires_F.nonzero()[:, 0].tolist()) - {one.latent for one in found.values()}
    made = {}
    for concept, one in found.items():
        if not free:
            break
        latent = min(free, key=lambda other: abs(float(fires_F[other] - fires_F[one.latent])))
        free.remove(latent)
        seen = heat_NCF[..., latent]
        made[concept] = Found(latent, 0.0, float(seen[seen > 0].mean()), 0.0)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Choose, score, steer, and say it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what examples/shapes.py wrote")
    parser.add_argument("run", type=Path, help="store and SAE of its rows")
    parser.add_argument("heldout", type=Path, help="store of its held-out rows")
    parser.add_argument("--pictures", type=int, default=1024, help="that latents are chosen on")
    parser.add_argument("--steered", type=int, default=128, help="held-out pictures in which a latent is set")
    parser.add_argument("--random", type=int, default=3, help="SAEs of random directions")
    arguments = parser.parse_args(argv)
    sae, store = load(arguments.run / "sae"), Store.open(arguments.run / "store")
    (site,) = store.hooks
    numbers, x = read(store, arguments.pictures)
    held, x_held = read(Store.open(arguments.heldout / "store"), arguments.pictures)
    covers, covers_held = covered(numbers), covered(held)

    def searched(sae: SAE) -> tuple[dict[str, Found], dict[str, Found]]:
        by_train = chosen(heat(sae, x), covers)
        return by_train, scored(by_train, heat(sae, x_held), covers_held)

    found, learnt = searched(sae)
    others = [searched(random_like(sae, seed))[1] for seed in range(arguments.random)]
    print(f"{'concept':16}{'latent':>7}{'IoU':>7}   random SAEs")  # noqa: T201
    for concept, one in learnt.items():
        print(f"{concept:16}{one.latent:7d}{one.iou:7.2f}   {'  '.join(f'{o[concept].iou:.2f}' for o in others)}")  # noqa: T201

    for name, one in (("learnt", learnt), *((f"random {seed}", one) for seed, one in enumerate(others))):
        values = [each.iou for each in one.values()]
        many = sum(value >= FOUND for value in values)
        print(f"{name}: {many} of {len(values)} have an IoU of {FOUND} or more, mean {np.mean(values):.2f}")  # noqa: T201

    given = (*opened(str(arguments.folder / "model")), sae, site)
    clear = {concept: one for concept, one in found.items() if one.iou >= FOUND}
    numbers = held[: arguments.steered]
    result = {
        "learnt": learnt,
        "random": others,
        "steered": steered(*given, clear, numbers),
        "strangers": steered(*given, strangers(clear, heat(sae, x)), numbers),
    }
    for name in ("steered", "strangers"):
        one = result[name]
        print(f"{name}: {one.took:.0%} of {one.pictures} are called what was set, {one.kept:.0%} keep the other's name")  # noqa: T201
    (arguments.folder / "found.json").write_text(json.dumps(result, default=asdict, indent=1) + "\n")


if __name__ == "__main__":
    main()
