"""The columns of a graph, and what the gradient at each MLP's output says of them.

Columns lie in this order, so that all nodes that may be pruned come before those that may not:

    features [N] | errors [L T] | fixed positions [L n] | biases [L + 1] | tokens [T]

A bias column holds what a layer adds whatever is read: the dictionary's bias over all free positions, and those of the
layer's norms and attention; the last is the final norm's. Shapes: B rows, T positions up to the last that a row needs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stage_trace.replacement import LayerLatents, Replacement


@dataclass(frozen=True, slots=True)
class Columns:
    """Where each kind of source lies among the columns."""

    num_features: int
    num_layers: int
    num_positions: int
    fixed: tuple[int, ...]
    """The fixed positions."""

    @classmethod
    def of(cls, replacement: Replacement) -> "Columns":
        """For one prompt."""
        fixed = torch.nonzero(replacement.fixed_T).flatten().tolist()
        return cls(replacement.num_latents, len(replacement.layers), len(replacement.fixed_T), tuple(fixed))

    @property
    def errors(self) -> slice:
        """Layer by layer, within a layer by position."""
        return slice(self.num_features, self.num_features + self.num_layers * self.num_positions)

    @property
    def fixed_outputs(self) -> slice:
        """Layer by layer, within a layer by fixed position."""
        return slice(self.errors.stop, self.errors.stop + self.num_layers * len(self.fixed))

    @property
    def biases(self) -> slice:
        """One per layer, then the final norm's."""
        return slice(self.fixed_outputs.stop, self.fixed_outputs.stop + self.num_layers + 1)

    @property
    def tokens(self) -> slice:
        """By position."""
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
        counts = [len(layer.latents.value_N) for layer in replacement.layers]
        self.starts = [sum(counts[:layer]) for layer in range(len(counts))]

    def at_mlp(self, layer: int, g_BTD: Tensor) -> None:
        """Enter what the output of an MLP contributes, from the gradient there."""
        stand_in, columns, rows = self.replacement.layers[layer], self.columns, self.values_BS
        T = g_BTD.shape[1]
        for source, start in zip(self.replacement.layers, self.starts, strict=True):
            if layer in source.latents.layers:
                self._add_features(source.latents, start, layer, g_BTD)
        errors = columns.errors.start + layer * columns.num_positions
        rows[:, errors : errors + T] = torch.einsum("btd,td->bt", g_BTD, stand_in.error_TD[:T])
        outputs = columns.fixed_outputs.start + layer * len(columns.fixed)
        for index, position in enumerate(columns.fixed):
            if position < T:
                rows[:, outputs + index] = g_BTD[:, position] @ stand_in.rest_TD[position]
        free_T = self.replacement.free[:T].to(g_BTD)
        rows[:, columns.biases.start + layer] += torch.einsum("btd,t,d->b", g_BTD, free_T, stand_in.bias_D)

    def _add_features(self, latents: LayerLatents, start: int, layer: int, g_BTD: Tensor) -> None:
        decoder_ND = latents.decoder(layer)
        for position, part in latents.by_position():
            if position < g_BTD.shape[1]:
                scaled_ND = latents.value_N[part, None] * decoder_ND[part]
                self.values_BS[:, start + part.start : start + part.stop] += g_BTD[:, position] @ scaled_ND.T

    def at_biases(self, bias_BL: Tensor) -> None:
        """Add the biases of norms and attention, [B, L + 1]."""
        self.values_BS[:, self.columns.biases] += bias_BL

    def at_tokens(self, g_BTD: Tensor, embedded_TD: Tensor) -> None:
        """Enter the tokens, from the gradient at the first layer's input."""
        T, start = g_BTD.shape[1], self.columns.tokens.start
        self.values_BS[:, start : start + T] = torch.einsum("btd,td->bt", g_BTD, embedded_TD[:T])
