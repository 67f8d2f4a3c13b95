"""Every pre-activation above a threshold, in the padded form of sparse latents."""

import torch

# Elements of one tile of pre-activations: the largest dense block that exists at a time.
TILE_ELEMENTS = 1 << 22


@torch.no_grad()
def encode_above(
    x_ND: torch.Tensor,
    W_FD: torch.Tensor,
    b_F: torch.Tensor,
    threshold: torch.Tensor | float,
    *,
    kernels: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """All ``z = x W^T + b`` with ``z > threshold``, a scalar or [F]. No gradient.

    Returns values [N, M] and int64 indices [N, M] in index order, M the largest number in a row, at least 1; the rest
    of a row is value 0 and index -1.
    """
    num_rows, num_latents = x_ND.shape[0], W_FD.shape[0]
    tile_rows = max(1, TILE_ELEMENTS // num_latents)
    rows, latents, values = [], [], []
    for start in range(0, num_rows, tile_rows):
        z_tile = torch.addmm(b_F, x_ND[start : start + tile_rows], W_FD.T)
        fires = z_tile > threshold
        row_P, latent_P = fires.nonzero(as_tuple=True)
        rows.append(row_P + start)
        latents.append(latent_P)
        values.append(z_tile[fires])
    if not rows:
        return x_ND.new_zeros(0, 1), torch.full((0, 1), -1, device=x_ND.device)
    return pad(torch.cat(rows), torch.cat(latents), torch.cat(values), num_rows)


def compact(values_NM: torch.Tensor, indices_NM: torch.Tensor, keep_NM: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The slots where `keep_NM`, moved to the front of their rows."""
    row_P, column_P = keep_NM.nonzero(as_tuple=True)
    return pad(row_P, indices_NM[row_P, column_P], values_NM[row_P, column_P], len(values_NM))


def pad(
    row_P: torch.Tensor, latent_P: torch.Tensor, value_P: torch.Tensor, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs in row order to values and indices [N, M]; M is the largest number in a row, at least 1."""
    counts_N = torch.bincount(row_P, minlength=num_rows)
    column_P = torch.arange(len(row_P), device=row_P.device) - (counts_N.cumsum(0) - counts_N)[row_P]
    width = max(1, int(counts_N.max())) if num_rows else 1
    values_NM = value_P.new_zeros(num_rows, width)
    indices_NM = torch.full((num_rows, width), -1, device=row_P.device)
    values_NM[row_P, column_P], indices_NM[row_P, column_P] = value_P, latent_P
    return values_NM, indices_NM
