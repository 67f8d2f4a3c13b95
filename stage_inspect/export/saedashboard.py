"""SAEDashboard's ``batch-{i}.json``, as its ``NeuronpediaDashboardBatch`` reads them.

Left empty, for the folder does not have them: alignment with neurons, correlated neurons, the cosines of correlated
features (their keys end in _l1), and attention's fields.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from shared.latents.examples import Example
from shared.latents.folder import Latents
from stage_inspect.export.facts import chosen_latents, intervals, linear_histogram, shown, words

BATCH = 128
LISTED, CORRELATED = 10, 3
TOP, PER_INTERVAL = 20, 5
NO_BIN = -1  # of the strongest examples


def write(latents: Latents, folder: Path, chosen: str | None, model_id: str, source: str) -> int:
    """Files of `BATCH` latents each; returns how many latents they hold."""
    layer, _, name = source.partition("-")
    numbers = chosen_latents(chosen, latents)
    silent = [number for number in numbers if not latents.table["fired"][number]]
    living = [number for number in numbers if latents.table["fired"][number]]
    for batch, start in enumerate(range(0, len(living), BATCH)):
        record = {
            "model_id": model_id,
            "layer": int(layer),
            "sae_set": name,
            "sae_id_suffix": None,
            "features": [feature(latents, number) for number in living[start : start + BATCH]],
        }
        (folder / f"batch-{batch}.json").write_text(json.dumps(record, allow_nan=False), encoding="utf-8")
    left_out = {"model_id": model_id, "layer": layer, "sae_set": name, "log_sparsity": 0, "skipped_indexes": silent}
    (folder / "skipped_indexes.json").write_text(json.dumps(left_out), encoding="utf-8")
    return len(living)


def feature(latents: Latents, index: int) -> dict[str, Any]:
    """One latent with every field of the format."""
    vocabulary, latent = words(latents), latents.latent(index)
    centres, counts = linear_histogram(latents, index)
    logits = latent.logit_histogram if latent.logit_histogram is not None else np.empty(0, np.uint32)
    cuts = np.linspace(latent.numbers.get("logit_low", 0), latent.numbers.get("logit_high", 0), len(logits) + 1)
    return {
        "feature_index": index,
        "neuron_alignment_indices": [],
        "neuron_alignment_values": [],
        "neuron_alignment_l1": [],
        "correlated_neurons_indices": [],
        "correlated_neurons_pearson": [],
        "correlated_neurons_l1": [],
        "correlated_features_indices": [one.latent for one in latent.pearson[:CORRELATED]],
        "correlated_features_pearson": [round(one.value, 5) for one in latent.pearson[:CORRELATED]],
        "correlated_features_l1": [],
        "neg_str": shown(vocabulary, [one.token for one in latent.demoted[:LISTED]]),
        "neg_values": [round(one.value, 5) for one in latent.demoted[:LISTED]],
        "pos_str": shown(vocabulary, [one.token for one in latent.promoted[:LISTED]]),
        "pos_values": [round(one.value, 5) for one in latent.promoted[:LISTED]],
        "frac_nonzero": latent.numbers["density"],
        "freq_hist_data_bar_values": centres.tolist(),
        "freq_hist_data_bar_heights": counts.tolist(),
        "logits_hist_data_bar_heights": logits.tolist(),
        "logits_hist_data_bar_values": ((cuts[1:] + cuts[:-1]) / 2).tolist(),
        "n_prompts_total": latents.meta.counts["contexts"],
        "n_tokens_in_prompt": latents.meta.seq_len,
        "dataset": str(latents.meta.store["url"]),
        "decoder_weights_dist": [],
        "activations": [activation for activation, _ in activations(latents, index)],
        "vector": [],
    }


def activations(latents: Latents, index: int) -> list[tuple[dict[str, Any], Example]]:
    """The strongest examples, then some of each interval of the activation, with the example that each came from."""
    top = latents.top(index, TOP)
    largest = float(latents.table["max"][index])
    found = [(activation(latents, one, NO_BIN, largest, NO_BIN), one) for one in top]
    for part in intervals(latents, index, PER_INTERVAL):
        found += [(activation(latents, one, part.low, part.high, part.share), one) for one in part.examples]
    return found


def activation(latents: Latents, one: Example, low: float, high: float, share: float) -> dict[str, Any]:
    """One example; -1 as low and share marks one of the strongest."""
    return {
        "bin_min": low,
        "bin_max": high,
        "bin_contains": share,
        "tokens": shown(words(latents), one.tokens),
        "values": [float(f"{value:.6g}") for value in one.values.tolist()],
        "qualifying_token_index": one.peak,
    }
