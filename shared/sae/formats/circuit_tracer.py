"""circuit-tracer 0.5: folders for its attribution graphs, written for ``ReplacementModel.from_pretrained``.

A set of transcoders, one per layer from 0 on, as ``layer_{i}.safetensors``: W_enc [F, d], b_enc [F], W_dec [F, d],
b_dec [d], where there are thresholds ``activation_function.threshold`` [F], with a skip W_skip [d, d] (x W_skip^T).

A cross-layer transcoder as ``W_enc_{l}.safetensors`` (W_enc_{l} [F, d], b_enc_{l}, b_dec_{l}, threshold_{l}) and
``W_dec_{l}.safetensors`` (W_dec_{l} [F, L - l, d]). Its loader does not read skips, so that one with skips is refused.

``config.yaml`` names the model, the kind and the two places. Latents fire above their threshold, or above 0.
"""

from collections.abc import Mapping
from pathlib import Path

from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.sae.formats.folded import Folded
from shared.sae.sites import Sites

PLACES = {"mlp_in": "mlp.hook_in", "mlp_out": "mlp.hook_out", "resid_mid": "hook_resid_mid"}


def save_set(layers: Mapping[int, Folded], folder: Path, scan: str) -> None:
    """Write transcoders by layer, called `scan`, into an empty folder.

    Raises GranaryError for a layer that is missing, and for unequal widths.
    """
    numbers = sorted(layers)
    if numbers != list(range(len(numbers))):
        raise GranaryError(
            f"circuit-tracer replaces every MLP from layer 0 on, the set has layers {', '.join(map(str, numbers))}: "
            "train the others too"
        )
    sizes = {tuple(layers[number].groups[0].W_enc.shape) for number in numbers}
    if len(sizes) > 1:
        raise GranaryError(f"circuit-tracer needs equally many latents at every layer, not {sorted(sizes)}")
    if len({layers[number].W_skip is None for number in numbers}) > 1:
        raise GranaryError("circuit-tracer takes a set whose transcoders all have a skip, or none of them")
    for number in numbers:
        one = layers[number]
        (group,) = one.groups
        tensors = {"W_enc": group.W_enc, "b_enc": group.b_enc, "W_dec": group.W_dec, "b_dec": one.b_dec}
        if group.threshold is not None:
            tensors["activation_function.threshold"] = group.threshold
        if one.W_skip is not None:
            tensors["W_skip"] = one.W_skip
        write(tensors, folder / f"layer_{number}.safetensors")
    write_config(folder, scan, "transcoder_set", layers[0], [layers[number].sites for number in numbers])


def save_clt(clt: Folded, folder: Path, scan: str) -> None:
    """Write a cross-layer transcoder, called `scan`, into an empty folder.

    Raises GranaryError for one with skips, and for written sites of other widths.
    """
    if clt.W_skip is not None:
        raise GranaryError(
            "circuit-tracer's loader of cross-layer transcoders leaves skips out: it can't hold this one"
        )
    widths = set(clt.write_widths)
    if len(widths) > 1:
        raise GranaryError(f"circuit-tracer needs written sites of one width, not {sorted(widths)}")
    (width,) = widths
    for number, (group, b_dec) in enumerate(zip(clt.groups, clt.b_dec.split(width), strict=True)):
        tensors = {f"W_enc_{number}": group.W_enc, f"b_enc_{number}": group.b_enc, f"b_dec_{number}": b_dec}
        if group.threshold is not None:
            tensors[f"threshold_{number}"] = group.threshold
        write(tensors, folder / f"W_enc_{number}.safetensors")
        rows = group.W_dec.view(len(group.W_dec), -1, width)
        write({f"W_dec_{number}": rows}, folder / f"W_dec_{number}.safetensors")
    reads, writes = clt.sites.reads, clt.sites.writes
    sites = [Sites((one,), (other,)) for one, other in zip(reads, writes, strict=True)]
    write_config(folder, scan, "cross_layer_transcoder", clt, sites)


def write_config(folder: Path, scan: str, kind: str, first: Folded, sites: list[Sites]) -> None:
    """``config.yaml``; raises GranaryError for places that circuit-tracer has no name of, or not in order."""
    places = set()
    for number, one in enumerate(sites):
        names = []
        for site in (one.reads[0], one.writes[0]):
            layer, _, place = site.removeprefix("layers.").partition(".")
            if layer != str(number) or place not in PLACES:
                raise GranaryError(
                    f"circuit-tracer has no place for {site} as the site of layer {number}: it takes "
                    f"{', '.join(PLACES)} of every layer"
                )
            names.append(PLACES[place])
        places.add(tuple(names))
    if len(places) > 1:
        raise GranaryError("circuit-tracer reads one kind of place and writes one, at every layer alike")
    ((reads, writes),) = places
    document = {
        "model_name": first.model,
        "model_kind": kind,
        "feature_input_hook": reads,
        "feature_output_hook": writes,
        "scan": scan,
    }
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(document)), encoding="utf-8")


def write(tensors: Mapping[str, Tensor], path: Path) -> None:
    """One safetensors file."""
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
