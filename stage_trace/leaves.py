"""The columns of a graph, and what the gradient at each output says of them.

Columns lie in this order, so that all nodes that may be pruned come before those that may not:

    features [N] | errors [O T] | fixed positions [O n] | biases [L + 1] | tokens [T]

A bias column holds what a layer adds whatever is read: its dictionaries' biases over all free positions, and those of
the layer's norms and attention; the last is the final norm's. Shapes: B rows, T positions up to the last that a row
needs, L layers, O outputs that are stood in for: every MLP's, and those of attention that a Lorsa stands in for.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shared.lm.hookpoint import HookPoint
from stage_trace.active import ActiveLatents
from stage_trace.replacement import Replacement


@dataclass(frozen=True, slots=True)
class Columns:
    """Where each kind of source lies among the columns."""

    num_features: int
    outputs: tuple[HookPoint, ...]
    """Those that are stood in for, in the order of the computation."""
    num_positions: int
    fixed: tuple[int, ...]
    """The fixed positions."""

    @classmethod
    def of(cls, replacement: Replacement) -> "Columns":
        """Lay out the columns of one prompt."""
        fixed = torch.nonzero(replacement.fixed_T).flatten().tolist()
        return cls(replacement.num_latents, replacement.outputs, len(replacement.fixed_T), tuple(fixed))

    @property
    def num_layers(self) -> int:
        """Layers of the model, every one of which has an MLP."""
        return self.outputs[-1].layer + 1

    @property
    def errors(self) -> slice:
        """Output by output, within one by position."""
        return slice(self.num_features, self.num_features + len(self.outputs) * self.num_positions)

    @property
    def fixed_outputs(self) -> slice:
        """Output by output, within one by fixed position."""
        return slice(self.errors.stop, self.errors.stop + len(self.outputs) * len(self.fixed))

    @property
    def biases(self) -> slice:
        """One per layer, then the final norm's."""
        return slice(self.fixed_outputs.stop, self.fixed_outputs.stop + self.num_layers + 1)

    @property
    def tokens(self) -> slice:
        """The columns of the tokens, by position."""
        return slice(self.biases.stop, self.biases.stop + self.num_positions)

    @property
    def total(self) -> int:
        """Number of columns."""
        return int(self.tokens.stop)


class Rows:
    """The rows of a batch of targets, filled as the gradient reaches one layer after the other."""

    def __init__(self, replacement: Replacement, columns: Columns, batch: int, like: Tensor) -> None:
        self.replacement, self.columns = replacement, columns
        self.values_BS = like.new_zeros(batch, columns.total)
        counts = [len(one.latents.value_N) for one in replacement.stand_ins]
        self.starts = [sum(counts[:number]) for number in range(len(counts))]

    def at_output(self, number: int, g_TBD: Tensor) -> None:
        """Enter what output `number` contributes, from the gradient there."""
        stand_in, columns, rows = self.replacement.stand_ins[number], self.columns, self.values_BS
        T, layer = len(g_TBD), stand_in.output.layer
        for source, start in zip(self.replacement.stand_ins, self.starts, strict=True):
            if stand_in.output in source.latents.writes:
                self._add_features(source.latents, start, stand_in.output, g_TBD)
        errors = columns.errors.start + number * columns.num_positions
        outputs = columns.fixed_outputs.start + number * len(columns.fixed)
        bias_B = rows[:, columns.biases.start + layer]
        for position in range(T):
            rows[:, errors + position] = g_TBD[position] @ stand_in.error_TD[position]
            if position in columns.fixed:
                index = columns.fixed.index(position)
                rows[:, outputs + index] = g_TBD[position] @ stand_in.rest_PD[index]
            else:
                bias_B += g_TBD[position] @ stand_in.bias_D

    def _add_features(self, latents: ActiveLatents, start: int, output: HookPoint, g_TBD: Tensor) -> None:
        for position, some in latents.by_position():
            if position < len(g_TBD):
                scaled_nD = latents.value_N[some, None] * latents.decoder(output, some)
                self.values_BS[:, start + some.start : start + some.stop] += g_TBD[position] @ scaled_nD.T

    def at_biases(self, bias_BL: Tensor) -> None:
        """Add the biases of norms and attention, [B, L + 1]."""
        self.values_BS[:, self.columns.biases] += bias_BL

    def at_tokens(self, g_TBD: Tensor, embedded_TD: Tensor) -> None:
        """Enter the tokens, from the gradient at the first layer's input."""
        for position, g_BD in enumerate(g_TBD):
            self.values_BS[:, self.columns.tokens.start + position] = g_BD @ embedded_TD[position]
