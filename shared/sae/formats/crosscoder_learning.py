"""crosscoder_learning (science-of-finetuning): ``config.json`` + ``final.pt``, or its hub's ``model.safetensors``.

Tensors, of K sites of width d: encoder.weight [K, d, F], encoder.bias [F], decoder.weight [K, F, d], decoder.bias
[K, d]; of a BatchTopKCrossCoder k and threshold. With c_k = activation_global_scale[k] and mu_k = activation_mean[k],
where these are numbers and not NaN:

    z = sum_k c_k (x_k - mu_k) encoder_k + bias;   f = relu(z), or where relu(z) s > threshold
    y_k = (f decoder_k + bias_k) / (c_k + 1e-8) + mu_k

s, by code_normalization_id: 1 sum of the norms of a latent's decoder rows over sites, 2 norm of all of them, 3 the
second plus a tenth of the first, 4 one. 5 lets a latent fire at one site and not at another, and can't be read.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.sae.formats.files import read_json
from shared.sae.formats.raw import RawDictionary
from shared.sae.formats.source import Document, Source, Tensors
from shared.sae.sites import SiteWidths

SCALE = "activation_global_scale"
CONFIG, PICKLED, WEIGHTS = "config.json", "final.pt", "model"
CLASSES = {"relu": "CrossCoder", "batchtopk": "BatchTopKCrossCoder"}
HOLDS = {"crosscoder": tuple(CLASSES)}
SUM, NONE = 1, 4
MIXED_SHARES = {"code_normalization_alpha_sae": 1.0, "code_normalization_alpha_cc": 0.1}
EPS = 1e-8
# How it was trained; what of it is needed lies among the tensors.
HARMLESS = (
    "activation_dim", "auxk_alpha", "code_normalization", "decay_start", "device", "dict_class", "dict_class_kwargs",
    "dict_size", "init_with_transpose", "k", "k_annealing_steps", "k_initial", "k_target", "l1_penalty", "layer",
    "lm_name", "lr", "norm_init_scale", "num_layers", "resample_steps", "same_init_for_all_layers", "seed", "steps",
    "submodule_name", "target_rms", "threshold_beta", "threshold_start_step", "top_k_aux", "trainer_class",
    "use_mse_loss", "wandb_name", "warmup_steps",
)  # fmt: skip


def matches(folder: Path) -> bool:
    """Whether `folder` looks like this format."""
    path = folder / CONFIG
    if not path.is_file():
        return False
    if (folder / PICKLED).is_file():
        trainer = read_json(path).get("trainer")
        return isinstance(trainer, dict) and trainer.get("dict_class") in CLASSES.values()
    return (folder / f"{WEIGHTS}.safetensors").is_file() and {"num_layers", "dict_size"} <= read_json(path).keys()


def read(source: Source) -> RawDictionary:
    """Raises GranaryError for a code of each site's own."""
    if (source.folder / PICKLED).is_file():
        trainer = source.json(CONFIG, ("buffer",)).mapping("trainer")
        cfg = source.document(trainer, source.folder / CONFIG, HARMLESS)
        tensors = source.pickled(PICKLED, ("target_rms",))
    else:
        cfg = source.json(CONFIG, HARMLESS)
        tensors = source.safetensors(WEIGHTS, ("target_rms",))
    for name in ("encoder_layers", "latent_processor", "num_decoder_layers"):
        cfg.must_be(name, None, what="crosscoders that read and write the same sites")
    k, d, f = shape_of(tensors)
    W_enc_KDF, b_enc_F, W_dec_KFD, b_dec_KD = tensors.take(
        {"encoder.weight": (k, d, f), "encoder.bias": (f,), "decoder.weight": (k, f, d), "decoder.bias": (k, d)}
    )
    norm_F = code_norm(tensors, cfg, W_dec_KFD)
    scale_in_K, scale_out_K, mean_KD = normaliser(tensors, k, d)
    W_enc_KDF = W_enc_KDF * scale_in_K[:, None, None]
    shift_F = torch.einsum("kdf,kd->f", W_enc_KDF.double(), mean_KD.double()).float()
    raw = RawDictionary(
        W_enc_KDF.flatten(0, 1).T,
        b_enc_F - shift_F,
        (W_dec_KFD / scale_out_K[:, None, None]).transpose(0, 1).flatten(1),
        (b_dec_KD / scale_out_K[:, None] + mean_KD).flatten(),
        pre_bias=False,
        kind="crosscoder",
        widths=SiteWidths((d,) * k, (d,) * k),
        activation="relu",
        provenance={"converted_from": "crosscoder_learning", "source": cfg.content},
    )
    return with_threshold(raw, tensors, norm_F) if "threshold" in tensors else raw


def shape_of(tensors: Tensors) -> tuple[int, int, int]:
    """Sites, width and latents; zeros where the encoder is missing or of another form, which ``take`` then says."""
    shape = tuple(tensors.found["encoder.weight"].shape) if "encoder.weight" in tensors else ()
    return (shape[0], shape[1], shape[2]) if len(shape) == 3 else (0, 0, 0)


def code_norm(tensors: Tensors, cfg: Document, W_dec_KFD: Tensor) -> Tensor:
    """[F]: what relu(z) is multiplied by where it is compared with the threshold."""
    share_sae, share_cc = (
        default if cfg.get(name) is None else cfg.number(name) for name, default in MIXED_SHARES.items()
    )
    norm_KF = W_dec_KFD.norm(dim=2)
    code = int(tensors.scalar("code_normalization_id")) if "code_normalization_id" in tensors else SUM
    match code:
        case 1:
            return norm_KF.sum(0)
        case 2:
            return norm_KF.norm(dim=0)
        case 3:
            return share_sae * norm_KF.norm(dim=0) + share_cc * norm_KF.sum(0)
        case 4:
            return torch.ones(norm_KF.shape[1])
    raise GranaryError(
        f"{cfg.where}: code_normalization_id={code}: 1 to 4 can be read; 5, a latent that fires at one site and not at "
        "another, has no form here"
    )


def normaliser(tensors: Tensors, k: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """What inputs are multiplied by, [K], what outputs are divided by, and the mean [K, D]."""
    names = [name for name in ("activation_mean", "activation_std") if name in tensors]
    statistics = [tensors.take({name: (k, d)})[0] for name in names]
    if len(statistics) < 2 or any(one_KD.isnan().any() for one_KD in statistics):
        if SCALE in tensors:  # ones, and not used
            tensors.take({SCALE: (k,)})
        return torch.ones(k), torch.ones(k), torch.zeros(k, d)
    (scale_K,) = tensors.take({SCALE: (k,)})
    return scale_K, scale_K + EPS, statistics[0]


def with_threshold(raw: RawDictionary, tensors: Tensors, norm_F: Tensor) -> RawDictionary:
    """Latents that fire above it; -1, as in one that was never trained, counts as 0."""
    (threshold,) = tensors.take({"threshold": ()})
    threshold_F, k = threshold.clamp_min(0) / norm_F, int(tensors.scalar("k"))
    if (threshold_F == threshold_F[0]).all():
        return replace(raw, activation="batchtopk", k=k, threshold_F=threshold_F)
    return replace(raw, activation="jumprelu", threshold_F=threshold_F)


def save(raw: RawDictionary, folder: Path) -> None:
    """Write the folder, with one for s; raises GranaryError for sites of unequal widths, or other than what is read."""
    assert raw.widths is not None
    reads, writes = raw.widths.reads, raw.widths.writes
    sites = raw.sites
    if (sites is not None and not sites.is_autoencoder) or reads != writes or len(set(reads)) > 1:
        raise GranaryError("crosscoder_learning's crosscoders give back the sites that they read, all of one width")
    f, k, d = len(raw.b_enc_F), len(reads), reads[0]
    raw = raw.without_layer_norm("crosscoder_learning").with_pre_bias(False)
    tensors = {
        "encoder.weight": raw.W_enc_FD.view(f, k, d).permute(1, 2, 0),
        "encoder.bias": raw.b_enc_F,
        "decoder.weight": raw.W_dec_FD.view(f, k, d).transpose(0, 1),
        "decoder.bias": raw.b_dec_D.view(k, d),
        "code_normalization_id": torch.tensor(NONE),
        "activation_mean": torch.full((k, d), torch.nan),
        "activation_std": torch.full((k, d), torch.nan),
        SCALE: torch.ones(k),
        "target_rms": torch.tensor(1.0),
    }
    if raw.activation == "batchtopk":
        tensors |= {"k": torch.tensor(raw.k, dtype=torch.int), "threshold": raw.thresholds()[0].clone()}
    trainer: dict[str, Any] = {
        "dict_class": CLASSES[raw.activation],
        "activation_dim": d,
        "dict_size": f,
        "num_layers": k,
        "code_normalization": "NONE",
        **({"k": raw.k} if raw.k is not None else {}),
        "lm_name": (raw.provenance.get("model") or {}).get("id"),
        "submodule_name": None if sites is None else str(sites),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / PICKLED).open("wb") as file:  # a full disk is an OSError then
        torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    (folder / CONFIG).write_text(json.dumps({"trainer": trainer, "buffer": {}}, indent=2) + "\n", encoding="utf-8")
