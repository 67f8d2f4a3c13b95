"""Dictionaries out of circuit-tracer's folders: a transcoder per layer, or a cross-layer transcoder."""

from collections.abc import Mapping

import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.sae.config import DictionaryConfig
from shared.sae.formats.circuit_tracer_folder import TracerFolder
from shared.sae.sites import Sites
from shared.sae.variants import CLT, Dictionary, Transcoder
from shared.sae.variants.clt import CLTConfig
from shared.sae.variants.skip_transcoder import SkipTranscoder, SkipTranscoderConfig
from shared.sae.variants.transcoder import TranscoderConfig


def configs(folder: TracerFolder) -> list[DictionaryConfig]:
    """Return those of each layer's transcoder, or of the one CLT, from the files' headers.

    Raises GranaryError for matrices that do not fit together.
    """
    shapes = [folder.shape(layer) for layer in range(len(folder.sites))]
    if folder.is_clt:
        latents, width, _ = shapes[0]
        if shapes != [(latents, width, (len(shapes) - layer) * width) for layer in range(len(shapes))]:
            raise GranaryError(f"{folder.folder} is no CLT of equal layers: {shapes}")
        widths = (width,) * len(shapes)
        reads, writes = (tuple(one) for one in zip(*((s.reads[0], s.writes[0]) for s in folder.sites), strict=True))
        return [
            CLTConfig(
                read_widths=widths, write_widths=widths, d_latent=latents * len(shapes), k=None,
                activation="jumprelu" if folder.has(0, folder.threshold(0)) else "relu", normalisation="none",
                pre_bias=False, unit_norm_decoder=False, sites=Sites(reads, writes),
            )
        ]  # fmt: skip
    found: list[DictionaryConfig] = []
    for layer, (latents, d_in, d_out) in enumerate(shapes):
        kind = SkipTranscoderConfig if folder.has(layer, "W_skip") else TranscoderConfig
        activation = "jumprelu" if folder.has(layer, folder.threshold(layer)) else "relu"
        found.append(
            kind(
                d_in=d_in, d_out=d_out, d_latent=latents, k=None, activation=activation, normalisation="none",
                pre_bias=False, unit_norm_decoder=False, sites=folder.sites[layer],
            )
        )  # fmt: skip
    return found


def transcoder(folder: TracerFolder, config: DictionaryConfig, layer: int) -> Dictionary:
    """Read that of one layer; float32 of the file stays there, mapped. Raises GranaryError for what does not fit."""
    held = folder.tensors(layer)
    made = SkipTranscoder if config.kind == SkipTranscoderConfig.kind else Transcoder
    skip = {"W_skip": held["W_skip"]} if "W_skip" in held else {}
    tensors = {**_group(held), **skip, "b_dec": held["b_dec"]}
    return made.from_tensors(config, _whole(made, config, tensors), str(folder.folder))


def clt(folder: TracerFolder, config: DictionaryConfig) -> CLT:
    """All layers. Raises GranaryError for what does not fit."""
    tensors: dict[str, Tensor] = {}
    b_dec = []
    for layer in range(len(folder.sites)):
        held = folder.tensors(layer)
        tensors |= {f"layers.{layer}.{name}": tensor for name, tensor in _group(held).items()}
        b_dec.append(held["b_dec"])
    tensors["b_dec"] = torch.cat(b_dec)
    return CLT.from_tensors(config, _whole(CLT, config, tensors), str(folder.folder))


def _group(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = {name: held[name] for name in ("W_enc", "b_enc", "W_dec")}
    if "threshold" in held:
        tensors["activation.log_threshold"] = held["threshold"].log()
    return tensors


def _whole(kind: type[Dictionary], config: DictionaryConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the buffers of no normalisation, which the files do not have."""
    with torch.device("meta"):
        buffers = dict(kind(config).named_buffers())
    idle = {
        name: (torch.zeros if name.endswith("mean") else torch.ones)(buffer.shape)
        for name, buffer in buffers.items()
        if name not in tensors
    }
    return {**idle, **tensors}
