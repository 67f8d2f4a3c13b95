"""Bytes of what a training step holds, each quantity a pure function. All results are bytes.

Shapes: N rows of a rank's batch, n rows of a micro-batch, D d_model, F latents held by a rank, K picks per row, R dead
latents held, T positions per context. Weights, gradients and activations are float32; indices are int64.
"""

from collections.abc import Iterable

from torch import Tensor

FLOAT = 4
INDEX = 8


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """Of tensors as they are made, on the meta device too: weights with buffers, moments, averages."""
    return sum(tensor.nbytes for tensor in tensors)


def matrix(latents: int, d_model: int) -> int:
    """W_enc or W_dec, or a gradient of one: ``4 F D``."""
    return FLOAT * latents * d_model


def rows(num_rows: int, d_model: int) -> int:
    """Activations or a reconstruction: ``4 N D``."""
    return FLOAT * num_rows * d_model


def counters(latents: int) -> int:
    """Tokens since each latent fired (int64), which are dead, and which fired in this step (bool): ``10 F``."""
    return (INDEX + 2) * latents


def picks(num_rows: int, width: int) -> int:
    """Values and indices: ``12 N K``."""
    return (FLOAT + INDEX) * num_rows * width


def pair_sort(num_rows: int, width: int) -> int:
    """The order of the pairs, and what a gradient gathers along it: row numbers and coefficients: ``20 N K``."""
    return (2 * INDEX + FLOAT) * num_rows * width


def encode_tile(num_rows: int, latents: int, elements: int, itemsize: int = FLOAT) -> int:
    """A tile of pre-activations on a CPU: as many whole rows as `elements` hold, at least one, at most N."""
    return min(num_rows, max(1, elements // latents)) * latents * itemsize


def rounded_operands(num_rows: int, latents: int, d_model: int) -> int:
    """bfloat16 copies of x and W that the CPU's product reads: ``2 (N + F) D``."""
    return 2 * (num_rows + latents) * d_model


def candidate_buffer(num_rows: int, capacity: int) -> int:
    """triton's survivors per row, an int64 key each: ``8 N C``."""
    return INDEX * num_rows * capacity


def merged_candidates(num_rows: int, width: int, parts: int) -> int:
    """TopK over a latent group of L ranks: gathered values, joined, sorted, and their places: ``20 N K L``."""
    return (3 * FLOAT + INDEX) * num_rows * width * parts


def auxk_rows(dead: int, d_model: int) -> int:
    """The dead latents' rows of both matrices: ``8 R D``; their gradients are as large."""
    return 2 * matrix(dead, d_model)


def auxk_block(num_rows: int, dead: int, elements: int) -> int:
    """One [rows, R] block of AuxK: ``4 min(n R, elements)``; two and their mask are alive at once."""
    return FLOAT * min(num_rows * dead, max(elements, dead))


def threshold_pairs(pairs: int, *, by_bounds: bool = False) -> int:
    """Selecting by threshold, at its peak: 84 bytes per pair that passes, or 128.

    Tiles' rows, latents, values and nonzero's pair (28), joined (20), slots (8); then padded indices, values, the order
    of the last sort and what is gathered along it (28). `by_bounds` rows come in another order: a first sort (44).
    """
    return (84 + 44 * by_bounds) * pairs


def tile_pairs(num_rows: int, latents: int, elements: int) -> tuple[int, float]:
    """BatchTopK's first tile, half of which passes before there is a bar: 44 bytes per pair, as 5.5 int64 columns."""
    return INDEX * encode_tile(num_rows, latents, elements, 1) // 2, 5.5


def context_pool(slots: int, seq_len: int, d_model: int, itemsize: int) -> int:
    """Contexts that are mixed and read ahead, in the type the store reads: ``S T D`` items."""
    return slots * seq_len * d_model * itemsize


def masks(contexts: int, seq_len: int) -> int:
    """One bit per position, and a count per context (int64)."""
    return contexts * (-(-seq_len // 8) + INDEX)


def gathered_weights(latents: int, d_model: int) -> int:
    """FSDP's whole weights during a forward and backward: ``8 F D`` with all F."""
    return 2 * matrix(latents, d_model)
