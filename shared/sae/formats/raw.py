"""The meeting point of all formats: a dictionary of one group, on raw activations, its normalisation in its weights.

    z = W_enc (x - b_dec if pre_bias else x) + b_enc,   f = activation(z),   y = sum_i f_i W_dec[i] + b_dec (+ W_skip x)

    topk        the k largest positive z
    relu        max(z, 0)
    jumprelu    z where z > threshold
    batchtopk   the same at inference, with one threshold for all latents; k is what it was trained with
    gated       max(exp(r_mag) (z - b_enc) + b_mag, 0) where z > 0
    signed_topk the k largest z, be they negative

An SAE writes what it reads; a transcoder another place; a crosscoder several places side by side. With `layer_norm`
(SAEs alone), x is first brought to mean 0 and (biased) standard deviation 1 per token, and y scaled back where
`shift_back`. Folding keeps every latent's value, hence thresholds too (``shared.sae.formats.sides``).

Legend: F d_latent, D width of what is read or written, all sites side by side.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.sae.config import DictionaryConfig
from shared.sae.formats.sides import Sides
from shared.sae.sites import Sites, SiteWidths


@dataclass(frozen=True)
class RawDictionary:
    """Weights, float32, row per latent."""

    W_enc_FD: Tensor
    b_enc_F: Tensor
    W_dec_FD: Tensor
    b_dec_D: Tensor
    pre_bias: bool
    kind: str = "sae"
    """sae, transcoder, skip_transcoder or crosscoder."""
    W_skip_DD: Tensor | None = None
    """[d_out, d_in], of a skip transcoder."""
    widths: SiteWidths | None = None
    """Of each site; None: one site on each side."""
    activation: str = "topk"
    k: int | None = None
    """For topk, batchtopk and signed_topk."""
    threshold_F: Tensor | None = None
    """For jumprelu and batchtopk, not negative."""
    r_mag_F: Tensor | None = None
    """For gated, as `b_mag_F`."""
    b_mag_F: Tensor | None = None
    layer_norm: bool = False
    shift_back: bool = True
    provenance: dict[str, Any] = field(default_factory=dict)
    """``hook``, or ``reads`` and ``writes``, where they are known, and whatever the source records."""

    @classmethod
    def from_checkpoint(
        cls, config: DictionaryConfig, tensors: Mapping[str, Tensor], provenance: dict[str, Any]
    ) -> Self:
        """Fold the normalisation of a dictionary of one group, given as its config and its ``state_dict``."""
        of = {name: tensor.detach().double() for name, tensor in tensors.items()}
        own = {name.removeprefix("activation."): of[name] for name in of if name.startswith("activation.")}
        sides = Sides.of(config, of)
        W_enc = of["W_enc"] * sides.scale_in
        b_dec, W_skip = sides.written(of["b_dec"], of.get("W_skip"))
        b_enc, b_mag = of["b_enc"], own.get("b_mag")
        if not config.pre_bias:  # with it, the new b_dec takes the mean off
            shift = W_enc @ sides.mean_in
            b_enc = b_enc - shift
            b_mag = None if b_mag is None else b_mag - own["r_mag"].exp() * shift
        threshold = own["log_threshold"].exp() if "log_threshold" in own else own.get("threshold")
        if threshold is not None and threshold.dim() == 0:
            threshold = threshold.expand(len(b_enc))
        return cls(
            W_enc.float(),
            b_enc.float(),
            (of["W_dec"] / sides.scale_out).float(),
            b_dec.float(),
            pre_bias=config.pre_bias,
            kind=config.kind,
            W_skip_DD=None if W_skip is None else W_skip.float(),
            widths=config.widths,
            activation=config.activation,
            k=config.k,
            threshold_F=None if threshold is None else threshold.float(),
            r_mag_F=own["r_mag"].float() if "r_mag" in own else None,
            b_mag_F=None if b_mag is None else b_mag.float(),
            layer_norm=config.normalisation == "layer_norm",
            shift_back=config.shift_back,
            provenance={**provenance, **({} if config.sites is None else config.sites.record())},
        )

    def to_checkpoint(self, kinds: Mapping[str, type[DictionaryConfig]]) -> tuple[DictionaryConfig, dict[str, Tensor]]:
        """Config, of the one of `kinds` that this is, and tensors of a dictionary of this project with these weights.

        Raises GranaryError for what contradicts itself.
        """
        d_latent, d_in = self.W_enc_FD.shape
        d_out = self.W_dec_FD.shape[1]
        widths = self.widths or SiteWidths((d_in,), (d_out,))
        config = kinds[self.kind].of(
            widths,
            {
                "d_latent": d_latent,
                "k": self.k,
                "activation": self.activation,
                "normalisation": "layer_norm" if self.layer_norm else "none",
                "shift_back": self.shift_back,
                "pre_bias": self.pre_bias,
                "unit_norm_decoder": False,
            },
            self.sites,
        )
        tensors = {"W_enc": self.W_enc_FD, "b_enc": self.b_enc_F, "W_dec": self.W_dec_FD, "b_dec": self.b_dec_D}
        tensors |= {} if self.W_skip_DD is None else {"W_skip": self.W_skip_DD}
        sides = {"input": widths.reads} if config.is_autoencoder else {"input": widths.reads, "output": widths.writes}
        for side, of_sites in sides.items():
            tensors |= {
                f"{side}_mean": torch.zeros(sum(of_sites)),
                f"{side}_scale": torch.ones(len(of_sites)) if len(of_sites) > 1 else torch.ones(()),
                f"{side}_variance": torch.ones(sum(of_sites)),
            }
        tensors |= self._activation_tensors()
        return config, {name: tensor.contiguous() for name, tensor in tensors.items()}

    @property
    def sites(self) -> Sites | None:
        """Where it reads and writes, where that is known."""
        return Sites.from_provenance(self.provenance)

    def at(self, sites: Sites) -> Self:
        """The same at these sites; one of one place is a transcoder where it reads and writes different ones."""
        known = {name: value for name, value in self.provenance.items() if name not in ("hook", "reads", "writes")}
        kind = "transcoder" if self.kind == "sae" and not sites.is_autoencoder else self.kind
        return replace(self, kind=kind, provenance={**known, **sites.record()})

    def _activation_tensors(self) -> dict[str, Tensor]:
        match self.activation:
            case "jumprelu":
                return {"activation.log_threshold": self.thresholds().log()}
            case "batchtopk":
                return {"activation.threshold": self.thresholds()[0].clone()}
            case "gated":
                r_mag_F, b_mag_F = self.magnitudes()
                return {"activation.r_mag": r_mag_F, "activation.b_mag": b_mag_F}
        return {}

    def thresholds(self) -> Tensor:
        """[F], of an SAE that has them."""
        if self.threshold_F is None:
            raise GranaryError(f"this {self.activation} SAE has no thresholds: its folder is incomplete")
        return self.threshold_F.clamp_min(0)  # z is at least 0 where it fires, whatever the threshold below that

    def magnitudes(self) -> tuple[Tensor, Tensor]:
        """r_mag and b_mag [F], of a gated SAE."""
        if self.r_mag_F is None or self.b_mag_F is None:
            raise GranaryError("this gated SAE has no r_mag and b_mag: its folder is incomplete")
        return self.r_mag_F, self.b_mag_F

    def with_pre_bias(self, pre_bias: bool) -> "RawDictionary":
        """The same function with `pre_bias` as asked: the difference goes into b_enc (and b_mag)."""
        if self.pre_bias == pre_bias:
            return self
        shift_F = (self.W_enc_FD.double() @ self.b_dec_D.double()).float() * (1 if pre_bias else -1)
        b_mag_F = self.b_mag_F
        if b_mag_F is not None and self.r_mag_F is not None:
            b_mag_F = b_mag_F + self.r_mag_F.exp() * shift_F
        return replace(self, b_enc_F=self.b_enc_F + shift_F, b_mag_F=b_mag_F, pre_bias=pre_bias)

    def with_input_scale(self, scale: float) -> "RawDictionary":
        """Weights for raw activations, where these are for activations times `scale`; latents keep their values."""
        return replace(
            self, W_enc_FD=self.W_enc_FD * scale, W_dec_FD=self.W_dec_FD / scale, b_dec_D=self.b_dec_D / scale
        )

    def with_unit_scores(self) -> "RawDictionary":
        """Latents times the norm of their decoder row, which then is 1: for SAEs that select by that product."""
        norm_F = self.W_dec_FD.norm(dim=1)
        return replace(
            self,
            W_enc_FD=self.W_enc_FD * norm_F[:, None],
            b_enc_F=self.b_enc_F * norm_F,
            W_dec_FD=self.W_dec_FD / norm_F[:, None],
        )

    def without_layer_norm(self, form: str) -> "RawDictionary":
        """Itself; raises GranaryError where the target `form` has no per-token normalisation."""
        if self.layer_norm:
            raise GranaryError(f"the {form} format has no layer_norm: per-token scales can't be folded into weights")
        return self

    def with_sample_std(self, *, scale_output: bool) -> "RawDictionary":
        """Weights for a per-token standard deviation over d - 1 (torch's default) in place of this project's over d."""
        ratio = sample_std_ratio(self.W_enc_FD.shape[1])
        return self._rescaled(ratio, scale_output)

    def from_sample_std(self, *, scale_output: bool) -> "RawDictionary":
        """The inverse of `with_sample_std`."""
        return self._rescaled(1 / sample_std_ratio(self.W_enc_FD.shape[1]), scale_output)

    def _rescaled(self, ratio: float, scale_output: bool) -> "RawDictionary":
        """Weights for inputs divided by `ratio`; and for outputs multiplied by it, if `scale_output`."""
        if not scale_output:
            raw = self.with_pre_bias(False)
            return replace(raw, W_enc_FD=raw.W_enc_FD * ratio)
        return self.with_input_scale(ratio)


def sample_std_ratio(width: int) -> float:
    """Standard deviation over d - 1 divided by that over d."""
    if width < 2:
        raise GranaryError("a per-token standard deviation needs at least 2 dimensions")
    return math.sqrt(width / (width - 1))
