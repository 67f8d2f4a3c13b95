"""Low-rank sparse attention, Lorsa (He et al. 2025, 2504.20938): a sparse stand-in for an attention layer.

    z[t, i] = sum_s A_h[t, s] w_V,i . x~_s + b_V,i;   f = activation(z)
    y^_t = denormalise(sum_i f[t, i] w_O,i + b_dec)

It reads what attention reads (``attn_in``) and produces what attention adds (``attn_out``). H heads of queries and keys
make patterns A_h, and each serves F / H latents, h = i H // F: latents are heads whose values and outputs have rank 1.
w_V are the rows of W_enc, w_O those of W_dec. How queries and keys become patterns is in the config, in the words of
the language model's own attention: rotation, scale, softcap, norms and window. A position attends to earlier ones of
its own document, those that are not learnt from included; padding is attended to by nothing.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from shared.basics.errors import GranaryError
from shared.kernels import PairGradient, PairOrder
from shared.kernels.attention import (
    Attended,
    Form,
    QueryKey,
    above,
    attach_attention,
    attend_all,
    attend_some,
    largest_of_batch,
    patterns,
    topk,
)
from shared.sae.activations import Encoder
from shared.sae.config import DictionaryConfig
from shared.sae.contexts import Contexts, Given
from shared.sae.latents import SAEOutput, SparseLatents
from shared.sae.roles import Role
from shared.sae.sites import Unit
from shared.sae.variants.one_group import OneGroup
from shared.sae.variants.transcoder import TranscoderConfig


@dataclass(frozen=True, kw_only=True)
class LorsaConfig(TranscoderConfig):
    """A Lorsa from one site to one site."""

    kind: ClassVar[str] = "lorsa"
    unit: ClassVar[Unit] = "sequence"

    qk_heads: int
    """Heads of queries and keys, H; each serves d_latent / H latents."""
    qk_width: int
    """Features of a query and of a key."""
    scale: float
    """Times the products of queries and keys."""
    softcap: float | None = None
    """c in c tanh(S / c), on the scores S; null: none."""
    window: int | None = None
    """Positions that a query looks back to, its own included; null: all of its document."""
    frequencies: tuple[float, ...] = ()
    """RoPE: radians per position of the pairs (i, i + R) of a head's first 2 R features; empty: no rotation."""
    rope_scale: float = 1.0
    """Times cosines and sines."""
    norm_eps: float | None = None
    """Epsilon of the RMSNorm of queries and keys, before the rotation; null: there is none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation == "signed_topk":
            raise GranaryError("sae.activation=signed_topk is read for linear encoders alone: a lorsa has none")
        for name in ("qk_heads", "qk_width"):
            if getattr(self, name) < 1:
                raise GranaryError(f"variant.{name}={getattr(self, name)}: must be at least 1")
        if self.d_latent % self.qk_heads:
            raise GranaryError(
                f"variant.qk_heads={self.qk_heads}: {self.d_latent} latents do not divide among them: change "
                "sae.expansion or sae.d_latent"
            )
        for name in ("scale", "softcap", "rope_scale", "norm_eps"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise GranaryError(f"variant.{name}={value}: must be a positive number")
        if self.window is not None and self.window < 1:
            raise GranaryError(f"variant.window={self.window}: must be at least 1, or null")
        if 2 * len(self.frequencies) > self.qk_width:
            raise GranaryError(
                f"variant.frequencies are {len(self.frequencies)}, of pairs of features, and a head has {self.qk_width}"
            )
        if self.is_autoencoder:
            raise GranaryError(f"a lorsa of {self.sites} to itself would learn to copy it: use variant=sae")

    @property
    def latents_per_head(self) -> int:
        """F / H."""
        return self.d_latent // self.qk_heads

    @property
    def form(self) -> Form:
        """How queries and keys become patterns."""
        return Form(self.scale, self.softcap, self.window, self.frequencies, self.rope_scale, self.norm_eps)

    def check_parts(self, parts: int) -> None:
        """Every part has whole heads. Raises GranaryError where that can't be."""
        if self.qk_heads % parts:
            raise GranaryError(
                f"the {self.qk_heads} heads of queries and keys do not divide among parallel.latent={parts}: change "
                "variant.qk_heads, or use parallel=ddp"
            )


@dataclass(frozen=True, slots=True)
class AttentionEncoder(Encoder):
    """The encoder as the choice of latents sees it; it reads whole contexts."""

    heads: QueryKey
    form: Form

    def read(self, x: Given) -> Attended:
        """What the operations of attention take."""
        assert isinstance(x, Contexts)
        return Attended(x.rows_CTD, x.documents_CT, x.places_N, self.heads, self.form, self.compute)

    def topk(self, x: Given, k: int) -> tuple[Tensor, Tensor]:
        """The k largest positive z of each position that counts."""
        return topk(self.read(x), self.W_enc, self.b_enc, k)

    def above(self, x: Given, threshold: Tensor | float) -> tuple[Tensor, Tensor]:
        """All z above a threshold, a scalar or [F]."""
        bar = torch.as_tensor(threshold, dtype=self.W_enc.dtype, device=self.W_enc.device)
        return above(self.read(x), self.W_enc, self.b_enc, bar)

    def largest_of_batch(self, x: Given, k: int) -> tuple[Tensor, Tensor]:
        """The N k largest positive z of all positions that count."""
        return largest_of_batch(self.read(x), self.W_enc, self.b_enc, k)


class Lorsa(OneGroup):
    """A Lorsa as its config describes it; random until it is learnt or ``from_pretrained``."""

    config_class: ClassVar[type[DictionaryConfig]] = LorsaConfig
    config: LorsaConfig
    is_two_rows: ClassVar[bool] = False

    W_Q: nn.Parameter
    """[H, E, D_in], E features of a head."""
    W_K: nn.Parameter
    b_Q: nn.Parameter
    """[H, E]."""
    b_K: nn.Parameter

    def make_held(self, held: range) -> None:
        """Rows of values and outputs, and the heads that serve them."""
        self.make_matrices(self.widths.d_in, self.widths.d_out, len(held))
        own, width = len(self.own_heads(held)), self.config.qk_width
        self.W_Q, self.W_K = (nn.Parameter(torch.empty(own, width, self.widths.d_in)) for _ in "QK")
        self.b_Q, self.b_K = (nn.Parameter(torch.zeros(own, width)) for _ in "QK")
        if self.config.norm_eps is not None:
            self.norm_Q, self.norm_K = (nn.Parameter(torch.ones(own, width)) for _ in "QK")

    def own_heads(self, held: range) -> range:
        """The heads of some latents."""
        per_head = self.config.latents_per_head
        return range(held.start // per_head, held.stop // per_head)

    def draw(self, held: range, generator: torch.Generator | None) -> None:
        """Unit rows, and heads with independent normal weights (Glorot and Bengio 2010); of all, those held here."""
        super().draw(held, generator)
        heads, width, d_in = self.config.qk_heads, self.config.qk_width, self.widths.d_in
        own, device = self.own_heads(held), None if generator is None else generator.device
        with torch.no_grad():
            for matrix in (self.W_Q, self.W_K):
                for head in range(heads):
                    drawn = torch.empty(width, d_in, device=device).normal_(generator=generator)
                    if head in own:
                        matrix[head - own.start] = drawn * math.sqrt(2 / (width + d_in))

    @property
    def query_key(self) -> QueryKey:
        """Weights of the heads held here."""
        norms = (self.norm_Q, self.norm_K) if self.config.norm_eps is not None else (None, None)
        return QueryKey(self.W_Q, self.b_Q, self.W_K, self.b_K, *norms)

    def encoder(self) -> AttentionEncoder:
        """The encoder as the choice sees it."""
        return AttentionEncoder(self.W_enc, self.b_enc, self.compute, None, self.query_key, self.config.form)

    def preactivations(self, given: Given) -> Tensor:
        """z [N, F] of all latents, with every gradient."""
        return attend_all(self.encoder().read(given), self.W_enc, self.b_enc)

    def preactivations_of(self, latents_R: Tensor, given: Given) -> Tensor:
        """z [N, R] of distinct latents, with gradients for their rows: heads are what the others make them."""
        heads_R = latents_R // self.config.latents_per_head
        return attend_some(self.encoder().read(given), heads_R, self.W_enc[latents_R], self.b_enc[latents_R])

    def attach(
        self,
        given: Given,
        pre_bias: Tensor | None,
        values_NK: Tensor,
        indices_NK: Tensor,
        order: PairOrder,
        sink: PairGradient | None,
    ) -> Tensor:
        """Chosen z as a differentiable function of the encoder, its heads included."""
        return attach_attention(self.encoder().read(given), values_NK, indices_NK, self.W_enc, self.b_enc)

    def patterns(self, x: Given) -> Tensor:
        """A [C, H, T, T] of raw activations, rows are queries: for looking at; nothing in training calls it."""
        contexts = self.contexts_of(x)
        rows = self.normalise(contexts.rows_CTD)[0]
        return patterns(rows, contexts.documents_CT, self.query_key, self.config.form, self.compute)

    # What it reads

    def contexts_of(self, x: Given) -> Contexts:
        """Whole contexts, where they are given as [..., T, D_in] each of them one document.

        Raises GranaryError for rows of tokens [N, D_in], which say nothing of what came before them.
        """
        if isinstance(x, Contexts):
            return x
        if x.dim() < 3:
            raise GranaryError(
                f"the lorsa reads whole contexts [contexts, positions, {self.widths.d_in}] and was given rows "
                f"{list(x.shape)}: shuffled tokens have lost what came before them"
            )
        return Contexts.whole(x.flatten(0, -3))

    def read(self, x: Given) -> tuple[Given, Tensor | None, Tensor | None]:
        """``normalise`` of all positions of what is learnt from."""
        contexts = self.contexts_of(x)
        return contexts.with_rows(self.normalise(contexts.rows_CTD)[0]), None, None

    @torch.no_grad()
    def encode(self, x: Given, *, return_all_features: bool = False) -> SparseLatents:
        """Active latents of raw activations: of ``Contexts`` those of the N positions that count, [N, K]; of
        [..., T, D_in], each [T, D_in] one document, [..., T, K]. No gradient.

        Raises GranaryError for rows of tokens [N, D_in].
        """
        given = self.read(x)[0]
        values_NK, indices_NK = self.fire(given)
        features = torch.relu(self.preactivations(given)) if return_all_features else None
        shape = (len(x),) if isinstance(x, Contexts) else x.shape[:-1]
        return SparseLatents(
            values_NK.view(*shape, -1),
            indices_NK.view(*shape, -1),
            all_features=None if features is None else features.view(*shape, -1),
        )

    def forward(self, x: Given, *, return_all_features: bool = False) -> SAEOutput:
        """Encode and decode, without gradient."""
        latents = self.encode(x, return_all_features=return_all_features)
        return SAEOutput(self.decode(latents), latents)

    def group_roles(self, *, unit_norm_decoder: bool) -> dict[str, Role]:
        """Heads are cut with the latents that they serve; gradients of values are sums over whole contexts."""
        roles = super().group_roles(unit_norm_decoder=unit_norm_decoder)
        names = ["W_Q", "W_K", "b_Q", "b_K", *(["norm_Q", "norm_K"] if self.config.norm_eps is not None else [])]
        heads = {name: Role(latent_axis=0, rate="bias" if name.startswith("b_") else "encoder") for name in names}
        return {**roles, "W_enc": Role(latent_axis=0, is_matrix=True), **heads}
