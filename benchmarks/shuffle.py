"""How well the stream shuffles: batch-mates that come from one context, against a perfect shuffle of all tokens.

    python benchmarks/shuffle.py [--quick] [--figure docs/figures/shuffle.png]

A pair of tokens in a batch from the same context is the correlation that shuffling is there to break. With a perfect
shuffle of C contexts of T tokens a pair shares its context with probability (T - 1) / (C T - 1). The stream's share is
measured on its real batches, over whole epochs. Counting only: no activations, so it is exact and needs no hardware.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stage_train.data.stream import StoreSlice, StreamOrder, TokenStream, TrainingData

SETTINGS = [(1, 1), (1, 4), (8, 4), (16, 4), (64, 1), (64, 2), (64, 4), (64, 8), (128, 4), (256, 4)]


class LabelStore:
    """A store whose activations are the numbers of their contexts."""

    def __init__(self, contexts: int, seq_len: int) -> None:
        self.contexts, self.seq_len = contexts, seq_len

    def mask(self, contexts: np.ndarray) -> np.ndarray:
        return np.ones((len(contexts), self.seq_len), bool)

    def read_context(self, hook: str, context: int, out: torch.Tensor | None = None) -> torch.Tensor:
        assert out is not None
        return out.fill_(context)


def measure(contexts: int, seq_len: int, batch_size: int, lanes: int, mix: int) -> dict[str, Any]:
    """Share of same-context pairs over one epoch's full batches, and distinct contexts per batch."""
    data = TrainingData([StoreSlice(LabelStore(contexts, seq_len), np.arange(contexts))])
    order = StreamOrder(batch_size=batch_size, seed=0, lanes=lanes, mix_contexts=mix, drop_last=True)
    shares, distinct = [], []
    with TokenStream(data, {"context": (1, torch.float32)}, order) as stream:
        stream.stop_at(1, 0)
        for batch in stream:
            labels = batch.activations["context"][:, 0].to(torch.int64)
            counts = torch.bincount(labels, minlength=contexts).double()
            shares.append(float((counts * (counts - 1)).sum()) / (batch_size * (batch_size - 1)))
            distinct.append(int((counts > 0).sum()))
    perfect = (seq_len - 1) / (contexts * seq_len - 1)
    return {
        "lanes": lanes,
        "mix_contexts": mix,
        "share": float(np.mean(shares)),
        "times_perfect": float(np.mean(shares)) / perfect,
        "contexts_per_batch": float(np.mean(distinct)),
    }


def draw(results: list[dict[str, Any]], perfect: float, path: Path) -> None:
    """Share of same-context pairs against the contexts held in memory."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for row in results:
        axes.loglog(row["lanes"] * row["mix_contexts"], row["share"], "o", color="tab:blue")
        axes.annotate(
            f"{row['lanes']} x {row['mix_contexts']}",
            (row["lanes"] * row["mix_contexts"], row["share"]),
            xytext=(5, 5),
            textcoords="offset points",
            fontsize=8,
        )
    axes.axhline(perfect, color="black", linestyle="--", label="perfect shuffle")
    axes.set_xlabel("contexts being mixed (lanes x mix_contexts)")
    axes.set_ylabel("pairs of batch-mates from one context")
    axes.legend()
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small store and three settings")
    parser.add_argument("--figure", type=Path, help="also draw a picture")
    options = parser.parse_args()
    contexts, seq_len, batch_size = (512, 256, 1024) if options.quick else (4096, 1024, 4096)
    settings = [(1, 1), (16, 4), (64, 4)] if options.quick else SETTINGS
    perfect = (seq_len - 1) / (contexts * seq_len - 1)
    print(f"{contexts} contexts of {seq_len} tokens, batches of {batch_size}; perfect shuffle: {perfect:.2e} of pairs")
    print("| lanes | mix_contexts | same-context pairs | x perfect | contexts per batch |")
    print("|---|---|---|---|---|")
    results = []
    for lanes, mix in settings:
        row = measure(contexts, seq_len, batch_size, lanes, mix)
        results.append(row)
        print(
            f"| {lanes} | {mix} | {row['share']:.2e} | {row['times_perfect']:.1f} | {row['contexts_per_batch']:.0f} |",
            flush=True,
        )
    if options.figure:
        draw(results, perfect, options.figure)


if __name__ == "__main__":
    main()
