"""Transcoders of all layers and CLTs of a small model, and circuit-tracer's formulas in dense float64 arithmetic."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor

from shared.sae.learn.init import initialise
from shared.sae.sites import Sites, SiteWidths
from shared.sae.variants import Dictionary
from tests.variants import batch, make

LAYERS, D, PER_LAYER = 3, 8, 20
READS = tuple(f"layers.{layer}.mlp_in" for layer in range(LAYERS))
WRITES = tuple(f"layers.{layer}.mlp_out" for layer in range(LAYERS))
PROVENANCE = {"model": {"id": "owner/model"}}


def started(kind: str, sites: Sites, **given: Any) -> tuple[Dictionary, Tensor]:
    """One whose parameters are all of consequence, and tokens that it reads."""
    places = (sites, SiteWidths((D,) * len(sites.reads), (D,) * len(sites.writes)))
    objective = make(kind, places=places, d_latent=PER_LAYER * len(sites.reads), **given)
    x_ND, y_ND = batch(objective, 200)
    x_ND = x_ND * torch.linspace(0.5, 4, x_ND.shape[1])  # unequal scales of the sites
    initialise(objective, None, x_ND, None, y_ND)
    made = objective.dictionary.requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for parameter in made.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made, x_ND


def save_set(folder: Path, kind: str, **given: Any) -> tuple[list[Dictionary], list[Tensor]]:
    """A folder with one per layer."""
    found = []
    for layer in range(LAYERS):
        made, x_ND = started(kind, Sites((READS[layer],), (WRITES[layer],)), seed=layer, **given)
        made.save_pretrained(folder / f"layer_{layer}", PROVENANCE)
        found.append((made, x_ND))
    return [made for made, _ in found], [x_ND for _, x_ND in found]


def fires(z_NF: Tensor, threshold_F: Tensor | None) -> Tensor:
    """JumpReLU, strict, where there are thresholds, else ReLU."""
    return torch.relu(z_NF) if threshold_F is None else z_NF * (z_NF > threshold_F)


def of_set(folder: Path, layer: int, x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """(Latents, reconstruction) by the file of one layer."""
    w = {name: tensor.double() for name, tensor in load_file(folder / f"layer_{layer}.safetensors").items()}
    assert OmegaConf.load(folder / "config.yaml").model_kind == "transcoder_set"
    f_NF = fires(x_ND.double() @ w["W_enc"].T + w["b_enc"], w.get("activation_function.threshold"))
    y_ND = f_NF @ w["W_dec"] + w["b_dec"]
    return f_NF, y_ND + x_ND.double() @ w["W_skip"].T if "W_skip" in w else y_ND


def of_clt(folder: Path, x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """(Latents layer after layer, reconstruction) by the files of a CLT."""
    latents, y = [], [torch.zeros(len(x_ND), D, dtype=torch.float64) for _ in range(LAYERS)]
    for layer, x in enumerate(x_ND.double().split(D, dim=1)):
        w = {name: tensor.double() for name, tensor in load_file(folder / f"W_enc_{layer}.safetensors").items()}
        rows = load_file(folder / f"W_dec_{layer}.safetensors")[f"W_dec_{layer}"].double()
        f_NF = fires(x @ w[f"W_enc_{layer}"].T + w[f"b_enc_{layer}"], w.get(f"threshold_{layer}"))
        latents.append(f_NF)
        y[layer] = y[layer] + w[f"b_dec_{layer}"]
        for target in range(layer, LAYERS):
            y[target] = y[target] + f_NF @ rows[:, target - layer]
    return torch.cat(latents, 1), torch.cat(y, 1)


def assert_same(made: Dictionary, x_ND: Tensor, latents_NF: Tensor, y_ND: Tensor) -> None:
    """The same latents fire, to 1e-5 of the largest, and the reconstruction to 1e-4."""
    output = made(x_ND)
    found_NF = output.latents.to_dense(made.config.d_latent).double()
    assert 0 < int((latents_NF > 0).sum()) < 0.9 * latents_NF.numel()
    assert ((found_NF > 0) == (latents_NF > 0)).all()
    assert float((found_NF - latents_NF).abs().max()) <= 1e-5 * float(latents_NF.max())
    assert float((output.x_hat.double() - y_ND).abs().max()) <= 1e-4 * float(y_ND.abs().max())
