"""sparsify (EleutherAI; also SAE Made Easy's multimodal-sae): ``cfg.json`` + ``sae.safetensors``.

Tensors: encoder.weight [F, D], encoder.bias, W_dec [F, D], b_dec, with a skip W_skip [D, D].

    SAE          f = topk(relu((x - b_dec) encoder^T + bias));   y = f W_dec + b_dec
    transcoder   f = topk(relu(x encoder^T + bias));             y = f W_dec + b_dec (+ x W_skip^T)

A transcoder (``transcode``) reads what goes into a module and writes what comes out of it, of the same width.
"""

import json
import re
from pathlib import Path

from safetensors.torch import save_file

from shared.basics.errors import GranaryError
from shared.sae.formats.raw import RawDictionary
from shared.sae.formats.source import Document, Source
from shared.sae.sites import Sites

CONFIG, WEIGHTS = "cfg.json", "sae"
# Options that change the function, and the value that leaves it a plain TopK SAE.
PLAIN = {
    "activation": "topk", "signed": False, "embed_skip": False, "gram_lookup": False,
}  # fmt: skip
# What goes into a module and what comes out of it.
SITES = {
    "": ("resid_pre", "resid_post"), ".mlp": ("mlp_in", "mlp_out"), ".self_attn": ("attn_in", "attn_out"),
}  # fmt: skip
HOLDS = {"sae": ("topk",), "transcoder": ("topk",), "skip_transcoder": ("topk",)}
HARMLESS = ("normalize_decoder", "multi_topk", "lookup_max_order", "gram_table_hash")


def matches(folder: Path) -> bool:
    """Whether `folder` looks like this format."""
    return (folder / CONFIG).is_file() and (folder / f"{WEIGHTS}.safetensors").is_file()


def read(source: Source) -> RawDictionary:
    """Raises GranaryError for signed latents, GroupMax, and a skip connection beside an SAE."""
    cfg = source.json(CONFIG, HARMLESS)
    for name, plain in PLAIN.items():
        cfg.must_be(name, plain, what="TopK alone")
    d = cfg.whole("d_in")
    expansion = cfg.get("expansion_factor")
    f = cfg.whole("num_latents") if cfg.get("num_latents") or expansion is None else d * cfg.whole("expansion_factor")
    shapes = {"encoder.weight": (f, d), "encoder.bias": (f,), "W_dec": (f, d), "b_dec": (d,)}
    tensors = source.safetensors(WEIGHTS)
    W_enc_FD, b_enc_F, W_dec_FD, b_dec_D = tensors.take(shapes)
    kind = kind_of(cfg)
    return RawDictionary(
        W_enc_FD,
        b_enc_F,
        W_dec_FD,
        b_dec_D,
        pre_bias=kind == "sae",
        kind=kind,
        W_skip_DD=tensors.take({"W_skip": (d, d)})[0] if kind == "skip_transcoder" else None,
        k=cfg.whole("k"),
        provenance={
            "converted_from": "sparsify",
            "source": cfg.content,
            **record_of(source.folder.name, is_transcoder=kind != "sae"),
        },
    )


def kind_of(cfg: Document) -> str:
    """Return the kind of dictionary."""
    transcodes, skips = cfg.flag("transcode", False), cfg.flag("skip_connection", False)
    if skips and not transcodes:
        raise GranaryError(f"{cfg.where} has skip_connection=True with transcode=False: a skip of what it gives back")
    return {(False, False): "sae", (True, False): "transcoder", (True, True): "skip_transcoder"}[transcodes, skips]


def record_of(name: str, *, is_transcoder: bool) -> dict[str, object]:
    """Where it reads and writes, from the folder's name, which is that of the module."""
    module = re.search(r"(?:^|\.)layers\.(\d+)(|\.mlp|\.self_attn)$", name)
    if module is None:
        return {}
    goes_in, comes_out = (f"layers.{module[1]}.{site}" for site in SITES[module[2]])
    return (Sites((goes_in,), (comes_out,)) if is_transcoder else Sites.of(comes_out)).record()


def save(raw: RawDictionary, folder: Path) -> None:
    """Write the folder; raises GranaryError for layer_norm, and for a transcoder between places of other widths."""
    raw = raw.without_layer_norm("sparsify").with_pre_bias(raw.kind == "sae")
    (f, d), d_out = raw.W_enc_FD.shape, raw.W_dec_FD.shape[1]
    if d != d_out:
        raise GranaryError(f"sparsify's transcoders write the width that they read: this one reads {d}, writes {d_out}")
    cfg = {
        "activation": "topk",
        "expansion_factor": max(1, f // d),
        "normalize_decoder": True,
        "num_latents": f,
        "k": raw.k,
        "multi_topk": False,
        "skip_connection": raw.kind == "skip_transcoder",
        "transcode": raw.kind != "sae",
        "d_in": d,
    }
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "encoder.weight": raw.W_enc_FD,
        "encoder.bias": raw.b_enc_F,
        "W_dec": raw.W_dec_FD,
        "b_dec": raw.b_dec_D,
        **({} if raw.W_skip_DD is None else {"W_skip": raw.W_skip_DD}),
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"{WEIGHTS}.safetensors")
    (folder / CONFIG).write_text(json.dumps(cfg, indent=2) + "\n", encoding="utf-8")
