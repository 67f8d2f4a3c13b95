"""What every kind of dictionary has: normalisation of both sides, a bias of what is written, saving and loading.

    x~ = normalise(x);   f = activation(encode(x~));   y^ = denormalise(decode(f) + b_dec)

Sites lie side by side along the last axis. Letters: D_in sum of the widths that are read, D_out of those written,
N tokens, F latents, K picks per token.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from shared.basics.errors import GranaryError
from shared.kernels import Compute
from shared.sae import folder as on_disk
from shared.sae.config import DictionaryConfig
from shared.sae.contexts import Given
from shared.sae.groups import ComputeChoice, Computing, LatentGroup
from shared.sae.latents import SAEOutput, SparseLatents
from shared.sae.roles import Rate, Role
from shared.sae.sites import Sites, SiteWidths

LAYER_NORM_EPS = 1e-5


Picks = tuple[Tensor, Tensor]
"""Values [N, K] and int64 indices [N, K] of latents that fire, -1 for padding."""


class Dictionary(Computing):
    """The common part. Inputs of any float type are upcast to the parameters', float32.

    How it computes is not part of the config: `kernels` is auto, triton, torch or reference, and `compute_dtype`
    (float32 or bfloat16) is the type of the encoder's matrix product; see ``shared.kernels.encode_topk``. Both may be
    assigned later. Raises GranaryError for other values.
    """

    config_class: ClassVar[type[DictionaryConfig]]

    b_dec: nn.Parameter
    input_mean: Tensor
    input_scale: Tensor
    input_variance: Tensor
    output_mean: Tensor
    output_scale: Tensor
    output_variance: Tensor

    def __init__(
        self,
        config: DictionaryConfig,
        *,
        kernels: str = "auto",
        compute_dtype: str = "float32",
        generator: torch.Generator | None = None,
        held: range | None = None,
    ) -> None:
        """Kinds draw their first weights from `generator`; `held`: the latents held here, None: all."""
        nn.Module.__init__(self)
        try:
            Compute(kernels, compute_dtype)
        except ValueError as error:
            raise GranaryError(str(error)) from None
        self.config = config
        self.choice = ComputeChoice(kernels, compute_dtype)

    def make_normalisation(self) -> None:
        """Register the buffers of both sides; an autoencoder's sides are one."""
        d_in, d_out = self.widths.d_in, self.widths.d_out
        self.register_buffer("input_mean", torch.zeros(d_in))
        self.register_buffer("input_scale", _one_per_site(self.widths.reads))
        self.register_buffer("input_variance", torch.ones(d_in))  # of the normalised input
        if not self.config.is_autoencoder:
            self.register_buffer("output_mean", torch.zeros(d_out))
            self.register_buffer("output_scale", _one_per_site(self.widths.writes))
            self.register_buffer("output_variance", torch.ones(d_out))  # of the normalised target

    @property
    def groups(self) -> tuple[LatentGroup, ...]:
        """The latents, by what they read and write. The latents of a dictionary are numbered group after group."""
        raise NotImplementedError

    @property
    def places(self) -> tuple[tuple[slice, slice], ...]:
        """Which columns each group reads, of all that is read side by side, and which it writes."""
        raise NotImplementedError

    @property
    def decoders(self) -> list[tuple[nn.Parameter, slice]]:
        """Every W_dec, and the columns that it writes."""
        return [(group.W_dec, writes) for group, (_, writes) in zip(self.groups, self.places, strict=True)]

    @property
    def sites(self) -> Sites | None:
        """Where it reads and writes, where that is known."""
        return self.config.sites

    @property
    def widths(self) -> SiteWidths:
        """Features of each site."""
        return self.config.widths

    @property
    def written_sites(self) -> tuple[str, ...]:
        """Names of the written sites; where they are not known, their numbers."""
        return tuple(map(str, range(len(self.config.widths.writes)))) if self.sites is None else self.sites.writes

    @property
    def group_names(self) -> tuple[str, ...]:
        """Names of groups that read a site each, or their numbers where no site is known; empty where one group is
        all."""
        if self.config.num_groups == 1:
            return ()
        return tuple(map(str, range(self.config.num_groups))) if self.sites is None else self.sites.reads

    @property
    def target_variance(self) -> Tensor:
        """Variance [D_out], over the data set, of what the decoder must give."""
        return self.input_variance if self.config.is_autoencoder else self.output_variance

    def roles(self) -> dict[str, Role]:
        """What each parameter and buffer is, by its name in ``state_dict``."""
        fixed = dict.fromkeys(
            (name for name, _ in self.named_buffers(recurse=False)), Role(latent_axis=None, learnt=False)
        )
        return {"b_dec": Role(latent_axis=None), **fixed}

    def latent_rows(self, rate: Rate) -> Tensor | None:
        """The one matrix of a row per latent that learns at this rate (encoder, decoder); None: there is no such."""
        tensors = self.state_dict()
        found = [tensors[name] for name, role in self.roles().items() if role.is_matrix and role.rate == rate]
        return found[0] if len(found) == 1 else None

    # Between the units of activations and those of encoder and decoder

    def normalise(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Raw activations [..., D_in] to the encoder's units, with the per-token mean and scale under layer_norm."""
        if x.shape[-1] != self.widths.d_in:
            raise GranaryError(f"the {self._name} reads activations of width {self.widths.d_in}, got {x.shape[-1]}")
        x = x.to(self.b_dec.dtype)
        if self.config.normalisation == "layer_norm":
            mean = x.mean(-1, keepdim=True)
            scale = (x - mean).square().mean(-1, keepdim=True).sqrt() + LAYER_NORM_EPS
            return (x - mean) / scale, mean, scale
        if self.config.normalisation == "none":
            return x, None, None
        return (x - self.input_mean) * per_column(self.input_scale, self.widths.reads), None, None

    def read(self, x: Given) -> tuple[Given, Tensor | None, Tensor | None]:
        """``normalise`` of what is learnt from. Raises GranaryError for whole contexts where tokens are read."""
        if not isinstance(x, Tensor):
            raise GranaryError(f"the {self._name} reads tokens one by one, and was given whole contexts: give rows")
        return self.normalise(x)

    def target(self, y: Tensor, normal: Tensor) -> Tensor:
        """What the decoder must give [..., D_out] for raw activations `y`; `normal` is the normalised input."""
        if self.config.is_autoencoder:
            return normal if self.config.shift_back else y.to(normal)
        if y.shape[-1] != self.widths.d_out:
            raise GranaryError(f"the {self._name} writes activations of width {self.widths.d_out}, got {y.shape[-1]}")
        return (y.to(self.b_dec.dtype) - self.output_mean) * per_column(self.output_scale, self.widths.writes)

    def denormalise(self, y_hat: Tensor, token_mean: Tensor | None = None, token_scale: Tensor | None = None) -> Tensor:
        """Decoded latents to the units of the activations that are written; the inverse of ``target``."""
        config = self.config
        if not config.is_autoencoder:
            return y_hat / per_column(self.output_scale, self.widths.writes) + self.output_mean
        if not config.shift_back:
            return y_hat
        if config.normalisation == "layer_norm":
            if token_mean is None or token_scale is None:
                raise GranaryError("under layer_norm these latents need their tokens' mean and scale, as encode gives")
            return y_hat * token_scale + token_mean
        if config.normalisation == "none":
            return y_hat
        return y_hat / per_column(self.input_scale, self.widths.reads) + self.input_mean

    def skip(self, normal: Tensor) -> Tensor | None:
        """What reaches the output past the latents [..., D_out], in the decoder's units, with gradient; None: nothing.

        `normal` is the normalised input.
        """
        return None

    # The same for tokens in the encoder's units, which the start of learning looks at

    def centred(self, normal_ND: Tensor) -> Tensor:
        """What the encoders multiply, side by side, from the normalised input."""
        return normal_ND

    def fire(self, centred: Any) -> Picks:
        """Latents of what the encoders multiply, ``Given`` of its unit, by their numbers in the dictionary."""
        raise NotImplementedError

    def split(self, values_NK: Tensor, indices_NK: Tensor) -> list[Picks]:
        """Picks as those of each group, by the group's own numbers."""
        raise NotImplementedError

    def decoded(self, values_NK: Tensor, indices_NK: Tensor) -> Tensor:
        """What they decode to, without b_dec, [N, D_out] in the decoder's units."""
        raise NotImplementedError

    @torch.no_grad()
    def start_decoders(self, rows: Sequence[Tensor], norms: Sequence[Tensor]) -> None:
        """Give each decoder these rows, made unit by their `norms` [F, 1]; latents whose row is 0 keep theirs."""
        for (W_dec, _), rows_FD, norm_F1 in zip(self.decoders, rows, norms, strict=True):
            W_dec.copy_(torch.where(norm_F1 > 0, rows_FD / norm_F1.clamp_min(1e-30), W_dec))

    # Inference

    def encode(self, x: Tensor, *, return_all_features: bool = False) -> SparseLatents:
        """Active latents of raw activations x [..., D_in]; values and indices are [..., K]. No gradient."""
        raise NotImplementedError

    def decode(self, latents: SparseLatents) -> Tensor:
        """Reconstruction [..., D_out] of what is written, in the units of raw activations. No gradient."""
        raise NotImplementedError

    def forward(self, x: Tensor, *, return_all_features: bool = False) -> SAEOutput:
        """Encode and decode x [..., D_in], without gradient."""
        latents = self.encode(x, return_all_features=return_all_features)
        return SAEOutput(self.decode(latents), latents)

    # On disk

    def save_pretrained(
        self, folder: str | Path, provenance: dict[str, Any] | None = None, training: dict[str, Any] | None = None
    ) -> None:
        """Write ``config.json`` and ``sae.safetensors``; `training` is a record of how it was learnt.

        Where the config names no sites, ``provenance["hook"]`` is the one site of an SAE.
        """
        on_disk.save(Path(folder), self.config, self.state_dict(), training or {}, provenance or {})

    @classmethod
    def from_pretrained(
        cls, path_or_hub_id: str | Path, *, device: str | torch.device = "cpu", verify: bool | None = None
    ) -> Self:
        """Load a local folder or a Hugging Face hub repository (owner/name, hf://owner/name/folder).

        It needs no GPU and no triton, and reads every format of ``shared.sae.formats``. `verify`: compare every tensor
        with its digest in ``config.json``; None: where that takes less than a second. Raises GranaryError when the
        folder is missing, torn, damaged, of a format that is not known, or holds a dictionary of another kind.
        """
        folder = on_disk.locate(path_or_hub_id)
        config, tensors = on_disk.read_weights(folder, [cls.config_class], device, verify=verify)
        return cls.from_tensors(config, tensors, str(path_or_hub_id))

    @classmethod
    def from_tensors(cls, config: DictionaryConfig, tensors: dict[str, Tensor], where: str) -> Self:
        """A dictionary that owns `tensors`; raises GranaryError, naming `where`, unless they fit the config."""
        with torch.device("meta"):
            made = cls(config)
        expected = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if expected != found:
            wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            raise GranaryError(f"{where}: tensors missing, unknown or of the wrong shape: {', '.join(wrong)}")
        made.load_state_dict(tensors, assign=True)
        return made

    @property
    def _name(self) -> str:
        return "SAE" if self.config.kind == "sae" else self.config.kind


def per_column(scale: Tensor, widths: tuple[int, ...]) -> Tensor:
    """One scale per site as one per column; a single site's stays a scalar."""
    if scale.dim() == 0:
        return scale
    return scale.repeat_interleave(torch.tensor(widths, device=scale.device), output_size=sum(widths))


def _one_per_site(widths: tuple[int, ...]) -> Tensor:
    return torch.ones(()) if len(widths) == 1 else torch.ones(len(widths))
