"""Small dictionaries of every kind in learning, and activations for them."""

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from shared.sae.contexts import Contexts
from shared.sae.learn.config import learning_of
from shared.sae.learn.objective import Objective
from shared.sae.sites import Sites, SiteWidths
from shared.sae.variants import VARIANTS

IN, OUT = "layers.2.mlp_in", "layers.2.mlp_out"
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "topk": {"k": 4},
    "batchtopk": {"k": 4},
    "relu": {"penalty": "tanh", "penalty_weight": 0.1},
    "jumprelu": {"penalty": "tanh", "penalty_weight": 0.1, "bandwidth": 1.0},
    "gated": {"penalty": "l1", "penalty_weight": 0.1},
}
RANKS = {4: 2, 2: 6, 1: 10}
"""Of the transforms of a MoLT."""
PLACES: dict[str, tuple[Sites, SiteWidths]] = {
    "sae": (Sites.of(OUT), SiteWidths((9,), (9,))),
    "transcoder": (Sites((IN,), (OUT,)), SiteWidths((9,), (7,))),
    "skip_transcoder": (Sites((IN,), (OUT,)), SiteWidths((9,), (7,))),
    "molt": (Sites((IN,), (OUT,)), SiteWidths((9,), (7,))),
    "clt": (
        Sites(
            ("layers.0.mlp_in", "layers.1.mlp_in", "layers.2.mlp_in"), tuple(f"layers.{n}.mlp_out" for n in range(3))
        ),
        SiteWidths((9, 6, 5), (7, 4, 8)),
    ),
    "crosscoder": (Sites.of(IN, OUT), SiteWidths((9, 4), (9, 4))),
    "lorsa": (Sites((IN,), (OUT,), "sequence"), SiteWidths((9,), (7,))),
}
"""Where each kind reads and writes, of unequal widths."""
ATTENTION = {"qk_heads": 4, "qk_width": 6, "scale": 0.4, "frequencies": (1.0, 0.3)}
"""Of a Lorsa, which reads whole contexts: ``contexts`` makes them."""
OF_ROWS = tuple(kind for kind in PLACES if kind != "molt")
"""Kinds whose latents write a row each, which is what can be inspected."""
OF_TOKENS = tuple(kind for kind in PLACES if kind != "lorsa")
"""Kinds that read one token at a time."""


def make(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, **given: Any) -> Objective:
    """One of this kind, random; `given` are fields of its config and of its learning."""
    sites, widths = given.pop("places", None) or PLACES[kind]
    given = {
        "d_latent": 60 if kind == "clt" else 40,
        "activation": "topk",
        "pre_bias": sites is None or sites.is_autoencoder,
        **given,
    }
    if kind == "molt":
        given = {"ranks": RANKS, **given, "d_latent": sum(given.get("ranks", RANKS).values())}
    if kind == "lorsa":
        sites, given = replace(sites, unit="sequence"), {**ATTENTION, **given}
    given = {**ACTIVATIONS[given["activation"]], **given}
    how = learning_of(kind)
    taught = {field.name for field in fields(how)}
    made = VARIANTS[kind]
    config = made.config_class.of(widths, {name: one for name, one in given.items() if name not in taught}, sites)
    dictionary = made(config, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return Objective(dictionary, how(**{name: one for name, one in given.items() if name in taught}))


def batch(objective: Objective, rows: int = 32, seed: int = 1) -> tuple[Tensor, Tensor]:
    """What is read, of a mean, and what must be written, by some map of it; the same for an autoencoder."""
    made = objective.dictionary
    generator = torch.Generator().manual_seed(seed)
    dtype = made.b_dec.dtype
    x_ND = torch.randn(rows, made.widths.d_in, generator=generator, dtype=dtype) * 3 + 1
    if made.config.is_autoencoder:
        return x_ND, x_ND
    map_DD = torch.randn(
        made.widths.d_in, made.widths.d_out, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )
    return x_ND, torch.relu(x_ND @ map_DD.to(dtype)) + 2


def contexts(objective: Objective, number: int = 3, length: int = 7, seed: int = 1) -> tuple[Contexts, Tensor]:
    """Contexts of two documents and padding, of which most positions count, and what must be written at those."""
    generator = torch.Generator().manual_seed(seed)
    x_ND, y_ND = batch(objective, number * length, seed)
    documents_CT = torch.zeros(number, length, dtype=torch.int64)
    for context in range(number):
        documents_CT[context, 2 + context % (length - 3) :] = 1
    documents_CT[:, -1] = -1
    counts_CT = (torch.rand(number, length, generator=generator) < 0.8) & (documents_CT >= 0)
    given = Contexts.of(x_ND.view(number, length, -1), documents_CT, counts_CT)
    return given, given.counted(y_ND.view(number, length, -1))
