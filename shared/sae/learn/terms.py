"""Pieces that the losses of all activations are made of.

Shape letters: N rows, D_in and D_out widths of what is read and written, F latents held here, R dead latents.
"""

from collections.abc import Sequence

from torch import Tensor

from shared.kernels import DeadRows, PairGradient, PairGradients, take_rows
from shared.sae.contexts import Contexts, Given
from shared.sae.groups import LatentGroup
from shared.sae.latent_shard import WHOLE, LatentShard
from shared.sae.learn.config import LearningConfig
from shared.sae.learn.dead_any import Dead, auxk_of_any
from shared.sae.learn.inputs import dead_indices
from shared.sae.learn.losses import auxk_loss, reconstruction_weight, weighted_square_error
from shared.sae.variants.base import Dictionary, Picks


class LossTerms:
    """A dictionary, how it is learnt, and which of its latents are held here."""

    def __init__(self, dictionary: Dictionary, learning: LearningConfig) -> None:
        self.dictionary, self.learning = dictionary, learning
        self.groups = [GroupTerms(self, number) for number in range(len(dictionary.groups))]
        """Of each group of latents."""
        self.shard: LatentShard = WHOLE
        """Another one where only a part of the latents is here."""
        self.pair_gradients: PairGradients | None = None
        """Where gradients that are sums over pairs go instead of ``.grad``."""

    def prepare(self, x: Given, y: Tensor) -> tuple[Given, Tensor, Tensor | None, Tensor | None]:
        """What the encoder multiplies, what the decoder must give, and layer_norm's mean and scale."""
        normal, token_mean, token_scale = self.dictionary.read(x)
        if isinstance(normal, Contexts):  # which are never what must be given
            return normal, self.dictionary.target(y, y), token_mean, token_scale
        return self.dictionary.centred(normal), self.dictionary.target(y, normal), token_mean, token_scale

    def given(self, x: Given) -> Given:
        """What the encoder multiplies."""
        normal = self.dictionary.read(x)[0]
        return normal if isinstance(normal, Contexts) else self.dictionary.centred(normal)

    def wanted(self, target_ND: Tensor, centred: Given) -> Tensor:
        """What latents and b_dec must give: the target itself, or with a skip what that leaves over, with gradient."""
        skipped_ND = None if isinstance(centred, Contexts) else self.dictionary.skip(centred)
        return target_ND if skipped_ND is None else target_ND - skipped_ND

    # What the start of learning looks at: overridden where other processes hold parts of the columns

    def fire(self, centred: Given) -> list[Picks]:
        """What each of the dictionary's decoders is given at inference, by its own numbers."""
        return self.dictionary.split(*self.dictionary.fire(centred))

    def decoded(self, picks: Sequence[Picks], centred: Given) -> Tensor:
        """What they decode to, without b_dec, [N, D_out] in the decoder's units; `centred` is what they are of."""
        dictionary = self.dictionary
        if len(picks) == 1:
            return self.shard.written(dictionary.groups[0], *picks[0], centred)
        y_ND = picks[0][0].new_zeros(len(picks[0][0]), dictionary.b_dec.shape[0])
        for group, (_, writes), one in zip(dictionary.groups, dictionary.places, picks, strict=True):
            y_ND[:, writes] += group.written(*one)
        return y_ND

    def sum_over_columns(self, parts: Tensor) -> Tensor:
        """Sums over the columns that are written here as those over all."""
        return parts

    def row_norms(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Norms [F, 1] of rows that lie as those of the decoders do."""
        return [rows_FD.norm(dim=1, keepdim=True) for rows_FD in rows]

    def token_norms(self, y_ND: Tensor) -> Tensor:
        """Norms [N] of what is written."""
        return y_ND.norm(dim=1)

    def shared_pre_bias(self) -> Tensor | None:
        """b_dec as the encoder subtracts it, with its gradient; None without a pre-encoder bias."""
        return self.shard.sum_backward(self.dictionary.b_dec) if self.dictionary.config.pre_bias else None

    def loss_weight(self) -> Tensor:
        """Weight [D_out] of the squared errors in the reconstruction loss."""
        return reconstruction_weight(self.dictionary.target_variance, self.learning.loss, self.dictionary.widths.writes)

    def fvu(self, error_ND: Tensor) -> Tensor:
        """Ratio of summed squared error to the data set's summed variance, whatever the loss is; a mean over sites."""
        return weighted_square_error(error_ND.detach(), self.fvu_weight())

    def fvu_weight(self) -> Tensor:
        """Weight [D_out] of the squared errors in it."""
        return reconstruction_weight(self.dictionary.target_variance, "fvu", self.dictionary.widths.writes)

    def fvu_by_site(self, error_ND: Tensor) -> dict[str, Tensor]:
        """That of each written site, by the metric's name; empty where there is one."""
        names = self.dictionary.written_sites
        if len(names) == 1:
            return {}
        widths = self.dictionary.widths.writes
        parts = zip(
            names, error_ND.detach().split(widths, 1), self.dictionary.target_variance.split(widths), strict=True
        )
        return {f"fvu/{name}": error.square().sum(1).mean() / variance.sum() for name, error, variance in parts}

    @property
    def sole(self) -> "GroupTerms":
        """Return those of the only group."""
        (group,) = self.groups
        return group


class GroupTerms:
    """One group of latents of a dictionary in learning."""

    def __init__(self, whole: LossTerms, number: int) -> None:
        self.whole, self.number = whole, number
        dictionary = whole.dictionary
        names = {id(tensor): name for name, tensor in dictionary.named_parameters()}
        self.prefix = names[id(dictionary.groups[number].W_enc)].removesuffix("W_enc")
        """Of its parameters' names."""
        self.d_latent = dictionary.config.d_latent // dictionary.config.num_groups
        """Latents, of all parts."""
        self.reads, self.writes = dictionary.places[number]
        """Its columns of what is read, and of what is written."""

    @property
    def group(self) -> LatentGroup:
        """The latents held here."""
        return self.whole.dictionary.groups[self.number]

    @property
    def learning(self) -> LearningConfig:
        """How the dictionary is learnt."""
        return self.whole.learning

    @property
    def k(self) -> int:
        """The config's, for activations that have one."""
        k = self.whole.dictionary.config.k
        assert k is not None
        return k

    def sink(self, name: str) -> PairGradient | None:
        """Where the gradient of one of its matrices goes instead of ``.grad``; None: nowhere else."""
        gradients = self.whole.pair_gradients
        return None if gradients is None else gradients.get(f"{self.prefix}{name}")

    def auxk(self, residual_ND: Tensor, centred: Given, dead: Tensor | None) -> Tensor | None:
        """The AuxK loss of its dead latents, by their own numbers; None where it is off or nothing is dead."""
        if dead is None or self.learning.auxk_alpha == 0:
            return None
        dead_R = dead_indices(dead)
        num_dead = self.whole.shard.count_dead(dead_R.numel())
        if num_dead == 0:
            return None
        group, num_aux = self.group, self.learning.num_aux(residual_ND.shape[1])
        slope = self.learning.auxk_slope
        if not group.is_two_rows:
            dead_latents = Dead(dead_R, num_dead, num_aux, slope)
            return auxk_of_any(group, residual_ND, centred, dead_latents, self.whole.shard)
        assert isinstance(centred, Tensor)
        return auxk_loss(
            residual_ND,
            centred,
            DeadRows(
                take_rows(group.W_enc, dead_R, self.sink("W_enc")),
                group.b_enc.index_select(0, dead_R),
                group.decoder_rows(dead_R, self.sink("W_dec")),
                num_dead,
            ),
            num_aux,
            slope=slope,
            shard=self.whole.shard,
            compute=group.compute,
        )
