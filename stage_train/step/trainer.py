"""One training step: batch, losses, one reduction of the gradients, one optimiser step.

Shape letters: N rows of this rank's batch, D a width of what is read or written, F latents held here, R dead latents.
"""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.parallel import World, all_reduce_sum
from shared.sae.contexts import Contexts, Given
from shared.sae.learn.dead import DeadLatents
from shared.sae.learn.inputs import StepInputs
from shared.sae.learn.objective import Objective
from shared.sae.optim import Optimiser
from shared.sae.sites import Sites
from stage_train.data.stream import AnyBatch, BatchStream
from stage_train.step.layouts import Layout
from stage_train.step.metrics import MetricSums
from stage_train.step.schedule import LatentsPerToken, LearningRate, PenaltyScale
from stage_train.step.spike_guard import SpikeGuard
from stage_train.step.weight_average import WeightAverage

log = logging.getLogger(__name__)

# Steps between looks at which latents are dead: a look waits for the device, and the answer changes slowly. It is part
# of what fixes the result.
DEAD_EVERY = 16

METRICS = ("loss", "reconstruction", "auxk", "multi_topk", "penalty", "fvu", "l0")


class DivergedError(GranaryError):
    """The loss or the gradient is not finite any more."""


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    """Optimiser steps done."""
    tokens: int = 0
    """Tokens seen, all ranks together."""


@dataclass
class Stopwatch:
    """Clock, tokens and waiting time at the last logging step."""

    seconds: float = field(default_factory=time.perf_counter)
    tokens: int = 0
    waited: float = 0.0
    skipped: int = 0


@dataclass(frozen=True)
class Schedules:
    """What changes with the step and is a pure function of it."""

    rate: LearningRate
    k: LatentsPerToken | None = None
    """None: the config's."""
    penalty: PenaltyScale | None = None
    """None: in full from the beginning."""


class Trainer:
    """One dictionary in training: everything that changes from step to step."""

    def __init__(
        self,
        objective: Objective,
        optimiser: Optimiser,
        schedules: Schedules,
        stream: BatchStream,
        sites: Sites,
        layout: Layout,
        *,
        micro_batch: int | None,
        average: WeightAverage | None = None,
        guard: SpikeGuard | None = None,
    ) -> None:
        """`micro_batch` is the largest number of rows in one forward; the result does not depend on it."""
        self.average, self.guard = average, guard
        self.objective, self.optimiser, self.schedules, self.stream = objective, optimiser, schedules, stream
        self.sites, self.layout, self.micro_batch = sites, layout, micro_batch
        self.progress = Progress()
        device = self.world.device
        held = layout.num_latents(objective.dictionary.config)
        self.dead = DeadLatents(held, objective.learning.dead_after_tokens, device=device)
        self.dead_now_F = torch.zeros(held, dtype=torch.bool, device=device)
        """The latents that AuxK takes for dead, as of the last look."""
        self._dead_R = torch.empty(0, dtype=torch.int64, device=device)
        self.metrics = MetricSums((*METRICS, *objective.metric_names), device)
        self.grad_norm = torch.zeros((), device=device)
        self._stopwatch = Stopwatch()
        self._warned = False
        """Whether the metrics of the last window were worth a warning: each spell of them is told once."""

    @property
    def world(self) -> World:
        """The processes that train together."""
        return self.layout.world

    def step(self, batch: AnyBatch) -> None:
        """Learn from one global batch, without waiting for the device except where DEAD_EVERY says so."""
        if self.progress.step % DEAD_EVERY == 0:
            self.layout.merge_dead(self.dead.tokens_since_fired)
            self.dead_now_F.copy_(self.dead.mask())
            self._dead_R = self._look_at_dead(self.progress.step)
        self.layout.zero_gradients(self.optimiser)
        if self.guard is not None:
            self.metrics.mark()
        parts = batch.parts(self.sites, self.micro_batch)
        k = None if self.schedules.k is None else self.schedules.k.at(self.progress.step)
        scale = 1.0 if self.schedules.penalty is None else self.schedules.penalty.at(self.progress.step)
        facts = self.layout.facts(self.objective, [x for x, _ in parts], batch.num_tokens, k)
        fired_F = torch.zeros_like(self.dead_now_F)
        for number, (x, y_ND) in enumerate(parts):
            inputs = StepInputs(
                dead=self._dead_R,
                k=k,
                penalty_scale=scale,
                facts=None if facts is None else facts[number],
                last=number == len(parts) - 1,
            )
            fired_F |= self._backward(x, y_ND, inputs, batch.num_tokens)
        grad_norm = self.layout.reduce_gradients(self.optimiser)
        if self.guard is None or self.guard.admits(self._global_loss(batch.num_tokens), grad_norm):
            self.grad_norm = grad_norm
            self.optimiser.step(self.schedules.rate.at(self.progress.step), grad_norm)
            self.objective.rule.after_step(None if facts is None else facts[0])
            if self.average is not None:
                self.average.update(self.progress.step)
            self.dead.update(fired_F, batch.num_tokens)
        else:
            log.warning("left out step %d: its loss or gradient is out of the ordinary", self.progress.step + 1)
            self.layout.zero_gradients(self.optimiser)
            self.metrics.back_to_mark()
        self.progress.step += 1
        self.progress.tokens += batch.num_tokens

    def read_metrics(self) -> dict[str, float | int]:
        """Metrics of the steps since the last call, the same on every rank. Waits for the device and the others.

        Raises DivergedError when the loss or the gradient is not finite, on all ranks alike.
        """
        means = self.metrics.read()
        self.layout.merge_dead(self.dead.tokens_since_fired)
        now = time.perf_counter()
        elapsed = max(now - self._stopwatch.seconds, 1e-9)
        mine = (self.stream.wait_seconds - self._stopwatch.waited, self.stream.skipped_tokens - self._stopwatch.skipped)
        waited, skipped = all_reduce_sum(torch.tensor(mine, dtype=torch.float64)).tolist()
        line: dict[str, float | int] = {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "epoch": self.stream.state_dict()["epoch"],
            **means,
            "dead_fraction": self.layout.mean_over_latents(self.dead.mask().float()),
            "lr": self.schedules.rate.at(self.progress.step - 1),
            "grad_norm": float(self.grad_norm),
            "tokens_per_s": (self.progress.tokens - self._stopwatch.tokens) / elapsed,
            "wait_share": waited / self.world.size / elapsed,
        }
        if names := self.objective.dictionary.group_names:
            shares = self.layout.means_of_groups(self.objective, self.dead.mask().float())
            line |= {f"dead_fraction/{name}": share for name, share in zip(names, shares, strict=True)}
        if self.guard is not None:
            line["refused_steps"] = self.guard.refused
        if self.stream.skips_damaged:
            line["skipped_tokens"] = int(skipped)
        self.reset_clock()
        self.check_finite(means["loss"])
        warning = self.objective.warning(means)
        if warning is not None and not self._warned and self.world.is_main:
            log.warning("%s", warning)
        self._warned = warning is not None
        return line

    def reset_clock(self) -> None:
        """Begin to measure speed anew, after something that is not training."""
        stream = self.stream
        self._stopwatch = Stopwatch(
            time.perf_counter(), self.progress.tokens, stream.wait_seconds, stream.skipped_tokens
        )

    def check_finite(self, loss: float = 0.0) -> None:
        """Raise DivergedError, with what to do, when training has diverged; the same on every rank.

        A loss that is not finite on one rank makes the summed gradient not finite on all.
        """
        grad_norm = float(self.grad_norm)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise DivergedError(
                f"training diverged by step {self.progress.step} (loss {loss}, gradient norm {grad_norm}): lower "
                "optim.lr or optim.clip_norm, or leave out outliers with stream.max_norm_multiple; the last checkpoint "
                "is intact"
            )

    @property
    def _copies(self) -> int:
        """Ranks that read the same rows, and all add them to the metrics: those of a latent group."""
        return self.world.size // self.layout.stream_world

    def _global_loss(self, num_tokens: int) -> Tensor:
        """The step's loss over all ranks, from what it added to the metrics."""
        return all_reduce_sum(self.metrics.since_mark("loss")) / (self._copies * num_tokens)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the training state, by name; loading fills them in place. Call on all ranks at once."""
        self.layout.merge_dead(self.dead.tokens_since_fired)
        tensors = {
            **{f"sae.{name}": tensor for name, tensor in self.objective.dictionary.state_dict().items()},
            **{f"optim.{name}": tensor for name, tensor in self.optimiser.state_dict().items()},
            **{f"ema.{name}": tensor for name, tensor in (self.average.tensors if self.average else {}).items()},
            "dead.tokens_since_fired": self.dead.tokens_since_fired,
            "dead.now": self.dead_now_F,
            "metrics.sums": self.metrics.collect(self._copies),
        }
        return self.layout.as_global(self.objective, tensors)

    def state(self) -> dict[str, Any]:
        """The rest of the training state, as JSON."""
        state = {"step": self.progress.step, "tokens": self.progress.tokens, "stream": self.stream.state_dict()}
        return state if self.guard is None else {**state, "guard": self.guard.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, after the tensors have been filled; the stream is put in its place by its owner."""
        self.progress = Progress(state["step"], state["tokens"])
        self.metrics.restore(first=self.layout.stream_rank == 0)
        if self.guard is not None:
            self.guard.restore(state["guard"])
        self._dead_R = self._look_at_dead(max(0, self.progress.step - 1))  # as the last step did
        self.reset_clock()

    def _look_at_dead(self, step: int) -> Tensor:
        return self.layout.look_at_dead(self.objective, self.dead_now_F, step // DEAD_EVERY)

    def _backward(self, x: Given, y_ND: Tensor, inputs: StepInputs, batch_tokens: int) -> Tensor:
        """Add the gradient of some rows, as their share of the global batch; returns which latents fired, [F]."""
        count = len(x)
        if not count:  # a row that counts for nothing below
            x, y_ND = one_row(x, y_ND)
            inputs = inputs.with_facts(None if inputs.facts is None else inputs.facts.for_one_row())
        losses = self.layout.losses(self.objective, x, y_ND, inputs)
        torch.autograd.backward(losses.total * (count / batch_tokens))
        self.metrics.add({"loss": losses.total.detach(), **losses.metrics}, count)
        return losses.fired & (count > 0)


def one_row(x: Given, y_ND: Tensor) -> tuple[Given, Tensor]:
    """Zeros in the place of no rows, for a rank that must take part."""
    if isinstance(x, Contexts):
        return Contexts.stand_in(x), y_ND.new_zeros(1, y_ND.shape[1])
    same, x = y_ND is x, x.new_zeros(1, x.shape[1])
    return x, x if same else y_ND.new_zeros(1, y_ND.shape[1])
