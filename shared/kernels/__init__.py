"""The sparse step's operations. Imports torch and triton only, so that it can be tested alone on a GPU machine."""

from shared.kernels.adam_step import AdamStep
from shared.kernels.add_at import add_at
from shared.kernels.autograd import attach_encoder, sparse_decode, sparse_reconstruction, take_rows
from shared.kernels.auxk import DeadRows, LatentRanks, auxk_error, leaky, leaky_, through_leaky_
from shared.kernels.compute import COMPUTE_DTYPES, Compute
from shared.kernels.decode import decode, dot_picks
from shared.kernels.dispatch import KERNELS, resolve
from shared.kernels.encode_batchtopk import encode_batchtopk, smallest_kept
from shared.kernels.encode_threshold import encode_threshold
from shared.kernels.encode_topk import encode_topk
from shared.kernels.pair_update import PairGradient, PairGradients
from shared.kernels.pairs import PairOrder, SortedPairs, sort_pairs
from shared.kernels.product import product
from shared.kernels.row_grad import latent_sum, row_grad
from shared.kernels.row_update import row_update
from shared.kernels.transform_decode import Ranks, transform_decode

__all__ = [
    "COMPUTE_DTYPES",
    "KERNELS",
    "AdamStep",
    "Compute",
    "DeadRows",
    "LatentRanks",
    "PairGradient",
    "PairGradients",
    "PairOrder",
    "Ranks",
    "SortedPairs",
    "add_at",
    "attach_encoder",
    "auxk_error",
    "decode",
    "dot_picks",
    "encode_batchtopk",
    "encode_threshold",
    "encode_topk",
    "latent_sum",
    "leaky",
    "leaky_",
    "product",
    "resolve",
    "row_grad",
    "row_update",
    "smallest_kept",
    "sort_pairs",
    "sparse_decode",
    "sparse_reconstruction",
    "take_rows",
    "through_leaky_",
    "transform_decode",
]
