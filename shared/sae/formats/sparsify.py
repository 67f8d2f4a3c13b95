"""sparsify (EleutherAI; also SAE Made Easy's multimodal-sae): ``cfg.json`` + ``sae.safetensors``.

Tensors: encoder.weight [F, D], encoder.bias, W_dec [F, D], b_dec. encode = topk(relu((x - b_dec) encoder^T + bias)).
"""

import json
import re
from pathlib import Path

from safetensors.torch import save_file

from shared.sae.formats.raw import RawSAE
from shared.sae.formats.source import Source

CONFIG, WEIGHTS = "cfg.json", "sae"
# Options that change the function, and the value that leaves it a plain TopK SAE.
PLAIN = {
    "activation": "topk", "signed": False, "transcode": False, "skip_connection": False, "embed_skip": False,
    "gram_lookup": False,
}  # fmt: skip
SITES = {"": "resid_post", ".mlp": "mlp_out", ".self_attn": "attn_out"}
HARMLESS = ("normalize_decoder", "multi_topk", "lookup_max_order", "gram_table_hash")


def matches(folder: Path) -> bool:
    """Whether `folder` looks like this format."""
    return (folder / CONFIG).is_file() and (folder / f"{WEIGHTS}.safetensors").is_file()


def read(source: Source) -> RawSAE:
    """Raises GranaryError for transcoders, skip connections, signed latents and GroupMax."""
    cfg = source.json(CONFIG, HARMLESS)
    for name, plain in PLAIN.items():
        cfg.must_be(name, plain, what="plain TopK SAEs alone")
    d = cfg.whole("d_in")
    expansion = cfg.get("expansion_factor")
    f = cfg.whole("num_latents") if cfg.get("num_latents") or expansion is None else d * cfg.whole("expansion_factor")
    shapes = {"encoder.weight": (f, d), "encoder.bias": (f,), "W_dec": (f, d), "b_dec": (d,)}
    W_enc_FD, b_enc_F, W_dec_FD, b_dec_D = source.safetensors(WEIGHTS).take(shapes)
    # The folder is named after the module whose output is read.
    module = re.search(r"(?:^|\.)layers\.(\d+)(|\.mlp|\.self_attn)$", source.folder.name)
    return RawSAE(
        W_enc_FD,
        b_enc_F,
        W_dec_FD,
        b_dec_D,
        k=cfg.whole("k"),
        pre_bias=True,
        provenance={
            "converted_from": "sparsify",
            "source": cfg.content,
            **({"hook": f"layers.{module[1]}.{SITES[module[2]]}"} if module else {}),
        },
    )


def save(raw: RawSAE, folder: Path) -> None:
    """Write the folder; raises GranaryError for layer_norm."""
    raw = raw.expressed_in("sparsify", ("topk",)).without_layer_norm("sparsify").with_pre_bias(True)
    f, d = raw.W_enc_FD.shape
    cfg = {
        "activation": "topk",
        "expansion_factor": max(1, f // d),
        "normalize_decoder": True,
        "num_latents": f,
        "k": raw.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": d,
    }
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "encoder.weight": raw.W_enc_FD,
        "encoder.bias": raw.b_enc_F,
        "W_dec": raw.W_dec_FD,
        "b_dec": raw.b_dec_D,
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"{WEIGHTS}.safetensors")
    (folder / CONFIG).write_text(json.dumps(cfg, indent=2) + "\n", encoding="utf-8")
