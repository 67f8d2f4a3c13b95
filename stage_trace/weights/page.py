"""Global weights as one HTML page: a table of latents, and for each what feeds it and what it feeds."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from shared.latents.global_weights import Connection, GlobalWeights
from shared.lm.hookpoint import HookPoint
from stage_trace.known import Known
from stage_trace.page import self_contained

MOST_LATENTS = 6144
"""On a page, which then stays below 3 MB."""
SHOWN, WORDS = 8, 4
"""Connections in each direction, and tokens, of a latent."""


def weights_page(weights: GlobalWeights, known: Known) -> str:
    """The whole page, of the latents with the strongest sources where there are more than fit."""
    chosen = _strongest(weights)
    shown = f"{len(chosen):,} latents"
    told = (
        "all" if len(chosen) == weights.num_latents else f"of {weights.num_latents:,}, those with the strongest sources"
    )
    return self_contained(
        "Global weights",
        "weights.html",
        ("weights.js",),
        {
            "facts": [
                ("Shown", shown, told),
                ("Layers", ", ".join(map(str, weights.layers)), "that a dictionary reads"),
                ("Sample", f"{weights.meta.tokens:,} tokens", "behind every average"),
                ("Kept", f"{weights.meta.most}", f"connections per latent and direction; the page shows {SHOWN}"),
            ],
            "latents": list(_latents(weights, known, chosen)),
            "footer": (
                "A figure is the target-weighted expected residual attribution of Ameisen et al. 2025: the virtual"
                " weight from a source's decoder to a target's encoder through the residual stream, at mean norm"
                " factors, times the mean of the source's activation over tokens, weighted by the target's. Paths"
                " through attention are not in it. Strength is no proof: what the model does when a latent is ablated"
                " only an intervention says."
            ),
        },
    )


def _strongest(weights: GlobalWeights) -> list[int]:
    """Numbers of the latents to show, ascending."""
    first = np.concatenate([np.abs(weights.array(f"{end}/twera").all()[:, :1]) for end in ("sources", "targets")], 1)
    order = np.argsort(-first.max(1), kind="stable")[:MOST_LATENTS]
    return sorted(int(number) for number in order)


def _latents(weights: GlobalWeights, known: Known, chosen: Sequence[int]) -> Iterator[list[Any]]:
    outputs = {layer: HookPoint(layer, "mlp_out") for layer in weights.layers}
    words = {layer: known.words(output, WORDS) for layer, output in outputs.items()}
    fired = weights.array("fired").all()
    for number in chosen:
        layer, latent = weights.place(number)
        firing, promoted = (one[latent] if one else [] for one in words[layer])
        name = known.name_of(outputs[layer], latent)
        yield [
            layer, latent, float(f"{fired[number] / max(1, weights.meta.tokens):.3g}"), name,
            firing, promoted,
            *([_told(one) for one in end(layer, latent)[:SHOWN]] for end in (weights.sources, weights.targets)),
        ]  # fmt: skip


def _told(one: Connection) -> list[Any]:
    return [f"{one.layer}/{one.latent}", float(f"{one.twera:.3g}"), float(f"{one.weight:.3g}"), one.both]
