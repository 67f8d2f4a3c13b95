"""From dictionaries and a store to a folder of global weights and its page."""

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from shared.basics.config import ModelInput, Split
from shared.basics.errors import GranaryError
from shared.basics.files import write_text
from shared.basics.run_folder import WEIGHTS_FILE
from shared.basics.units import human_bytes
from shared.basics.versions import software_versions
from shared.latents.global_weights import MOST, GlobalWeights, GlobalWeightsWriter, WeightsLayer, WeightsMeta
from shared.lm import load_causal_lm
from shared.lm.frozen import run
from shared.lm.linear_parts import LinearParts, linear_parts
from shared.lm.recorded import choose_model
from shared.parallel import init_world
from shared.sae.for_store import weights_sha256
from shared.store import Store
from shared.store.choose import choose_contexts
from shared.store.io.open import open_io
from shared.store.same_model import check_same_model
from stage_trace.known import Known
from stage_trace.places import check_places
from stage_trace.plan import latents_per_token
from stage_trace.session import Source
from stage_trace.sources import find_sources, need_any
from stage_trace.weights.build import CELLS, write_weights
from stage_trace.weights.firing import TERMS, firing
from stage_trace.weights.layers import Layer, layers_of
from stage_trace.weights.page import weights_page

log = logging.getLogger(__name__)

PAGE = "weights.html"
FACTOR_CONTEXTS, FACTOR_TOKENS = 16, 256
"""Of the sample, whose documents' beginnings the mean norm factors are taken over."""
FIRING_BYTES, TILE_BYTES, TERM_BYTES = 40, 130, 90
"""Of a firing, while those of one layer are sorted; of a pair of a tile; of two firings that are looked at."""
UNSORTED_BYTES = 12
"""Of a firing that waits for the last context, in lists whose ends the heap keeps: of all layers of a CLT at once."""


def make_weights(
    paths: Sequence[str],
    store_url: str,
    out: Path,
    *,
    tokens: int,
    most: int,
    model_path: str | None,
    latents: Sequence[str] | None,
    device_name: str,
) -> list[str]:
    """Write the folder with its page, and return lines for a terminal; raises GranaryError for wrong input."""
    if not 1 <= most <= MOST:
        raise GranaryError(f"--most {most}: choose from 1 to {MOST}")
    if tokens < 1:
        raise GranaryError(f"--tokens {tokens}: at least 1")
    device = init_world(device_name).device
    sources = find_sources(paths, device)
    need_any(sources)
    store = Store.open(store_url)
    check_fit(sources, store)
    chosen = choose_model(ModelInput(path=model_path, revision=None, dtype=None, allow_other=False), store)
    known = Known.find(sources, latents)
    contexts = choose_contexts(store, Split.all, max(1, round(tokens / store.seq_len)))
    model = load_causal_lm(chosen.path, chosen.dtype, device=device, revision=chosen.revision)
    parts = linear_parts(model)
    check_places([(source.name, place) for source in sources for place in source.places], len(parts.layers))
    factors = mean_factors(model, parts, store, contexts)
    layers = layers_of(sources, parts, factors)
    for line in plan(layers, len(contexts) * store.seq_len, sources, most):
        log.info("%s", line)
    total = len(contexts) * store.seq_len * len(sources)
    with tqdm(total=total, unit="tok", unit_scale=True, desc="encode") as bar:
        found, num_tokens = firing(store, sources, contexts, bar.update)
    if not num_tokens:
        raise GranaryError(f"no trainable position in the contexts of {store.url}: nothing to average over")
    os.makedirs(out, exist_ok=True)
    writer = GlobalWeightsWriter(open_io(out), most)
    write_weights(layers, found, num_tokens, most, writer)
    writer.finish(
        WeightsMeta(
            layers=[asdict(one) for one in described(layers, sources)],
            most=most,
            tokens=num_tokens,
            store={"url": store.url, "digest": store.digest({store.shard_of(int(one)) for one in contexts})},
            model={"id": chosen.path, "norm_factors": {str(layer): factor for layer, factor in factors.items()}},
            versions=software_versions("torch"),
        )
    )
    page = out / PAGE
    write_text(page, weights_page(GlobalWeights.open(out), known))
    fired = sum(int((one.fired > 0).sum()) for one in found.values())
    return [
        f"weights   {out}: {sum(one.num_latents for one in layers):,} latents, {fired:,} of which fire on"
        f" {num_tokens:,} tokens",
        f"open      {page} ({human_bytes(page.stat().st_size)})",
    ]


def check_fit(sources: Sequence[Source], store: Store) -> None:
    """Raise GranaryError for dictionaries of another model than the store's, and for a site that it lacks."""
    for source in sources:
        check_same_model(source.name, {**source.model}, store.url, store.plan.provenance.get("model") or {})
        for place in source.places:
            if place.own.site == "attn_out":
                raise GranaryError(
                    f"{source.name} stands in for attention, whose paths are not in global weights: leave it out"
                )
            if str(place.read) not in store.hooks:
                raise GranaryError(
                    f"{source.name} reads {place.read}, which {store.url} lacks: it has {', '.join(store.hooks)}"
                )
    if sum(len(source.places) for source in sources) < 2:
        raise GranaryError("global weights are between layers: give the dictionaries of two layers at least")


@torch.no_grad()
def mean_factors(
    model: PreTrainedModel, parts: LinearParts, store: Store, contexts: npt.NDArray[np.int64]
) -> dict[int, float]:
    """Mean factor of each layer's norm before the MLP, over the first documents of some contexts, by layer."""
    few = contexts.take(np.arange(min(FACTOR_CONTEXTS, len(contexts))) * len(contexts) // FACTOR_CONTEXTS, mode="clip")
    sums, count = torch.zeros(len(parts.layers), dtype=torch.float64), 0
    for context in few.tolist():
        tokens_T, segments_T, mask_T = (read([context])[0] for read in (store.tokens, store.segments, store.mask))
        is_first = segments_T[:FACTOR_TOKENS] == segments_T[0]
        rows = torch.from_numpy(np.flatnonzero(mask_T[: len(is_first)] & is_first))
        if not len(rows):
            continue
        tokens = torch.from_numpy(tokens_T[: len(is_first)][is_first].astype(np.int64)).to(model.device)
        scales = run(model, parts, tokens).scales
        sums += torch.stack([scales[layer, "mlp"][rows].double().sum() for layer in range(len(sums))]).cpu()
        count += len(rows)
    return dict(enumerate((sums / max(1, count)).tolist()))


def plan(layers: Sequence[Layer], tokens: int, sources: Sequence[Source], most: int) -> list[str]:
    """The memory that it will take beside the model: firing of the sample, connections, one layer's rows, one tile."""
    widest = max(one.num_latents for one in layers)
    width = len(layers[0].weights.folded.input_scale)
    configs = [source.config for source in sources if source.config is not None]
    each = [latents_per_token(config) for config in configs]
    waiting = max(k - k // config.num_groups for k, config in zip(each, configs, strict=True))
    held = {
        "firing of the sample": (FIRING_BYTES * sum(each) + UNSORTED_BYTES * waiting) * tokens,
        "connections": 20 * most * (sum(one.num_latents for one in layers) + widest),
        "rows of a layer": 8 * widest * width,
        "a tile": TILE_BYTES * min(CELLS, widest * widest) + TERM_BYTES * TERMS,
    }
    told = ", ".join(f"{name} {human_bytes(size)}" for name, size in held.items())
    return [f"memory    about {human_bytes(sum(held.values()))} beside the model ({told})"]


def described(layers: Sequence[Layer], sources: Sequence[Source]) -> list[WeightsLayer]:
    """Records of the layers, in their order."""
    owner = {place.own.layer: (source, n) for source in sources for n, place in enumerate(source.places)}
    found = []
    for layer in layers:
        source, number = owner[layer.number]
        folder = Path(source.name)
        sha256 = weights_sha256(folder) if (folder / WEIGHTS_FILE).is_file() else None
        factor = 1.0 if layer.norm is None else float(layer.norm.factor)
        first = number * layer.num_latents
        found.append(WeightsLayer(layer.number, layer.num_latents, source.name, sha256, first, factor))
    return found
