"""What is run twice: small harvests, trainings and evaluations that between them pass through every part of the stages.

A case is a command line of a stage. Its folder is named after it and relative to the working folder, so that two runs
of the matrix write the same paths.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

HARVEST = (
    "debug=tiny_harvest run_dir={name} hooks.layers=[1,2] packing.seq_len=128 corpus.contexts=24 "
    "corpus.include_tests=false"
)
# dead_after_tokens is two batches: AuxK is at work from the fourth step on.
TRAIN = (
    "run_dir={name} store.url=bfloat16/store hook=layers.2.resid_post sae.expansion=8 sae.dead_after_tokens=256 "
    "stream.batch_size=128 schedule.tokens=5_000 logger.every=1 logger.progress=false logger.curves=false"
)
EVAL = "run_dir={name} out_dir={name} store.url=bfloat16/store sae.path={sae}"
EVERYWHERE = "device.name=cpu device.threads=1"

STORE_FILES = ("{name}/store/**/*",)
SAE_FILES = ("{name}/**/sae.safetensors", "{name}/**/config.json", "{name}/**/metrics.jsonl")
EVAL_FILES = ("{name}/*.json", "{name}/latents.safetensors")


@dataclass(frozen=True)
class Case:
    """One command line, and the files that it leaves."""

    name: str
    stage: str
    """harvest, train or eval."""
    arguments: str
    files: tuple[str, ...]
    """Patterns, relative to the working folder."""
    needs: tuple[str, ...] = ()
    """Cases whose files it reads."""
    stopped: bool = False
    """Stopped by SIGTERM on the way, and started again."""
    sweep: bool = False
    """Several values of a key stand for several runs."""

    def command(self) -> list[str]:
        """What follows ``python``."""
        module = ["-m", f"stage_{self.stage}", *["--multirun"] * self.sweep]
        return [*module, *shlex.split(self.arguments), *shlex.split(EVERYWHERE)]


def _harvest(name: str, changes: str = "") -> Case:
    return Case(name, "harvest", f"{HARVEST} {changes}".format(name=name), _patterns(STORE_FILES, name))


def _train(name: str, changes: str = "", *, needs: tuple[str, ...] = ("bfloat16",), **how: bool) -> Case:
    return Case(name, "train", f"{TRAIN} {changes}".format(name=name), _patterns(SAE_FILES, name), needs, **how)


def _eval(name: str, sae: str, changes: str = "", also: tuple[str, ...] = ()) -> Case:
    arguments = f"{EVAL} {changes}".format(name=name, sae=sae)
    trained = sae.strip("\"'").partition("/")[0]
    return Case(name, "eval", arguments, _patterns(EVAL_FILES, name) + also, ("bfloat16", trained))


def _patterns(templates: Sequence[str], name: str) -> tuple[str, ...]:
    return tuple(template.format(name=name) for template in templates)


CASES = (
    _harvest("bfloat16"),
    _harvest("int8", "store.dtype=int8 store.codec=lz4 packing=joined packing.seq_len=128"),
    _harvest(
        "harvest-2-ranks", "nproc=2 store.dtype=float32 store.codec=zstd hooks.sites=[resid_pre,attn_out,mlp_out]"
    ),
    *(_train(name, f"sae={name}") for name in ("topk", "batchtopk", "matryoshka", "relu", "jumprelu", "gated")),
    _train("adam-bfloat16-moments", "optim.moments=bfloat16"),
    _train("muon", "optim=muon"),
    _train("signum", "optim=signum"),
    _train("multi-topk", "sae.multi_topk_weight=0.125"),
    _train("tanh-quad", "sae=relu sae.penalty=tanh_quad sae.penalty_weight=1e-4"),
    _train("layer-norm", "sae.normalisation=layer_norm"),
    _train("scale", "sae.normalisation=scale sae.loss=fvu_per_dim sae.bias_init=geometric_median sae.pre_bias=false"),
    _train("raw", "sae=batchtopk sae.normalisation=none sae.encoder_init=norm_search sae.unit_norm_decoder=false"),
    _train("bfloat16-products", "compute.dtype=bfloat16"),
    _train(
        "schedules",
        "optim.micro_batch=48 optim.ema_decay=0.9 optim.ema_export=true optim.spike_factor=10 schedule.k_start=64 "
        "schedule.k_warmup=0.5 schedule=linear stream.max_norm_multiple=2",
    ),
    _train("int8-store", "store.url=int8/store", needs=("int8",)),
    _train("two-stores", "'store.others=[{{url:int8/store,weight:0.5}}]'", needs=("bfloat16", "int8")),
    _train("packed", "packed=true sae.k=16,32", sweep=True),
    _train("ddp-2-ranks", "nproc=2 parallel=ddp"),
    _train("fsdp-2-ranks", "nproc=2 parallel=fsdp"),
    _train("latent-2-ranks", "nproc=2 parallel=latent"),
    # Long enough that the signal comes before the end.
    _train("stopped-and-resumed", "schedule.tokens=80_000 checkpoint.every=0", stopped=True),
    _eval("eval-topk", "topk/sae"),
    _eval("eval-jumprelu", "jumprelu/sae", "splice_bos=true"),
    _eval("eval-packed", "'packed/sweep/*'", also=("packed/sweep/*/eval.json", "packed/sweep/*/latents.safetensors")),
)
STAGES = ("harvest", "train", "eval")


def chosen(pattern: str) -> list[Case]:
    """The cases whose names match a shell pattern, and what they need, in order."""
    by_name = {case.name: case for case in CASES}
    wanted: set[str] = set()

    def add(name: str) -> None:
        wanted.add(name)
        for needed in by_name[name].needs:
            add(needed)

    for name in by_name:
        if fnmatch(name, pattern):
            add(name)
    return [case for case in CASES if case.name in wanted]
