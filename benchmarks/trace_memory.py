"""The memory plan of an attribution graph against what the process takes: `python benchmarks/trace_memory.py`.

Random LLaMAs with dictionaries of each layer, in a temporary folder; the stage runs as a user runs it, in a process of
its own. Its peak resident memory, less that of the same command on a model of next to nothing (Python and its libraries
at work), is compared with the plan. Last the plan of Llama-3.1-8B, from shapes alone.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from omegaconf import OmegaConf
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from shared.basics.units import human_bytes
from shared.bundled import MODEL_DIR
from shared.lm import model_identity
from shared.sae import CLT, Lorsa, Transcoder
from shared.sae.sites import Sites
from shared.sae.variants.clt import CLTConfig
from shared.sae.variants.lorsa import LorsaConfig
from shared.sae.variants.transcoder import TranscoderConfig
from stage_trace.config import TraceSchema
from stage_trace.plan import ModelShape, plan

WATCHED = """
import runpy, sys
sys.argv = ["", *sys.argv[1:]]
try:
    runpy.run_module("stage_trace", run_name="__main__", alter_sys=True)
finally:  # not getrusage's maximum, which begins with the parent's
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print("PEAK", int(peak.split()[1]) * 1024)
"""


@dataclass(frozen=True)
class Shape:
    """What is traced."""

    width: int
    layers: int
    latents: int
    """Of each layer."""
    k: int
    tokens: int = 32
    features: int = 4096
    """max_features."""
    batch: int = 128
    is_clt: bool = False
    qk_heads: int = 0
    """Of a Lorsa of every layer, with as many latents; 0: attention stays."""

    @property
    def decoders(self) -> int:
        """Bytes of all decoder rows on disk."""
        written = self.layers * (self.layers + 1) // 2 if self.is_clt else self.layers * (2 if self.qk_heads else 1)
        return 4 * self.latents * self.width * written

    def config(self, number: int) -> TranscoderConfig | CLTConfig:
        """Of the dictionary of layer `number`, or of all."""
        layers = range(self.layers) if self.is_clt else [number]
        names = [[f"layers.{layer}.{site}" for layer in layers] for site in ("mlp_in", "mlp_out")]
        sites = Sites(*map(tuple, names))
        common = {"k": self.k, "pre_bias": False, "sites": sites}
        if self.is_clt:
            each = (self.width,) * self.layers
            latents = self.latents * self.layers
            return CLTConfig(read_widths=each, write_widths=each, d_latent=latents, k_scope="layer", **common)
        return TranscoderConfig(d_in=self.width, d_out=self.width, d_latent=self.latents, **common)

    def lorsa(self, layer: int) -> LorsaConfig:
        """Of the attention of a layer."""
        return LorsaConfig(
            d_in=self.width, d_out=self.width, d_latent=self.latents, k=self.k, pre_bias=False,
            sites=Sites((f"layers.{layer}.attn_in",), (f"layers.{layer}.attn_out",), unit="sequence"),
            qk_heads=self.qk_heads, qk_width=64, scale=0.125,
        )  # fmt: skip


NOTHING = Shape(width=64, layers=2, latents=64, k=4, tokens=8, features=16)
SHAPES = {
    "many rows": Shape(width=256, layers=8, latents=4096, k=32, tokens=96, features=3000),
    "a large batch": Shape(width=512, layers=4, latents=4096, k=4, tokens=128, features=502, batch=512),
    "a wide dictionary": Shape(width=512, layers=2, latents=65_536, k=8, tokens=32, features=256),
    "a large model": Shape(width=768, layers=10, latents=2048, k=8, tokens=24, features=256),
    "a CLT": Shape(width=256, layers=6, latents=8192, k=16, tokens=64, features=1024, is_clt=True),
    "attention too": Shape(width=512, layers=4, latents=16_384, k=16, tokens=192, features=512, qk_heads=64),
    # Llama-3.1-8B's proportions, an eighth as wide and half as deep: 32 latents to a feature of the stream.
    "8B, scaled down": Shape(width=512, layers=16, latents=16_384, k=64, tokens=32, features=512),
}
QUICK = Shape(width=256, layers=4, latents=2048, k=16, tokens=96, features=512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", help="one of the shapes, by a part of its name")
    parser.add_argument("--quick", action="store_true", help="a shape of seconds")
    options = parser.parse_args()
    shapes = {"quick": QUICK} if options.quick else SHAPES
    base, _ = measure(NOTHING)
    print(f"{human_bytes(base)} for Python and its libraries")
    for name, shape in shapes.items():
        if options.only is None or options.only in name:
            taken, planned = measure(shape)
            taken -= base
            print(
                f"{name}: planned {human_bytes(planned)}, taken {human_bytes(taken)},"
                f" {taken / planned:.2f} of the plan, {taken / shape.decoders:.2f} of the decoders"
            )
    print_8b()


def measure(shape: Shape) -> tuple[float, float]:
    """Peak resident memory of a run, and what was planned for it."""
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), shape)
        text = "read" * (shape.tokens - 1)
        arguments = [
            f"{folder}/tc", f"model={folder}/model", f"text={text}", f"out_dir={folder}/out", "device.threads=1",
            f"max_features={shape.features}", f"batch={shape.batch}", "ablations=2", "ranked=0", "device.name=cpu",
        ]  # fmt: skip
        said = watch(WATCHED, arguments)
    found = re.search(r"PEAK (\d+)", said)
    assert found is not None, said
    print(next(line for line in said.splitlines() if "at the peak" in line))
    return int(found[1]), in_bytes(re.search(r"([\d.]+) (kB|MB|GB) at the peak", said))


def print_8b() -> None:
    """What Llama-3.1-8B in bfloat16 would take, with a transcoder of 131,072 latents for each layer, or a CLT."""
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    model = ModelShape.of(config)
    cfg: TraceSchema = OmegaConf.structured(TraceSchema)
    cfg.max_features, cfg.batch, cfg.logits.most = 4096, 128, 10
    shape = Shape(width=4096, layers=32, latents=131_072, k=64)
    for name, one in (("32 transcoders", shape), ("a CLT", replace(shape, is_clt=True, latents=32_768))):
        configs = [one.config(layer) for layer in range(1 if one.is_clt else one.layers)]
        for tokens in (32, 128, 512):
            found = plan(model, configs, tokens, "bfloat16", cfg)
            print(f"Llama-3.1-8B, {name}, {tokens} tokens: {human_bytes(found.peak)}")


def make(folder: Path, shape: Shape) -> None:
    """The model and its dictionaries."""
    torch.manual_seed(0)
    heads = max(4, shape.width // 64)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=shape.width,
        intermediate_size=3 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(folder / "model")
    provenance = {"model": model_identity(str(folder / "model"))}
    kind = CLT if shape.is_clt else Transcoder
    for layer in range(1 if shape.is_clt else shape.layers):
        kind(shape.config(layer)).save_pretrained(folder / "tc" / f"layer{layer}", provenance)
    for layer in range(shape.layers if shape.qk_heads else 0):
        Lorsa(shape.lorsa(layer)).save_pretrained(folder / "tc" / f"attention{layer}", provenance)


def watch(script: str, arguments: list[str]) -> str:
    """What a process of its own prints, its peak last."""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def in_bytes(found: re.Match[str] | None) -> float:
    assert found is not None
    return float(found[1]) * {"kB": 1e3, "MB": 1e6, "GB": 1e9}[found[2]]


if __name__ == "__main__":
    main()
