"""What the weights alone tell of each latent: norms, nearest decoder directions, a map, and what it does to the logits.

F latents, D width of what is written, V vocabulary.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from shared.latents.layout import LOGIT_BINS, LOGITS, NEAREST, NONE
from shared.lm.head import LogitHead
from shared.sae.rows import raw_rows
from shared.sae.sites import Sites, SiteWidths, slices
from shared.sae.variants import Dictionary
from stage_inspect.scan.log import Columns

MOST_COMPARED = 65_536  # latents whose neighbours are found by comparing all pairs
BLOCK_ELEMENTS = 1 << 24
ROWS = 1 << 14  # of the weights that are looked at together
# Sites that are the residual stream or are added to it, so that the head reads them.
IN_THE_STREAM = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


@torch.inference_mode()
def weight_columns(dictionary: Dictionary, decoder: Tensor) -> Columns:
    """Columns of ``table/`` that norms and angles give; `decoder` is from `decoder_rows`.

    The cosine of encoder and decoder is 0 where one reads another place than the other writes.
    """
    groups = dictionary.groups
    cosine = torch.zeros(len(decoder))
    if dictionary.config.is_autoencoder and len(groups) == 1:
        pairs = zip(torch.split(groups[0].W_enc, ROWS), torch.split(decoder, ROWS), strict=True)
        cosine = torch.cat([torch.cosine_similarity(encoder, rows, dim=1) for encoder, rows in pairs])
    xy = principal_plane(decoder)
    columns = {
        "encoder_norm": torch.cat([group.W_enc.norm(dim=1) for group in groups]),
        "decoder_norm": decoder.norm(dim=1),
        "encoder_decoder_cosine": cosine,
        "bias": torch.cat([group.b_enc for group in groups]),
        "map_x": xy[:, 0],
        "map_y": xy[:, 1],
    }
    return {f"table/{name}": column.float().cpu().numpy() for name, column in columns.items()}


def principal_plane(W_FD: Tensor) -> Tensor:
    """Rows of unit norm projected on their two main axes, float32 [F, 2]; each axis' largest weight is positive."""

    def units() -> Iterator[Tensor]:
        return (torch.nn.functional.normalize(rows.double(), dim=1) for rows in torch.split(W_FD, ROWS))

    mean = torch.stack([rows.sum(0) for rows in units()]).sum(0) / len(W_FD)
    spread = torch.zeros(W_FD.shape[1], W_FD.shape[1], dtype=torch.float64, device=W_FD.device)
    for rows in units():
        spread += (rows - mean).T @ (rows - mean)
    _, axes = torch.linalg.eigh(spread)
    plane = axes[:, -2:].flip(1)
    if plane.shape[1] < 2:
        plane = torch.cat([plane, torch.zeros_like(plane)], 1)
    largest = plane.abs().argmax(0)
    plane = plane * torch.sign(plane[largest, torch.arange(2)])
    return torch.cat([(rows - mean) @ plane for rows in units()]).float()


@torch.inference_mode()
def neighbour_columns(W_FD: Tensor) -> Iterator[Columns]:
    """Rows of ``neighbours/*`` in blocks: cosines with all other rows, zero rows left out."""
    norm = W_FD.norm(dim=1)
    unit = W_FD / norm.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    F, rows = len(W_FD), max(1, BLOCK_ELEMENTS // len(W_FD))
    count = min(NEAREST, F - 1)
    for start in range(0, F, rows):
        cosine = unit[start : start + rows] @ unit.T
        cosine[:, norm == 0] = -torch.inf
        cosine[norm[start : start + rows] == 0] = -torch.inf
        own = torch.arange(len(cosine), device=cosine.device)
        cosine[own, own + start] = -torch.inf
        values, latents = (part.cpu().numpy() for part in cosine.topk(count, dim=1))
        found = np.full((len(values), NEAREST), NONE, np.int32)
        shown = np.zeros((len(values), NEAREST), np.float32)
        there = np.isfinite(values)
        found[:, :count] = np.where(there, latents, NONE)
        shown[:, :count] = np.where(there, values, 0)
        yield {"neighbours/latent": found, "neighbours/cosine": shown}


def stream_rows(dictionary: Dictionary, decoder: Tensor, sites: Sites, widths: SiteWidths) -> Tensor | None:
    """What a unit of each latent adds to the residual stream, [F, d_model], at the last site that is written.

    In the units of raw activations; under layer_norm in units of the token's own scale. None where what is written is
    not in the stream.
    """
    name = sites.writes[-1]
    if name.rpartition(".")[2] not in IN_THE_STREAM:
        return None
    return raw_rows(dictionary, decoder, slices(sites.writes, widths.writes)[name])


@torch.inference_mode()
def logit_columns(rows_FD: Tensor, head: LogitHead) -> Iterator[Columns]:
    """Rows of ``logits/*`` and of the columns ``table/logit_*`` in blocks."""
    V = len(head.W_VD)
    rows, count = max(1, BLOCK_ELEMENTS // V), min(LOGITS, V)
    for start in range(0, len(rows_FD), rows):
        z = head.weights(rows_FD[start : start + rows].to(head.W_VD.device))
        high, low = z.topk(count, dim=1), z.topk(count, dim=1, largest=False)
        least, most = z.min(1, keepdim=True).values, z.max(1, keepdim=True).values
        cell = ((z - least) / (most - least).clamp_min(1e-30) * LOGIT_BINS).long().clamp_(0, LOGIT_BINS - 1)
        histogram = torch.zeros(len(z), LOGIT_BINS, dtype=torch.int64, device=z.device)
        histogram.scatter_add_(1, cell, torch.ones_like(cell))
        deviation = z.double() - z.double().mean(1, keepdim=True)
        variance = deviation.square().mean(1)
        safe = variance.clamp_min(1e-60)
        moments = {
            "mean": z.double().mean(1),
            "sd": variance.sqrt(),
            "skew": deviation.pow(3).mean(1) / safe.pow(1.5),
            "kurtosis": deviation.pow(4).mean(1) / safe.square() - 3,
            "low": least[:, 0],
            "high": most[:, 0],
        }
        columns: Columns = {f"table/logit_{name}": one.float().cpu().numpy() for name, one in moments.items()}
        columns["logits/histogram"] = histogram.cpu().numpy()
        for name, (values, tokens) in (("top", high), ("bottom", low)):
            ids, shown = np.full((len(z), LOGITS), NONE, np.int32), np.zeros((len(z), LOGITS), np.float32)
            ids[:, :count], shown[:, :count] = tokens.cpu().numpy(), values.cpu().numpy()
            columns |= {f"logits/{name}": ids, f"logits/{name}_value": shown}
        yield columns
