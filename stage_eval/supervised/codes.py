"""What fires on the drawn tokens, sparse: N tokens, K slots, F latents, n some of the tokens, k some of the latents."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shared.sae.variants import Dictionary
from shared.text.documents import Ints, Marks
from stage_eval.measure.passes import SAE_ROWS

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Codes:
    """Latents of tokens; index -1 is an empty slot, and its value 0."""

    value_NK: Doubles
    index_NK: Ints
    scale_N: Doubles
    """What decoding multiplies a token's latents by, under layer_norm; else 1."""
    num_latents: int

    @classmethod
    def of(cls, dictionary: Dictionary, x_ND: Tensor, device: torch.device) -> "tuple[Codes, Tensor]":
        """The codes, and what the dictionary writes where nothing fires, [N, D_out] or [1, D_out]."""
        parts, bases = [], []
        with torch.inference_mode():
            for part_ND in torch.split(x_ND, SAE_ROWS):
                latents = dictionary.encode(part_ND.to(device))
                parts.append(latents)
                bases.append(dictionary.decode(replace(latents, values=torch.zeros_like(latents.values))).cpu())
        widest = max(part.values.shape[1] for part in parts)
        value_NK, index_NK = np.zeros((len(x_ND), widest)), np.full((len(x_ND), widest), -1)
        scale_N = np.ones(len(x_ND))
        done = 0
        for part in parts:
            rows = slice(done, done + len(part.values))
            done = rows.stop
            fires = part.indices >= 0
            value_NK[rows, : fires.shape[1]] = torch.where(fires, part.values, 0).double().cpu().numpy()
            index_NK[rows, : fires.shape[1]] = part.indices.cpu().numpy()
            if part.token_scale is not None:
                scale_N[rows] = part.token_scale[:, 0].double().cpu().numpy()
        return cls(value_NK, index_NK, scale_N, dictionary.config.d_latent), torch.cat(bases)

    def summed(self, weight_n: Doubles, rows_n: Ints) -> Doubles:
        """Sum over tokens of weight times activation, [F]."""
        weighted = self.value_NK[rows_n] * weight_n[:, None]
        return self._by_latent(weighted, rows_n)

    def difference(self, is_yes_n: Marks, rows_n: Ints, *, written: bool = False) -> Doubles:
        """Mean activation on the tokens that are yes less that on the others, [F]; `written`: as decoding scales it."""
        weight_n = np.where(is_yes_n, 1 / is_yes_n.sum(), -1 / (~is_yes_n).sum())
        return self.summed(weight_n * self.scale_N[rows_n] if written else weight_n, rows_n)

    def energy(self, rows_n: Ints) -> Doubles:
        """Sum of squared activations, [F]."""
        return self._by_latent(self.value_NK[rows_n] ** 2, rows_n)

    def columns(self, latents: Sequence[int], rows_n: Ints) -> Tensor:
        """Activations of some latents, float64 [n, k]."""
        index_nK = self.index_NK[rows_n]
        found = [np.where(index_nK == latent, self.value_NK[rows_n], 0).sum(1) for latent in latents]
        return torch.from_numpy(np.stack(found, axis=1))

    def projected(self, row_F: Doubles, rows_n: Ints) -> Doubles:
        """Sum over latents of what each writes, [n], where one unit of a latent writes so much."""
        padded = np.append(row_F, 0.0)  # what an empty slot, index -1, meets
        found: Doubles = (self.value_NK[rows_n] * padded[self.index_NK[rows_n]]).sum(1) * self.scale_N[rows_n]
        return found

    def written(self, row_F: Doubles, rows_n: Ints) -> Doubles:
        """What each slot writes, [n, K], where one unit of a latent writes so much."""
        padded = np.append(row_F, 0.0)
        found: Doubles = self.value_NK[rows_n] * padded[self.index_NK[rows_n]] * self.scale_N[rows_n][:, None]
        return found

    def _by_latent(self, value_nK: Doubles, rows_n: Ints) -> Doubles:
        flat = self.index_NK[rows_n].ravel() + 1
        by_latent = np.bincount(flat, weights=value_nK.ravel(), minlength=self.num_latents + 1)
        return by_latent[1:].astype(np.float64)


def largest(score_F: Doubles, count: int) -> list[int]:
    """Latents of the largest scores, the smaller number at a tie."""
    return [int(one) for one in np.argsort(-score_F, kind="stable")[:count]]
