"""The memory plan of an attribution graph against what the process takes: `python benchmarks/trace_memory.py`.

A random LLaMA with a TopK transcoder of each layer, in a temporary folder; the stage runs as a user runs it, in a
process of its own, and its peak resident memory, less what the imports alone hold, is compared with the plan.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from shared.basics.units import human_bytes
from shared.bundled import MODEL_DIR
from shared.lm import model_identity
from shared.sae import Transcoder
from shared.sae.sites import Sites
from shared.sae.variants.transcoder import TranscoderConfig

WATCHED = """
import resource, runpy, sys
sys.argv = ["", *sys.argv[1:]]
try:
    runpy.run_module("stage_trace", run_name="__main__", alter_sys=True)
finally:
    print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
IMPORTS = """
import stage_trace.job, transformers.models.llama.modeling_llama
held = next(line for line in open("/proc/self/status") if line.startswith("VmRSS"))
print("PEAK", int(held.split()[1]) * 1024)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--latents", type=int, default=8192)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--features", type=int, default=2048, help="max_features")
    parser.add_argument("--quick", action="store_true", help="a shape of seconds")
    options = parser.parse_args()
    if options.quick:
        options.width, options.layers, options.latents, options.tokens, options.features = 256, 4, 2048, 64, 512
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), options)
        text = " ".join(["read", "self"] * options.tokens)[: options.tokens * 2]
        arguments = [
            f"{folder}/tc",
            f"model={folder}/model",
            f"text={text}",
            f"out_dir={folder}/out",
            "device.threads=1",
        ]
        arguments += [f"max_features={options.features}", "ablations=2", "device.name=cpu"]
        said = watch(WATCHED, arguments)
        base = peak(watch(IMPORTS, []))
    taken = peak(said) - base
    print(next(line for line in said.splitlines() if "at the peak" in line))
    planned = in_bytes(re.search(r"([\d.]+) (kB|MB|GB) at the peak", said))
    print(next(line for line in said.splitlines() if line.strip().startswith("graph")))
    print(f"planned {human_bytes(planned)}, taken {human_bytes(taken)} beside {human_bytes(base)} of imports: ", end="")
    print(f"{taken / planned:.2f} of the plan")


def make(folder: Path, options: argparse.Namespace) -> None:
    """The model and its transcoders."""
    torch.manual_seed(0)
    heads = max(4, options.width // 64)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=options.width,
        intermediate_size=3 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(folder / "model")
    provenance = {"model": model_identity(str(folder / "model"))}
    for layer in range(options.layers):
        sites = Sites((f"layers.{layer}.mlp_in",), (f"layers.{layer}.mlp_out",))
        made = TranscoderConfig(
            d_in=options.width, d_out=options.width, d_latent=options.latents, k=options.k, pre_bias=False, sites=sites
        )
        Transcoder(made).save_pretrained(folder / "tc" / f"layer{layer}", provenance)


def watch(script: str, arguments: list[str]) -> str:
    """What a process of its own prints, its peak last."""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def peak(said: str) -> int:
    found = re.search(r"PEAK (\d+)", said)
    assert found is not None, said
    return int(found[1])


def in_bytes(found: re.Match[str] | None) -> float:
    assert found is not None
    return float(found[1]) * {"kB": 1e3, "MB": 1e6, "GB": 1e9}[found[2]]


if __name__ == "__main__":
    main()
