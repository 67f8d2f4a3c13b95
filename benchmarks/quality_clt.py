"""A cross-layer transcoder against a transcoder per layer, at equal total L0: FVU of each layer, all layers spliced.

    python benchmarks/quality_clt.py [--quick] [--model bundled|stories260K] [--work FOLDER]

For each seed both are trained by this project's own commands on the same tokens, batchtopk, with as many latents per
layer: the set with k per layer, the CLT with k times the number of layers over all of them. Both are scored on the same
held-out contexts by the evaluation stage. With --work a run that was stopped goes on.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from quality import REALDATA, SEEDS, SETTINGS, run
from records import print_result

SITES = ["hooks.layers=all", "hooks.sites=[mlp_in,mlp_out]"]
K, EXPANSION = 16, {"bundled": 2, "stories260K": 8}
FIGURES = ("loss_recovered", "kl", "top1_agreement")


class Pair:
    """A set of transcoders and a CLT of one model, of several seeds."""

    def __init__(self, model: str, options: argparse.Namespace) -> None:
        self.model, self.options = model, options
        self.folder = Path(options.work) / f"{model}-clt"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = self.folder / "log.txt"

    def stage(self, module: str, *arguments: str) -> None:
        """One command of this project on the folder."""
        given = [*arguments, f"run_dir={self.folder}", f"device.threads={self.options.threads}"]
        run([sys.executable, "-m", module, *given], self.log)

    def harvest(self) -> int:
        """The store, unless it is there; returns the number of layers."""
        given = [word for word in SETTINGS[self.model]["harvest"] if not word.startswith("hooks.")]
        size = ["corpus.contexts=40", "store.shard_contexts=8"] if self.options.quick else []
        self.stage("stage_harvest", *given, *SITES, *size)
        from shared.store import Store

        return len(Store.open(str(self.folder / "store")).hooks) // 2

    def trained(self, seed: int, layers: int) -> dict[str, Any]:
        """Both of one seed, trained and scored."""
        common = [
            f"seed={seed}", "sae=batchtopk", f"sae.expansion={EXPANSION[self.model]}",
            f"schedule.tokens={self.options.tokens}",
        ]  # fmt: skip
        scored = [f"contexts={self.options.contexts}"]
        of_set, clt = self.folder / f"set-{seed}", self.folder / f"clt-{seed}"
        if not (of_set / "comparison.json").exists():
            self.stage("granary", "transcoders", f"set={of_set.name}", f"sae.k={K}", *common, *scored)
        if not (clt / "eval.json").exists():
            places = ["variant=clt", "reads=layers.*.mlp_in", "writes=layers.*.mlp_out"]
            self.stage("stage_train", f"sae_name={clt.name}", *places, f"sae.k={K * layers}", *common)
            self.stage("stage_eval", f"sae.path={clt}", f"out_dir={clt}", *scored)
        comparison = json.loads((of_set / "comparison.json").read_text())
        found = json.loads((clt / "eval.json").read_text())
        rows = sorted(comparison["rows"], key=lambda row: row["hook"])
        sites = found["reconstruction"]["sites"]
        return {
            "set": {
                "fvu": [row["fvu"] for row in rows],
                "l0": sum(row["l0"] for row in rows),
                **{name: comparison["joint"][name] for name in FIGURES},
            },
            "clt": {
                "fvu": [sites[site]["fvu"] for site in sorted(sites)],
                "l0": found["reconstruction"]["l0"],
                **{name: found["downstream"][name] for name in FIGURES},
            },
        }

    def execute(self) -> dict[str, Any]:
        """Means over the seeds, and how they compare."""
        layers = self.harvest()
        runs = []
        for seed in self.options.seeds:
            runs.append(self.trained(seed, layers))
            print(json.dumps({"model": self.model, "seed": seed, **runs[-1]}), flush=True)
        means = {
            kind: {
                "fvu": [round(mean(values), 4) for values in zip(*(one[kind]["fvu"] for one in runs), strict=True)],
                **{name: round(mean(one[kind][name] for one in runs), 4) for name in ("l0", *FIGURES)},
            }
            for kind in ("set", "clt")
        }
        pairs = zip(means["clt"]["fvu"], means["set"]["fvu"], strict=True)
        means["clt_no_worse_on"] = sum(ours <= theirs for ours, theirs in pairs)
        return means


def table(found: dict[str, dict[str, Any]]) -> list[str]:
    """Markdown: one line per dictionary."""
    lines = [
        "| model | | L0 | FVU by layer | loss recovered, all replaced | KL, nats | top-1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, means in found.items():
        for kind in ("set", "clt"):
            one = means[kind]
            fvu = ", ".join(f"{value:.3f}" for value in one["fvu"])
            figures = f"{one['loss_recovered']:.4f} | {one['kl']:.3f} | {one['top1_agreement']:.1%}"
            lines.append(f"| {model} | {kind} | {one['l0']:.1f} | {fvu} | {figures} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the bundled model, one seed, 80,000 tokens")
    parser.add_argument("--model", choices=SETTINGS, nargs="+", help="default: all whose files are here")
    parser.add_argument("--tokens", type=int, default=1_800_000, help="training tokens of each (default 1.8 M)")
    parser.add_argument("--contexts", type=int, default=24, help="held-out contexts to score on")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--work", help="folder for stores and runs; default: a temporary one")
    options = parser.parse_args()
    models = options.model or [m for m in SETTINGS if m == "bundled" or REALDATA.exists()]
    if options.quick:
        models, options.seeds, options.tokens, options.contexts = models[:1], (0,), 80_000, 4
    with tempfile.TemporaryDirectory() as temporary:
        options.work = options.work or temporary
        found = {model: Pair(model, options).execute() for model in models}
    print("\n".join(table(found)))
    print_result(found)


if __name__ == "__main__":
    main()
