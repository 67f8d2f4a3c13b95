"""The whole job as a user does it, from text to dictionaries in files: Granary, SAELens' runner, sparsify's trainer.

    python benchmarks/race.py [--quick] [--scenario one grid layers] [--peers-python .venv-peers/bin/python] [--record]

Scenarios: one SAE (k 32, 8 x); a grid of eight SAEs (k 16 and 32, 2 to 16 x); the same SAE after three layers. The
model is a LLaMA of 25 M parameters and 8 layers with random weights, whose activations say little about quality, or
with ``--model bundled`` the small one that ships with this project; the text is the Python standard library. All run in
the peers' environment, on the same texts, number of tokens, context length and threads, each at its own defaults
otherwise (of sparsify's batch of 32 contexts half is taken, for twice the steps), and begin with nothing in any cache.
Seconds end with the dictionaries' files; what Granary then takes for its evaluation (held-out FVU, spliced loss,
report), which the peers do not make, stands beside them. Every dictionary is scored by one formula on the same held-out
text (``race_jobs.py``).

CPU seconds are of all processes of a contender: on a machine that does other work too, compare those.
Memory is the largest sum of PSS of all processes of a contender, looked at every 0.2 s; bytes on disk are what lies in
its folder at the end, caches of data sets and tokens included. With --work a finished part is not run again.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from records import RESULTS, Record, append, print_result, processor
from step import peer_versions
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from shared.lm.identity import MODEL_DIR

ROOT = Path(__file__).resolve().parent.parent
CONTENDERS = ("granary", "sparsify", "sae-lens")
CONTEXT, PEERS_BATCH, HELDOUT_TOKENS = 256, 4096, 51_200
# Contexts beyond those that are trained on: Granary holds some of its store out, and scores itself on them.
SPARE = 0.15


class Race:
    """A model, texts, and what was measured on them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.work = options, Path(options.work)
        self.work.mkdir(parents=True, exist_ok=True)
        self.results: list[dict[str, Any]] = []
        self.model = self._model()
        config = json.loads((self.model / "config.json").read_text(encoding="utf-8"))
        self.d_model, layers = config["hidden_size"], config["num_hidden_layers"]
        middle, apart = layers // 2 - 1, max(1, layers // 4)
        self.layers = {"one": [middle], "grid": [middle], "layers": [middle - apart, middle, middle + apart]}
        self.texts, self.heldout = self.work / "train.jsonl", self.work / "heldout.jsonl"
        self._write_texts()

    def _model(self) -> Path:
        if self.options.model == "bundled":
            return MODEL_DIR
        folder = self.work / "model"
        if not folder.exists():
            tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
            size = {"hidden_size": 128, "intermediate_size": 256} if self.options.quick else {}
            config = LlamaConfig(
                vocab_size=len(tokenizer), num_hidden_layers=8, num_attention_heads=8, max_position_embeddings=2048,
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                **({"hidden_size": 512, "intermediate_size": 1376} | size),
            )  # fmt: skip
            torch.manual_seed(0)
            tokenizer.save_pretrained(folder)
            LlamaForCausalLM(config).save_pretrained(folder)
        return folder

    def _write_texts(self) -> None:
        """Files of the standard library, one a line, in a fixed random order: enough to train on, then to score on."""
        if self.heldout.exists():
            return
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        random.Random(0).shuffle(files)
        left = iter(files)
        for path, wanted in ((self.texts, self.options.tokens * (1 + 2 * SPARE)), (self.heldout, HELDOUT_TOKENS)):
            lines, count = [], 0
            while count < wanted:
                text = next(left).read_text(encoding="utf-8")
                count += len(tokenizer(text).input_ids)
                lines.append(json.dumps({"text": text}))
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def settings(self, scenario: str) -> list[tuple[int, int]]:
        """(k, expansion) of the dictionaries of a layer."""
        return [(k, e) for k in (16, 32) for e in (2, 4, 8, 16)] if scenario == "grid" else [(32, 8)]

    # The contenders: each yields commands, one after the other
    def granary(self, scenario: str, out: Path) -> Iterator[list[str]]:
        """Harvest once, train everything from one pass over the store, score."""
        place = [f"run_dir={out}", f"device.threads={self.options.threads}"]
        contexts = -(-self.options.tokens * (1 + SPARE) // (CONTEXT - 1))
        layers, settings = self.layers[scenario], self.settings(scenario)
        yield ["-m", "stage_harvest", *place, f"model={self.model}", "corpus=jsonl", f"corpus.files={self.texts}",
               f"hooks.layers=[{','.join(map(str, layers))}]", f"packing.seq_len={CONTEXT}",
               f"corpus.contexts={contexts:.0f}", "store.chunk_tokens=256"]  # fmt: skip
        hooks, k, expansion = (
            ",".join(dict.fromkeys(map(str, values)))
            for values in ([f"layers.{layer}.resid_post" for layer in layers], *zip(*settings, strict=True))
        )
        training = [*place, f"hook={hooks}", f"sae.k={k}", f"sae.expansion={expansion}",
                    f"schedule.tokens={self.options.tokens}"]  # fmt: skip
        scoring = [*place]
        if scenario == "one":
            yield ["-m", "stage_train", *training]
        else:
            yield ["-m", "stage_train", "-m", "packed=true", *training]
            scoring += [f"sae.path={out / 'sweep'}", "sae.last_grid=true"]
        yield ["-m", "stage_eval", *scoring]

    def peer(self, name: str, scenario: str, out: Path) -> Iterator[list[str]]:
        """A training run per setting; it sees to the layers."""
        for number, (k, expansion) in enumerate(self.settings(scenario)):
            path = out / f"{number}.json"
            job = {
                "model": str(self.model), "texts": str(self.texts), "tokens": self.options.tokens,
                "context": CONTEXT, "batch": PEERS_BATCH, "threads": self.options.threads,
                "layers": self.layers[scenario], "d_model": self.d_model, "d_latent": expansion * self.d_model,
                "k": k, "out": str(out / str(number)),
            }  # fmt: skip
            path.write_text(json.dumps(job), encoding="utf-8")
            yield [str(ROOT / "benchmarks" / "race_jobs.py"), name, str(path)]

    def part(self, scenario: str, name: str) -> None:
        """One contender in one scenario, unless it is done."""
        out = self.work / scenario / name
        done = out.with_suffix(".json")
        if not done.exists():
            if self.options.finished:
                return
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            commands = self.granary(scenario, out) if name == "granary" else self.peer(name, scenario, out)
            seconds, work, peaks = zip(*(self.timed(command, out) for command in commands), strict=True)
            scoring, scoring_work = (seconds[-1], work[-1]) if name == "granary" else (0.0, 0.0)
            found = {
                "seconds": sum(seconds) - scoring,
                "scoring": scoring,
                "cpu_seconds": sum(work) - scoring_work,
                "scoring_cpu_seconds": scoring_work,
                "parts": seconds,
                "parts_cpu_seconds": work,
                "peak_mb": max(peaks) / 1e6,
                "disk_mb": size_of(out),
            }
            done.write_text(json.dumps({**found, "fvu": self.fvu(scenario, name, out)}), encoding="utf-8")
        row = {"scenario": scenario, "contender": name, **json.loads(done.read_text(encoding="utf-8"))}
        self.results.append(row)
        print(self.line(row), flush=True)

    def timed(self, command: list[str], out: Path) -> tuple[float, float, float]:
        """Seconds and CPU seconds of a command in the peers' environment, and the most bytes of its processes (PSS)."""
        caches = {name: str(out / "cache") for name in ("HF_HOME", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR")}
        environment = {
            **os.environ, **caches, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": str(self.options.threads), "WANDB_MODE": "disabled",
        }  # fmt: skip
        begin, peak, is_over = time.perf_counter(), 0.0, threading.Event()
        log = out.with_suffix(".log")
        with log.open("a") as file:
            process = subprocess.Popen(
                [self.options.peers_python, *command],
                cwd=out, env=environment, stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip

            def watch() -> None:
                nonlocal peak
                while not is_over.wait(0.2):
                    peak = max(peak, pss_of_session(process.pid))

            watcher = threading.Thread(target=watch)
            watcher.start()
            _, ended, usage = os.wait4(process.pid, 0)  # of the process, and of those that it waited for
            status = process.returncode = os.waitstatus_to_exitcode(ended)
            seconds = time.perf_counter() - begin
            is_over.set()
            watcher.join()
        if status:
            sys.exit(f"{' '.join(command)} ended with status {status}: see {log}")
        return seconds, usage.ru_utime + usage.ru_stime, peak

    def fvu(self, scenario: str, name: str, out: Path) -> list[float]:
        """Of every dictionary in `out`, by the one ruler."""
        weights = [*out.rglob("sae.safetensors"), *out.rglob("sae_weights.safetensors")]
        found = sorted({(str(path.parent), layer_of(path.parent)) for path in weights})
        wanted = len(self.layers[scenario]) * len(self.settings(scenario))
        if len(found) != wanted:
            sys.exit(f"{name} left {len(found)} dictionaries in {out}, not {wanted}")
        job = {
            "model": str(self.model), "heldout": str(self.heldout), "context": CONTEXT, "dictionaries": found,
            "threads": self.options.threads, "out": str(out / "fvu.json"),
        }  # fmt: skip
        path = out / "score.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        self.timed([str(ROOT / "benchmarks" / "race_jobs.py"), "score", str(path)], out)
        return list(json.loads((out / "fvu.json").read_text(encoding="utf-8")).values())

    @staticmethod
    def line(row: dict[str, Any]) -> str:
        """A row of the table."""
        fvu = row["fvu"]
        quality = f"{np.mean(fvu):.3f}" if len(fvu) == 1 else f"{np.mean(fvu):.3f} ({min(fvu):.3f} to {max(fvu):.3f})"
        return (
            f"| {row['scenario']} | {row['contender']} | {row['seconds']:.0f} | {row['cpu_seconds']:.0f} | "
            f"{row['scoring']:.0f} | {row['scoring_cpu_seconds']:.0f} | "
            f"{row['peak_mb']:,.0f} | {row['disk_mb']:,.0f} | {quality} |"
        )

    def ratios(self) -> dict[str, Any]:
        """Each peer's seconds over ours, and FVU beside FVU, by scenario that we took part in."""
        found: dict[str, Any] = {}
        for scenario in dict.fromkeys(row["scenario"] for row in self.results):
            rows = {row["contender"]: row for row in self.results if row["scenario"] == scenario}
            ours = rows.get("granary")
            if ours is None:
                continue
            found[scenario] = {
                name: {
                    "seconds": round(row["seconds"], 1),
                    "over_ours": round(row["seconds"] / ours["seconds"], 2),
                    "cpu_over_ours": round(row["cpu_seconds"] / ours["cpu_seconds"], 2),
                    "fvu": round(float(np.mean(row["fvu"])), 4),
                }
                for name, row in rows.items()
            }
        return found


def layer_of(folder: Path) -> int:
    """Of a dictionary's folder, from what its own format says of it."""
    config = json.loads(next(p for n in ("config.json", "cfg.json") if (p := folder / n).exists()).read_text())
    place = config.get("sites", {}).get("reads", [None])[0] or config.get("metadata", {}).get("hook_name")
    place = place or folder.name  # sparsify
    return int(next(part for part in place.split(".") if part.isdecimal()))


def size_of(folder: Path) -> float:
    """Megabytes of all files below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink()) / 1e6


def pss_of_session(session: int) -> float:
    """Bytes of memory of all processes of a session, what they share counted once."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(status.read_text().rpartition(")")[2].split()[3]) != session:
                continue
            rollup = (status.parent / "smaps_rollup").read_text()
        except (OSError, ValueError):  # it has ended
            continue
        total += next((int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")), 0)
    return total * 1024.0


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of wall time by scenario, the peers' as a multiple of ours, and the mean FVU beside each."""
    import matplotlib.pyplot as plt

    titles = {"one": "one SAE", "grid": "eight SAEs (k, expansion)", "layers": "three layers"}
    found = {(row["scenario"], row["contender"]): row for row in rows}
    scenarios = [name for name in titles if (name, "granary") in found]
    size = (3.4 * len(scenarios), 2.1)
    figure, axes = plt.subplots(1, len(scenarios), figsize=size, layout="constrained", squeeze=False)
    places = range(len(CONTENDERS))
    for axis, scenario in zip(axes[0], scenarios, strict=True):
        own = [found.get((scenario, name)) for name in CONTENDERS]
        seconds = [row["seconds"] if row else 0 for row in own]
        bars = axis.barh(places, seconds, color=["#2a7f62", "#9aa5b1", "#c7ced6"])
        labels = [f" {row['seconds']:.0f} s" if row else " not run" for row in own]
        for place, row in enumerate(own):
            if row:
                labels[place] += f" ({row['seconds'] / seconds[0]:.2g} x)" if place else ""
                labels[place] += f", FVU {np.mean(row['fvu']):.2f}"
        axis.bar_label(bars, labels, fontsize=8)
        axis.set_yticks(places, CONTENDERS if axis is axes[0, 0] else [])
        axis.set_title(titles[scenario], loc="left", fontsize=10)
        axis.set_xlim(0, 1.9 * max(seconds))
        axis.invert_yaxis()
        axis.set_xticks([])
        axis.tick_params(left=False)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    figure.savefig(path, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one SAE of a model of 1 M parameters, 20,480 tokens")
    parser.add_argument("--scenario", choices=("one", "grid", "layers"), nargs="+", default=("one", "grid", "layers"))
    parser.add_argument("--contender", choices=CONTENDERS, nargs="+", default=CONTENDERS)
    parser.add_argument("--model", choices=("random", "bundled"), default="random")
    parser.add_argument("--tokens", type=int, default=102_400, help="that each SAE is trained on")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--peers-python", default=str(ROOT / ".venv-peers" / "bin" / "python"), metavar="PATH")
    parser.add_argument("--work", help="folder for what is made; default: a temporary one")
    parser.add_argument("--finished", action="store_true", help="show the finished parts in --work, and run none")
    parser.add_argument("--record", action="store_true", help=f"append the wall times to {RESULTS.name}")
    parser.add_argument("--plot", type=Path, help="draw the times there")
    options = parser.parse_args()
    if not Path(options.peers_python).exists():
        sys.exit(f"{options.peers_python} is not there: run `make setup-peers`, or name one with --peers-python")
    options.peers_python = str(Path(options.peers_python).absolute())  # not resolved: a link is what an environment is
    if options.quick:
        options.scenario, options.tokens = ("one",), 20_480
    with tempfile.TemporaryDirectory() as temporary:
        options.work = str(Path(options.work or temporary).resolve())
        race = Race(options)
        print("| scenario | contender | seconds | CPU seconds | scoring | its CPU seconds | peak MB | disk MB | FVU |")
        print("|---|---|---|---|---|---|---|---|---|")
        for scenario in options.scenario:
            for name in options.contender:
                race.part(scenario, name)
    if options.record:
        shape = f"d{race.d_model}_tokens{options.tokens}"
        found = [Record(f"race-{row['scenario']}", row["contender"], shape, "float32", [row["seconds"]], row["peak_mb"])
                 for row in race.results]  # fmt: skip
        append(found, processor(), options.threads, peer_versions(options.peers_python))
    if options.plot:
        draw(race.results, options.plot)
    print_result({"threads": options.threads, "model": options.model, "tokens": options.tokens, **race.ratios()})


if __name__ == "__main__":
    main()
