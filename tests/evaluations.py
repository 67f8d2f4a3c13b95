"""Made-up evaluations for tests of what is shown and written."""

from typing import Any

import numpy as np

from stage_eval.measure.breakdown import frequency_groups, position_groups
from stage_eval.results.evaluation import Evaluation

DOWNSTREAM = {
    "ce_clean": 1.9,
    "ce_spliced": 2.02,
    "ce_zero": 8.9,
    "ce_mean": 7.4,
    "ce_increase": 0.12,
    "loss_recovered": 0.983,
    "loss_recovered_over_mean": 0.978,
    "kl": 0.11,
    "kl_zero": 7.1,
    "kl_mean": 6.0,
    "kl_recovered": 0.985,
    "top1_agreement": 0.87,
}
RECONSTRUCTION = {
    "fvu": 0.11,
    "fvu_uncentred": 0.08,
    "mse_per_token": 3.1,
    "cosine": 0.94,
    "relative_norm": 0.95,
    "reconstruction_bias": 0.97,
    "l0": 15.6,
    "l1": 40.0,
}
NORMS = {"p5": 9.0, "p50": 13.0, "p95": 19.0, "p99": 25.0, "max": 31.0}


def example(k: int = 16, expansion: int = 8, name: str = "demo/sae", **changes: Any) -> Evaluation:
    """An evaluation, from what eval.json would hold."""
    return Evaluation.from_json({**document(k, expansion, name), **changes})


def document(k: int = 16, expansion: int = 8, name: str = "demo/sae") -> dict[str, Any]:
    """An evaluation as eval.json holds it."""
    rng = np.random.default_rng(k + expansion)
    positions, frequencies = position_groups(4096), frequency_groups()
    width, latents = 128, 128 * expansion
    edges = np.linspace(-5, 0, 21)
    better = (k * expansion) ** -0.3
    downstream = {**DOWNSTREAM, "loss_recovered": 1 - 0.07 * better, "kl": 0.4 * better}
    reconstruction = {**RECONSTRUCTION, "fvu": 0.5 * better, "l0": 0.98 * k}

    def intervals(values: dict[str, float]) -> dict[str, list[float]]:
        return {key: [0.99 * value, 1.01 * value] for key, value in values.items()}

    def groups(count: int, scale: float) -> list[Any]:
        return [None, *(scale * (1 + 1 / np.arange(1, count)) * rng.uniform(0.95, 1.05, count - 1)).tolist()]

    return {
        "format": "granary-evaluation",
        "definitions": 1,
        "created": "2026-01-01 00:00 UTC",
        **{key: reconstruction[key] for key in ("fvu", "l0")},
        **{key: downstream[key] for key in ("ce_clean", "ce_spliced", "ce_zero", "ce_mean", "loss_recovered", "kl")},
        "dead_fraction": 0.011,
        "n_tokens": 204_321,
        "sae": {
            "name": name,
            "path": f"runs/{name}",
            "hook": "layers.2.resid_post",
            "config": {"activation": "topk", "k": k, "d_model": width, "d_latent": latents},
        },
        "reconstruction": {
            **reconstruction,
            "fvu_per_dimension_mean": 0.13,
            "explained_variance_per_dimension_mean": 0.87,
            "constant_dimensions": 0,
            "mse": 0.024,
            "explained_variance": 0.89,
            "explained_variance_uncentred": 0.92,
            "mean_error_norm": 0.01,
            "with_bos": {
                "fvu": 0.06,
                "fvu_uncentred": 0.03,
                "bos_fvu_uncentred": 0.3,
                "n_bos": 420,
                "n_tokens": 204741,
            },
            "n_tokens": 204_321,
            "n_contexts": 50,
            "confidence95": intervals(reconstruction),
        },
        "latents": {
            "d_latent": latents,
            "dead": 11,
            "dense": 3,
            "dead_fraction": 0.011,
            "dense_fraction": 0.003,
            "dense_frequency_bound": 0.1,
            "firings_of_dense_latents": 0.2,
            "median_frequency_alive": 0.002,
            "mean_activation_when_active": 1.5,
            "max_activation": 40.0,
            "densest": [{"latent": 7 * i, "frequency": 0.3 / (i + 1), "mean_activation": 1.5} for i in range(10)],
            "histogram": {
                "log10_edges": edges.tolist(),
                "latents": np.histogram(rng.normal(-2.6, 0.6, latents), edges)[0].tolist(),
                "energy_share": [0.05] * 20,
            },
        },
        "decoder": {
            "sampled": latents,
            "edges": np.linspace(0, 1, 41).tolist(),
            "nearest": (np.histogram(rng.beta(6, 8, latents), 40, (0, 1))[0] / latents).tolist(),
            "nearest_random": (np.histogram(rng.normal(0.3, 0.02, latents), 40, (0, 1))[0] / latents).tolist(),
            "nearest_median": 0.42,
            "duplicates": 0.01,
            "duplicate_cosine": 0.9,
            "encoder_cosine_mean": 0.7,
        },
        "downstream": {**downstream, "n_predictions": 203_900, "confidence95": intervals(downstream)},
        "breakdown": {
            by: {
                "edges": grouping.edges.tolist(),
                "fvu": groups(grouping.num_bins, 0.1),
                "ce_clean": groups(grouping.num_bins, 1.9),
                "ce_increase": groups(grouping.num_bins, 0.12),
                "tokens": [9_000] * grouping.num_bins,
                "predictions": [9_000] * grouping.num_bins,
            }
            for by, grouping in (("position", positions), ("frequency", frequencies))
        },
        "activations": {
            "count": 1_800_000,
            "mean_norm": 14.3,
            "median_norm": 13.9,
            "rms_norm": 15.0,
            "max_norm": 800.0,
            "norm_of_mean": 6.0,
            "total_variance": 190.0,
            "variance_in_largest": 0.31,
            "relative_squared_error": 0.0,
            "massive_dimensions": [{"dimension": 31, "rms_ratio": 120.0}, {"dimension": 62, "rms_ratio": 14.2}],
            "store_norm_by_position": [
                {
                    "first": 2 ** (i - 1),
                    "last": 2**i - 1,
                    "tokens": 9_000,
                    "p5": 9.0,
                    "p50": 13.0,
                    "p95": 19.0,
                    "p99": 25.0,
                }
                for i in range(1, 13)
            ],
            "norm_by_position": {
                "edges": positions.edges.tolist(),
                "tokens": [9_000] * positions.num_bins,
                **{name: [scale] * positions.num_bins for name, scale in NORMS.items()},
            },
            "bos_norm": {"tokens": 420, "p50": 710.0, "max": 800.0},
            "largest": {
                "median_rms": 0.4,
                "massive": 2,
                "massive_ratio": 100.0,
                "dimensions": [
                    {"dimension": 31 * i, "max": 60.0 / i, "max_bos": 640.0 / i, "rms": 0.5, "energy_share": 0.1}
                    for i in range(1, 9)
                ],
            },
            "spectrum": {
                "rank": list(range(1, width + 1)),
                "std": np.sort(rng.lognormal(-1, 0.6, width))[::-1].tolist(),
                "abs_mean": np.sort(np.abs(rng.standard_t(2, width)))[::-1].tolist(),
            },
        },
        "training": {
            "tokens": [20_000 * i for i in range(1, 101)],
            "fvu": (0.1 + 0.6 * np.exp(-np.arange(100) / 9)).tolist(),
        },
        "provenance": {
            "model": {"id": "bundled"},
            "corpus": {"description": "Python standard library", "fingerprint": "d" * 64},
            "tokenizer": {},
            "packing": {},
            "store": {"url": "runs/demo/store", "plan_hash": "e" * 64, "digest": "f" * 64},
            "sae": {"sha256": "ab" * 32, "provenance": {}},
        },
        "settings": {
            "split": "heldout",
            "contexts": 50,
            "seq_len": 4096,
            "model": "bundled",
            "downstream": True,
            "splice_bos": False,
            "documents": "isolated",
            "store_dtype": "bfloat16",
        },
        "environment": {"versions": {"granary": "0.1.0"}, "python": "3.11", "machine": "a CPU", "processes": 1},
    }


def at_site(hook: str, **settings: Any) -> Evaluation:
    report = document(**settings)
    report["sae"]["hook"] = hook
    return Evaluation.from_json(report)
