"""What is alive together at each moment of a run, and the peak that follows.

A phase is a list of blocks that are alive together. On a CPU, blocks below 32 MiB come from malloc's heap, which
keeps its high-water mark; larger ones are mapped, and go back to the system when freed. So the peak of a process is the
largest sum of large blocks plus the largest sum of small ones, which need not meet in one phase. On a GPU, whose
allocator is told the sizes, it is the largest phase.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from shared.kernels.auxk.blocks import BLOCK_ELEMENTS
from shared.kernels.encode_topk.bounds import SMALLEST_WEIGHT, TILE_ELEMENTS
from shared.kernels.linear import FAST_BFLOAT16
from shared.sae.learn.init import SEARCH_TOKENS
from shared.sae.optim.adam import TILE_ELEMENTS as MOMENT_TILE
from stage_train.estimate import memory
from stage_train.estimate.job import PlannedRun

# glibc's DEFAULT_MMAP_THRESHOLD_MAX on 64-bit machines.
MMAP_THRESHOLD = 1 << 25
# shared.kernels.encode_topk.triton, which only a machine with triton can import: workspace, and a row's candidates
# beside 2 k.
TRITON_WORKSPACE = 32 << 20
TRITON_BLOCK = 256
# [n, F] tensors at the peak of the dense losses' backward, by activation; tanh and tanh_quad keep one more.
DENSE_TENSORS = {"relu": 4.0, "jumprelu": 4.25, "gated": 7.25}
# [F, D] tensors that an update makes beside weight, gradient and moments.
UPDATE_MATRICES = {"adam": 0, "adam8bit": 2, "signum": 2, "muon": 5}
# [n, D] tensors at the peak of a forward and backward: input, target, decoded, error, square, residual, gradient.
ROW_TENSORS = 7


@dataclass(frozen=True)
class Block:
    """Some tensors of one size."""

    what: str
    bytes: int
    """Of one."""
    count: float = 1
    piece: int | None = None
    """Bytes of the largest tensor of several of different sizes; None: they are of one."""

    @property
    def total(self) -> int:
        return round(self.bytes * self.count)


@dataclass(frozen=True)
class Phase:
    """What is alive at one moment."""

    name: str
    blocks: list[Block]

    @property
    def total(self) -> int:
        return sum(block.total for block in self.blocks)


def peak(phases: Sequence[Phase], *, heap: bool) -> tuple[int, Phase]:
    """Bytes, and the phase that has most. `heap`: the memory of a process, whose small blocks stay."""
    largest = max(phases, key=lambda phase: phase.total)
    if not heap:
        return largest.total, largest
    return max(_sum(phase, small=False) for phase in phases) + max(_sum(phase, small=True) for phase in phases), largest


def _sum(phase: Phase, *, small: bool) -> int:
    return sum(block.total for block in phase.blocks if ((block.piece or block.bytes) < MMAP_THRESHOLD) == small)


def device_phases(job: PlannedRun) -> list[Phase]:
    """Of a rank's device; a CPU is its own host, and holds all that a host does."""
    held = always(job)
    if job.cuda:
        moments = [Phase(phase.name, [*held, *phase.blocks]) for phase in step(job)]
        return [*moments, Phase("start", distribution(job))]
    held += host_always(job)
    copies = [staged(job)] if job.saves_on_the_way else []
    moments = [Phase(phase.name, [*held, *copies, *phase.blocks]) for phase in step(job)]
    return [*moments, Phase("checkpoint", [*held, staged(job)]), Phase("start", start(job))]


def host_phases(job: PlannedRun) -> list[Phase]:
    """Of a rank's share of the host's memory, beside a GPU."""
    return [Phase("checkpoint", [*host_always(job), staged(job)]), Phase("start", start(job))]


def host_always(job: PlannedRun) -> list[Block]:
    """What a rank's process holds in host memory from the first step to the last."""
    masks = Block("masks of the store", memory.masks(job.contexts or 0, job.seq_len))
    return [block for block in (*([] if job.pool_on_device else pool(job)), masks) if block.bytes]


def always(job: PlannedRun) -> list[Block]:
    """What a rank's device holds from the first step to the last."""
    piece = memory.matrix(job.latents, job.d_model)
    blocks = [
        Block("weights", job.weight_bytes, piece=piece),
        Block("optimiser moments", job.moment_bytes, piece=piece // 2 if job.half_moments else piece),
        Block("weight average", job.average_bytes, piece=piece),
        Block("counters of dead latents", memory.counters(job.latents)),
        Block("batch", memory.rows(job.rows, job.d_model)),
    ]
    if job.pool_on_device:
        blocks += pool(job)
    return [block for block in blocks if block.bytes]


def pool(job: PlannedRun) -> list[Block]:
    """The stream's buffers, on the device or the host."""
    staged = job.rows * job.d_model * job.read_itemsize if job.read_itemsize != 4 or not job.pool_on_device else 0
    slots = memory.context_pool(job.slots, job.seq_len, job.d_model, job.read_itemsize)
    return [Block("stream: contexts being mixed and read ahead", slots), Block("stream: rows on their way", staged)]


def bounded(elements: int) -> bool:
    """Whether this machine, as a CPU, picks float32's latents by a bfloat16 product from weights of that many."""
    return FAST_BFLOAT16 and elements >= SMALLEST_WEIGHT


def encode(job: PlannedRun, num_rows: int) -> list[Block]:
    """Workspace of the encoder's product and selection."""
    if not job.sparse:
        return []
    blocks = []
    if job.parts > 1 and job.activation == "topk":
        merged = memory.merged_candidates(num_rows, job.width, job.parts)
        blocks.append(Block("encode: candidates of all ranks", merged))
    if job.triton:
        capacity = 1 << (2 * job.width + TRITON_BLOCK - 1).bit_length()
        keys = memory.candidate_buffer(num_rows, capacity)
        return [*blocks, Block("encode: workspace", TRITON_WORKSPACE), Block("encode: candidates", keys)]
    by_bounds = bounded(job.computed_latents * job.d_model) and not job.half_compute
    itemsize = 2 if job.half_compute or by_bounds else 4
    tile = memory.encode_tile(num_rows, job.computed_latents, TILE_ELEMENTS, itemsize)
    blocks.append(Block("encode: tiles", tile, 2))
    if by_bounds and job.activation == "topk":
        blocks.append(Block("encode: candidates", memory.picks(num_rows, 2 * job.width)))
    if job.half_compute or by_bounds:
        blocks.append(
            Block("encode: bfloat16 operands", memory.rounded_operands(num_rows, job.computed_latents, job.d_model))
        )
    if job.activation == "batchtopk":
        blocks.append(Block("selection", memory.threshold_pairs(num_rows * job.width)))
    return blocks


def gradients(job: PlannedRun) -> tuple[Block, Block]:
    """Of both matrices, and what making them needs: a further one where several terms add up."""
    whole = memory.matrix(job.computed_latents, job.d_model)
    several = job.micro_batches > 1 or (job.extra_picks and job.pairs_kept)
    aux = not job.sparse and job.pairs_kept and job.dead > 0
    return Block("gradients", whole, 2), Block("gradient of one term", whole, 1 if several or aux else 0)


def step(job: PlannedRun) -> list[Phase]:
    """The moments of one step: what is alive beside `always`."""
    n, d, kept = job.micro_rows, job.d_model, job.pairs_kept and job.sparse
    gathered = [Block("gathered weights", memory.matrix(job.computed_latents, d), 2)] if job.fsdp else []
    grads, term = gradients(job)
    fused = kept and job.triton and term.count == 0 and job.fuses
    made = [] if fused else [grads, term]
    pairs = [
        Block("rows kept for the gradients", memory.rows(n, d), 2 * job.micro_batches),
        Block("picks kept for the gradients", 2 * memory.picks(n, job.width), job.micro_batches),
    ]
    activations = [
        Block("activations [rows, d_model]", memory.rows(n, d), ROW_TENSORS + 4 * job.prefixes),
        *encode(job, n),
        *auxk(job, n),
    ]
    if job.sparse:
        activations.append(Block("picks and copies of them", memory.picks(n, job.width), 4 * max(1, job.prefixes)))
        activations.append(Block("pair sort", memory.pair_sort(n, job.width)))
        activations += rounded(job)
    else:
        tensors = DENSE_TENSORS[job.activation] + job.tanh
        activations.append(Block("activations [rows, latents]", memory.FLOAT * n * job.computed_latents, tensors))
    if not kept:  # they grow in the backward, or are there from the micro-batch before
        earlier = grads if job.sparse or job.micro_batches > 1 else Block("gradients", grads.bytes, 1)
        activations += [earlier, term]
    phases = [Phase("forward and backward", [*gathered, *(pairs if kept else []), *activations])]
    if kept:
        sort = Block("pair sort", memory.pair_sort(n, job.width), job.micro_batches)
        dead = Block("AuxK: gradients of dead rows", memory.auxk_rows(job.dead, d))
        phases.append(Phase("gradients from pairs", [*pairs, sort, dead, *made]))
    if job.fsdp:
        phases += fsdp(job)
    own = Block("gradients", memory.matrix(job.latents, d), 0 if fused else 2)
    phases.append(Phase("update", [own, *update(job)]))
    return phases


def rounded(job: PlannedRun) -> list[Block]:
    """What triton gathers in bfloat16: the input, and W_dec for each decoding that reads its rows often enough."""
    if not (job.triton and job.half_compute):
        return []
    main = job.width // job.learning.multi_topk_factor if job.extra_picks else job.width
    decodings = [main, job.width - main]
    copies = sum(job.micro_rows * width > 2 * job.computed_latents for width in decodings)
    half = memory.matrix(job.computed_latents, job.d_model) // 2
    rows = memory.rows(job.micro_rows, job.d_model) // 2
    return [Block("W_dec in bfloat16", half, copies), Block("rows in bfloat16", rows, 2)]


def auxk(job: PlannedRun, num_rows: int) -> list[Block]:
    """Rows of the dead latents with their gradients, and the blocks they are made in."""
    if not job.dead:
        return []
    rows = Block("AuxK: rows of dead latents and their gradients", memory.auxk_rows(job.dead, job.d_model), 2.5)
    block = memory.auxk_block(num_rows, job.dead, BLOCK_ELEMENTS)
    return [rows, Block("AuxK: blocks", block // 2 if job.half_compute else block, 2.25)]


def fsdp(job: PlannedRun) -> list[Phase]:
    """Gathering the weights, and summing and scattering the gradients: flat buffers beside the tensors."""
    whole, own = memory.gathered_weights(job.computed_latents, job.d_model), 2 * memory.matrix(job.latents, job.d_model)
    copy = [] if job.cuda else [Block("gloo's copy of the gradients", whole)]
    return [
        Phase("gathering the weights", [Block("gathered weights", whole), Block("flat buffer", whole)]),
        Phase("copying the gradients", [Block("gradients", whole), Block("flat buffer", whole)]),
        Phase("summing the gradients", [Block("flat buffer", whole), Block("own gradients", own), *copy]),
    ]


def update(job: PlannedRun) -> list[Block]:
    """What the optimiser makes."""
    if job.optimiser == "adam":
        tile = memory.FLOAT * min(MOMENT_TILE, job.latents * job.d_model)
        return [Block("tiles of moments", tile, 6)] if job.half_moments else []
    return [
        Block(f"{job.optimiser}'s temporaries", memory.matrix(job.latents, job.d_model), UPDATE_MATRICES[job.optimiser])
    ]


def staged(job: PlannedRun) -> Block:
    """A checkpoint's copy of the state in host memory, until it is on disk."""
    state = job.weight_bytes + job.moment_bytes + job.average_bytes + memory.counters(job.latents)
    piece = memory.matrix(job.latents, job.d_model)
    return Block("copy of the state for a checkpoint", state, piece=piece)


def start(job: PlannedRun) -> list[Block]:
    """The initialisation, on the host: the whole SAE, whatever the layout, and its look at a sample of tokens."""
    whole = memory.matrix(job.all_latents, job.d_model)
    sample = job.sample_rows if job.activation == "topk" else min(job.sample_rows, SEARCH_TOKENS)
    blocks = [
        Block("matrices", whole, 4),
        Block("sample of tokens", memory.rows(job.sample_rows, job.d_model), 4),
    ]
    if job.learning.encoder_init == "transpose" and job.activation != "batchtopk":
        return blocks  # nothing is encoded
    blocks += [
        Block("its reconstruction", memory.rows(sample, job.d_model), 3),
        Block("tiles", memory.encode_tile(sample, job.all_latents, TILE_ELEMENTS), 2),
    ]
    if job.sparse:
        blocks.append(Block("picks", memory.picks(sample, job.width), 2))
    if job.activation == "batchtopk":
        blocks.append(Block("pairs of a tile", *memory.tile_pairs(sample, job.all_latents, TILE_ELEMENTS)))
    if job.activation != "topk":
        pairs = sample * (job.width if job.sparse else job.all_latents // 2)
        unordered = not job.sparse and bounded(job.all_latents * job.d_model)
        blocks.append(Block("selection", memory.threshold_pairs(pairs, by_bounds=unordered)))
    return blocks


def distribution(job: PlannedRun) -> list[Block]:
    """The whole SAE on the device, before a rank keeps its own part."""
    return [Block("whole SAE", memory.matrix(job.all_latents, job.d_model), 2)] if job.latents < job.all_latents else []
