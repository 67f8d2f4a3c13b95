"""How fast a run goes, how long it takes, and what it reads meanwhile."""

import time
from dataclasses import dataclass

import torch

from shared.basics.errors import GranaryError
from shared.sae.activation_kinds import ACTIVATION_KINDS
from shared.sae.learn.objective import Objective
from shared.sae.optim import make_optimiser
from shared.sae.variants import VARIANTS
from stage_train.config import TrainSchema
from stage_train.estimate.config import PlanSchema
from stage_train.estimate.job import PlannedRun

# Time of a sparse step over that of the encoder's product alone: the worse of README.md's two, on a CPU.
# The dense losses are products nearly throughout.
SPARSE_STEP, DENSE_STEP = 1.75, 1.2
MEASURED_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Speed and time of a run."""

    flop_per_token: float
    """Of the matrix products that nothing can avoid."""
    tokens_per_s: float | None
    """All ranks together; None where nothing says it."""
    basis: str
    """Where it comes from."""
    read_bytes_per_token: float
    """Once."""
    reads: float
    """Times that a token is read, all machines together: by each rank of a latent group; once per machine where the
    page cache of a local store gives it to the others."""
    nodes: int

    def seconds(self, tokens: int) -> float | None:
        """Of a run of `tokens`."""
        return None if self.tokens_per_s is None else tokens / self.tokens_per_s

    @property
    def read_mb_s(self) -> float | None:
        """That each machine must read, MB (10^6) per second."""
        return (
            None
            if self.tokens_per_s is None
            else self.tokens_per_s * self.read_bytes_per_token * self.reads / self.nodes / 1e6
        )

    def tokens_per_s_of_disk(self, mb_s: float) -> float:
        """At which a disk or network of `mb_s` per machine feeds the run."""
        return mb_s * 1e6 * self.nodes / (self.read_bytes_per_token * self.reads)


def find_pace(cfg: TrainSchema, options: PlanSchema, job: PlannedRun) -> Pace:
    """From what the options say or measure. Raises GranaryError for a speed that is not positive."""
    for name in ("tokens_per_s", "tflops", "disk_mb_s", "memory_gib"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise GranaryError(f"{name}={value}: must be above 0, or null")
    config, widths = job.spec.dictionary, job.spec.widths
    # The encoder's product; the dense losses have a decoder's too, and two gradients of each.
    # Several groups have no dense decoder, and each reads its own sites alone.
    sparse = ACTIVATION_KINDS[config.activation].fixes_l0 or config.num_groups > 1
    flop = config.d_latent * (2 * widths.d_in / config.num_groups if sparse else 6 * (widths.d_in + widths.d_out))
    speed, basis = options.tokens_per_s, "as given"
    if speed is None and options.measure:
        speed = cfg.stream.batch_size / measured_seconds(job)
        basis = f"{MEASURED_STEPS} steps of one rank's part on this machine, no messages between ranks"
    elif speed is None and options.tflops is not None:
        factor = SPARSE_STEP if sparse else DENSE_STEP
        speed = options.tflops * 1e12 * job.ranks / (flop * factor)
        basis = f"assumed: {options.tflops:g} TFLOP/s per rank, a step {factor:g} x its products, no messages"
    if speed is None:
        basis = "give tokens_per_s=..., tflops=... of a rank, or measure=true"
    remote = options.d_model is None and "://" in cfg.store.url
    return Pace(
        flop_per_token=flop,
        tokens_per_s=speed,
        basis=basis,
        read_bytes_per_token=job.data.bytes_per_token,
        reads=job.parts if remote else max(1.0, job.parts / cfg.nproc),
        nodes=options.nodes,
    )


def measured_seconds(job: PlannedRun) -> float:
    """Median time of an optimiser step of one rank's rows and latents, random ones, on this machine."""
    if job.cuda and not torch.cuda.is_available():
        raise GranaryError("measure=true with device.name=cuda, but torch sees no CUDA device: give tflops=... instead")
    spec, device = job.spec, torch.device("cuda" if job.cuda else "cpu")
    made, compute = VARIANTS[spec.dictionary.kind], spec.cfg.compute
    dictionary = made(
        spec.dictionary, num_latents=job.computed, kernels=compute.kernels, compute_dtype=compute.dtype
    ).to(device)
    objective = Objective(dictionary, spec.learning)
    optimiser = make_optimiser(dictionary, spec.optimiser, pair_gradients=job.ranks == 1)
    objective.pair_gradients = optimiser.pairs if job.ranks == 1 else None
    x_ND, y_ND = (torch.randn(job.rows, width, device=device) for width in (spec.widths.d_in, spec.widths.d_out))
    if spec.sites.is_autoencoder:
        y_ND = x_ND
    seconds = []
    for _ in range(MEASURED_STEPS + 1):
        begin = time.perf_counter()
        optimiser.zero_grad()
        for x, y in zip(
            *(torch.tensor_split(side, -(-job.rows // job.micro_rows)) for side in (x_ND, y_ND)), strict=True
        ):
            torch.autograd.backward(objective.losses(x, y).total * (len(x) / job.rows))
        float(optimiser.step())  # waits for the device
        seconds.append(time.perf_counter() - begin)
    return sorted(seconds[1:])[MEASURED_STEPS // 2]
