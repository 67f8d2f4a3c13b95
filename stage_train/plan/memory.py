"""What a rank of the planned run holds: training's own code, the start and one step, on tensors without memory.

glibc takes blocks below 32 MiB from a heap that keeps its high-water mark, and maps larger ones, which go back when
they are freed. So the peak of a process is the largest sum of large blocks plus the largest sum of small ones, which
need not meet. On a GPU, whose allocator is told the sizes, it is the largest sum.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import stage_train.step.layouts.fsdp
import stage_train.step.layouts.latent
import stage_train.step.layouts.layers  # noqa: F401 (all, so that LIBRARIES has them)
from shared.basics.memory import peak_memory
from shared.basics.units import GIB
from shared.kernels.fake_cuda import FakeCuda
from shared.kernels.trace import Trace
from shared.sae.learn.init import trying_once
from stage_train.data.inputs import mixes_on_gpu, order_for, stream_in
from stage_train.plan.run import CPU, PlannedRun
from stage_train.state.staging import local

STATE = {"sae": "weights", "optim": "optimiser moments", "ema": "weight average"}
# Bytes of a process that has imported what training imports, as this one has.
LIBRARIES = peak_memory()


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of a rank."""

    total: int
    """On its device, at the peak."""
    peak: str
    """When that is: at the start, in a step, at a checkpoint."""
    blocks: Mapping[str, int]
    """What the total is made of."""
    host: int
    """Beside a GPU: on the host; 0 without."""
    disk: int
    """For all ranks together, at most: ``keep`` checkpoints, the one being written, and the exported dictionary."""
    flop: int
    """Not memory: of the matrix products in the rank's step."""

    def beside(self, blocks: Mapping[str, int]) -> "Memory":
        """The same with `blocks` that are held on the device all the time."""
        return replace(self, total=self.total + sum(blocks.values()), blocks={**self.blocks, **blocks})


def find_memory(run: PlannedRun) -> Memory:
    """Follow the start and one step of a rank."""
    spec, cfg, cuda, held = run.spec, run.cfg, run.cuda, dict[str, list[torch.Tensor]]()
    order = order_for(cfg, spec.sites.unit, run.tokens.seq_len)
    settings = {"prefetch_bytes": int(cfg.stream.prefetch_gib * GIB), "pool_device": "meta"}
    pool = stream_in(order, run.tokens, run.own, world=run.share, **settings).buffer_bytes
    beside = cuda and not mixes_on_gpu(cfg.stream.buffer, pool, free=(cfg.memory_gib or 80) * GIB)  # an empty one
    masks = run.tokens.mask_bits.nbytes + run.tokens.counts.nbytes
    made = spec.dictionary
    rows = made.decoder_rows * run.num_latents // made.d_latent  # of the decoder, held here
    dead = {
        count: round(run.dead_fraction * count) for count in (run.num_latents, made.d_latent // made.num_groups, rows)
    }
    trace = Trace(picks=spec.most_picks(cfg.fullest_row), lengths=dead)
    found = trace.storages
    with run.layout(cfg.parallel, CPU) as layout, FakeTensorMode(allow_non_fake_inputs=True), trace, ExitStack() as gpu:
        if run.triton:  # of a product's tiles one, as all are alike
            gpu.enter_context(FakeCuda("cpu"))
            gpu.enter_context(
                patch("shared.kernels.encode_topk.triton.spans", lambda n, size: [slice(0, min(n, size))])
            )
        found.moment = "start"
        held["masks of the store"] = [torch.empty(masks * (not cuda), dtype=torch.uint8)]
        with trying_once(made.d_latent):
            trainer, batch = run.begin(layout)
        held["stream"] = [torch.empty(pool * (not beside), dtype=torch.uint8)]
        held["batch"], whole = list(batch.activations.values()), trainer.tensors()
        own = {name: local(tensor) for name, tensor in whole.items()}
        for name, tensor in own.items():
            held.setdefault(STATE.get(name.partition(".")[0], "counters"), []).append(tensor)
        meanwhile = 0 < spec.save_every < spec.length.steps
        for found.moment in ("checkpoint", "step") if meanwhile else ("step", "checkpoint"):
            if found.moment == "step":
                trace.flop = 0
                trainer.step(batch)
            elif not cuda:  # whose copy is on the host
                held["copy of the state for a checkpoint"] = [torch.empty_like(tensor) for tensor in own.values()]
        for name, tensors in held.items():
            found.name(tensors, name)
    blocks = found.by_name()
    if not cuda:
        blocks["kept by malloc from other moments"] = found.large + found.small - found.peak
        blocks["interpreter, torch, libraries (measured)"] = LIBRARIES
    copy, state = (sum(t.numel() * t.element_size() for t in tensors.values()) for tensors in (own, whole))
    return Memory(
        total=blocks.total(),
        peak=found.peak_moment,
        blocks=dict(blocks),
        host=(masks + copy + pool * beside) * cuda,
        disk=state * (cfg.checkpoint.keep + 1) + 4 * spec.num_parameters,
        flop=trace.flop,
    )
