"""What a rank of the planned run holds: training's own code, the start and one step, on tensors without memory.

glibc takes blocks below 32 MiB from a heap that keeps its high-water mark, and maps larger ones, which go back when
they are freed. So the peak of a process is the largest sum of large blocks plus the largest sum of small ones, which
need not meet. On a GPU, whose allocator is told the sizes, it is the largest sum.
"""

from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import stage_train.step.layouts.fsdp
import stage_train.step.layouts.latent
import stage_train.step.layouts.layers  # noqa: F401 (all, so that LIBRARIES has them)
from shared.basics.memory import peak_memory
from shared.basics.units import GIB
from shared.kernels.fake_cuda import FakeCuda
from shared.kernels.pairs import PairOrder
from shared.kernels.trace import Trace
from shared.sae.learn import init
from stage_train.data.inputs import mixes_on_gpu, order_for
from stage_train.data.stream import ContextStream, TokenStream
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


def begin_once(run: PlannedRun) -> ExitStack:
    """Within the context a start does once what it does again and again, which takes the same memory each time."""
    stack, most = ExitStack(), init.SEARCH_PAIRS // run.spec.dictionary.d_latent
    stack.enter_context(patch.object(init, "grid_search", lambda loss, coarse, steps: loss(coarse[0])))
    stack.enter_context(patch.object(init, "SEARCH_TOKENS", max(1, min(init.SEARCH_TOKENS, most))))
    if run.triton:  # tiles of a product
        stack.enter_context(
            patch("shared.kernels.encode_topk.triton.spans", lambda count, size: [slice(0, min(count, size))])
        )
    return stack


def all_alike(order: PairOrder) -> list[int]:
    """Where the pairs of each latent begin, of latents that fire alike."""
    return [order.indices_NK.numel() * number // order.num_latents for number in range(order.num_latents + 1)]


def find_memory(run: PlannedRun) -> Memory:
    """Follow the start and one step of a rank."""
    spec, cfg, cuda, held = run.spec, run.cfg, run.cuda, dict[str, list[torch.Tensor]]()
    ahead = int(cfg.stream.prefetch_gib * GIB)
    order = order_for(cfg, spec.sites.unit, run.tokens.seq_len)
    kind: Any = TokenStream if spec.sites.unit == "token" else ContextStream
    stream = kind(run.tokens, run.own, order, world=run.share, prefetch_bytes=ahead, pool_device="meta")
    pool = stream.buffer_bytes
    beside = cuda and not mixes_on_gpu(cfg.stream.buffer, pool, free=(cfg.memory_gib or 80) * GIB)  # an empty one
    masks = run.tokens.mask_bits.nbytes + run.tokens.counts.nbytes
    made = spec.dictionary
    rows = made.decoder_rows * run.num_latents // made.d_latent  # of the decoder, held here
    dead = {
        count: round(run.dead_fraction * count) for count in (run.num_latents, made.d_latent // made.num_groups, rows)
    }
    trace = Trace(picks=run.picks, lengths=dead)
    found = trace.storages
    with run.layout(cfg.parallel, CPU) as layout, FakeTensorMode(allow_non_fake_inputs=True), trace, ExitStack() as gpu:
        gpu.enter_context(patch.object(PairOrder, "starts", all_alike))
        if run.triton:
            gpu.enter_context(FakeCuda("cpu"))
        found.moment = "start"
        held["masks of the store"] = [torch.empty(masks * (not cuda), dtype=torch.uint8)]
        with begin_once(run):
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
    blocks = Counter[str]()
    for block, size in found.at_peak:
        blocks[block.name] += size
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
