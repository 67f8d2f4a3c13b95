"""Llamascopium's Lorsas, of the folders that ``llamascopium`` reads.

Tensors: W_Q, W_K [H, D, E], b_Q, b_K [H, E], W_V, W_O [F, D], b_V [F], b_D [D]; with ``use_post_qk_ln`` ln_q.w, ln_k.w
[H, E] of an RMSNorm. A file may have fewer heads than ``n_qk_heads``: each is then there several times. RoPE turns the
first ``rotary_dim`` features, in adjacent pairs or in halves, from position 0 of each sequence; scores are divided by
``attn_scale``. With m_i = |W_O,i| where ``sparsity_include_decoder_norm``, or 1,

    z = sum_s A[t, s] (x_s W_V^T + b_V);   f = activation(z m) / m;   y = f W_O + b_D

m goes into values and out of W_O here, and adjacent pairs become halves by an order of features, which no product of a
query with a key sees.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.sae.config import DictionaryConfig
from shared.sae.formats.llamascopium_frame import Frame
from shared.sae.formats.source import Document, Tensors
from shared.sae.sites import Sites

# What its modules keep beside weights; all follows from the settings, and rotations are compared with them.
KEPT = ("mask", "IGNORE")
ROTATION = ("rotary_cos", "rotary_sin")


@dataclass(frozen=True)
class RawLorsa:
    """A Lorsa as it is read: fields of its config and tensors, by this project's names."""

    frame: Frame
    fields: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def provenance(self) -> dict[str, Any]:
        """Where it is from."""
        return self.frame.provenance

    def to_checkpoint(self, kinds: Mapping[str, type[DictionaryConfig]]) -> tuple[DictionaryConfig, dict[str, Tensor]]:
        """Config and tensors of a dictionary of this project."""
        tensors = {**self.tensors, **self.frame.tensors()}
        config = self.frame.config(kinds["lorsa"], self.fields)
        return config, {name: tensor.contiguous() for name, tensor in tensors.items()}

    def at(self, sites: Sites) -> Self:
        """The same at these sites."""
        return replace(self, frame=self.frame.at(sites))


def read_lorsa(cfg: Document, found: Tensors, frame: Frame) -> RawLorsa:
    """Raises GranaryError for what this project's form can't say."""
    d, heads, width = frame.d, cfg.whole("n_qk_heads"), cfg.whole("d_qk_head")
    cfg.must_be("positional_embedding_type", "rotary", "none", what="a lorsa with RoPE, or without positions,")
    cfg.must_be("rotary_scale", 1, what="a lorsa of rotary_scale=1")
    frequencies = frequencies_of(cfg)
    normed = cfg.flag("use_post_qk_ln", False)
    if normed:
        cfg.must_be("normalization_type", "RMS", what="a lorsa whose queries and keys pass an RMSNorm")
    cfg.get("normalization_type")
    eps = 1e-6 if cfg.get("eps") is None else cfg.number("eps")
    scale = math.sqrt(width) if cfg.get("attn_scale") is None else cfg.number("attn_scale")
    if not scale > 0:
        raise GranaryError(f"{cfg.where} has attn_scale={scale}, which is not above 0")
    in_file = found.found["W_Q"].shape[0] if "W_Q" in found and found.found["W_Q"].dim() == 3 else heads
    if heads % in_file:
        raise GranaryError(f"{found.where}: W_Q has {in_file} heads, of which n_qk_heads={heads} is no multiple")
    order_E = order_of(cfg, len(frequencies), width)
    f, _ = found.matrix("W_V")
    W_V_FD, b_V_F, W_O_FD = found.take({"W_V": (f, d), "b_V": (f,), "W_O": (f, d)})
    tensors: dict[str, Tensor] = {}
    for which in "QK":
        W_HDE, b_HE = found.take({f"W_{which}": (in_file, d, width), f"b_{which}": (in_file, width)})
        own = {f"W_{which}": W_HDE.mT, f"b_{which}": b_HE}
        if normed:
            own[f"norm_{which}"] = found.take({f"ln_{which.lower()}.w": (in_file, width)})[0]
        tensors |= {name: rows[:, order_E].repeat_interleave(heads // in_file, 0) for name, rows in own.items()}
    norm_F = W_O_FD.norm(dim=1).clamp_min(1e-30) if frame.unit_norms else torch.ones(f)
    tensors |= {
        "W_enc": W_V_FD * norm_F[:, None],
        "b_enc": b_V_F * norm_F,
        "W_dec": W_O_FD / norm_F[:, None],
        **frame.thresholds(found, f),
    }
    check_rotation(cfg, found, frequencies)
    fields = {
        "d_latent": f,
        "qk_heads": heads,
        "qk_width": width,
        "scale": 1 / scale,
        "frequencies": frequencies,
        "norm_eps": eps if normed else None,
    }
    return RawLorsa(frame, fields, tensors)


def frequencies_of(cfg: Document) -> tuple[float, ...]:
    """Radians per position of each pair of features; with the settings of Llama 3.1 some are slower."""
    keys = ("rotary_dim", "rotary_base", "use_NTK_by_parts_rope", "old_context_len", "n_ctx", "rotary_adjacent_pairs")
    parts = tuple(f"NTK_by_parts_{name}" for name in ("factor", "low_freq_factor", "high_freq_factor"))
    for name in (*keys, *parts):  # known, also where nothing turns
        cfg.get(name)
    if cfg.text("positional_embedding_type") == "none":
        return ()
    size = cfg.whole("rotary_dim")
    base = 10_000.0 if cfg.get("rotary_base") is None else cfg.number("rotary_base")
    turns_R = base ** -(torch.arange(0, size, 2).double() / size)
    if cfg.flag("use_NTK_by_parts_rope", False):
        factor, low, high = map(cfg.number, parts)
        turned_R = cfg.whole("old_context_len") * turns_R / (2 * math.pi)
        share_R = ((turned_R - low) / (high - low)).clamp(0, 1)
        turns_R = turns_R * (share_R + (1 - share_R) / factor)
    return tuple(turns_R.tolist())


def order_of(cfg: Document, half: int, width: int) -> Tensor:
    """Which of their features is each of ours."""
    turned_R = torch.arange(2 * half)
    if cfg.flag("rotary_adjacent_pairs", True):
        turned_R = torch.cat([turned_R[::2], turned_R[1::2]])
    return torch.cat([turned_R, torch.arange(2 * half, width)])


def check_rotation(cfg: Document, found: Tensors, frequencies: tuple[float, ...]) -> None:
    """Raise GranaryError where the file keeps cosines or sines that are not those of its settings."""
    for name in KEPT:
        if name in found:
            found.found.pop(name)
    for name in ROTATION:
        if name not in found:
            continue
        kept_TR = found.found.pop(name)
        angles_TR = torch.arange(len(kept_TR)).double()[:, None] * torch.tensor(frequencies, dtype=torch.float64)
        wanted_TR = torch.cos(angles_TR) if name == "rotary_cos" else torch.sin(angles_TR)
        is_adjacent = cfg.flag("rotary_adjacent_pairs", True)
        wanted_TR = wanted_TR.repeat_interleave(2, 1) if is_adjacent else torch.cat([wanted_TR] * 2, 1)
        same_shape = kept_TR.shape == wanted_TR.shape
        if not (same_shape and torch.allclose(kept_TR.double(), wanted_TR, atol=2e-2)):
            raise GranaryError(f"{found.where}: {name} is not what the settings of the rotation say")
