"""The strongest connections of each latent, as tiles of all pairs come by: never all pairs at once."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shared.latents.layout import NONE


class Strongest:
    """The n connections of the largest |twera| of each of F latents; of equals, the one that came first."""

    def __init__(self, num_latents: int, most: int, like: Tensor) -> None:
        self.latent = torch.full((num_latents, most), NONE, dtype=torch.int32, device=like.device)
        self.columns = [like.new_zeros(num_latents, most, dtype=torch.float32) for _ in range(4)]

    def offer(self, rows: slice, first: int, columns: tuple[Tensor, ...]) -> None:
        """A tile of pairs [B, M] of the latents `rows` with those from `first` on: twera, era, weight, both."""
        most = self.latent.shape[1]
        twera = columns[0]
        at = twera.abs().topk(min(most, twera.shape[1]), dim=1).indices.sort(1).values
        fresh = torch.where(twera.gather(1, at) == 0, NONE, (at + first).int())
        latent = torch.cat([self.latent[rows], fresh], 1)
        held = [
            torch.cat([mine[rows], column.gather(1, at).float()], 1)
            for mine, column in zip(self.columns, columns, strict=True)
        ]
        strength = torch.where(latent == NONE, -1.0, held[0].abs())
        best = strength.sort(dim=1, descending=True, stable=True).indices[:, :most]
        self.latent[rows] = latent.gather(1, best)
        for mine, column in zip(self.columns, held, strict=True):
            mine[rows] = column.gather(1, best)

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """Columns as the folder has them; 0 where there is no connection."""
        missing = self.latent == NONE
        twera, era, weight, both = (column.masked_fill(missing, 0).cpu().numpy() for column in self.columns)
        return {
            "latent": self.latent.cpu().numpy(),
            "twera": twera,
            "era": era,
            "weight": weight,
            "both": both.astype(np.uint32),
        }
