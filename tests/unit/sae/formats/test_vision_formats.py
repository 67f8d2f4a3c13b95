"""SAE Made Easy, saev and ViT-Prisma: read as their code computes, what is not known refused, nothing unpickled."""

import gzip
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from shared.basics.errors import GranaryError
from shared.intervene.attach import attach
from shared.sae import SAE
from shared.sae.learn.objective import Objective
from shared.sae.loading import convert, detect, load_any
from tests.foreign_vision import (
    MODULE,
    prisma,
    read_saev_file,
    sae_made_easy,
    saev,
    write_prisma,
    write_sae_made_easy,
    write_saev,
    write_saev_file,
)
from tests.formulas import D, F, K, activations, assert_same
from tests.modules import MLP, seeded


def close(sae: Any, latents: torch.Tensor, reconstruction: torch.Tensor, x: torch.Tensor) -> None:
    """To 2e-5 of the largest entry; latents may be negative."""
    output = sae(x)
    for found, expected in ((output.latents.to_dense(latents.shape[-1]), latents), (output.x_hat, reconstruction)):
        assert float((found - expected).abs().max()) <= 2e-5 * float(expected.abs().max())


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_signed_topk_reader(tmp_path: Path, scale: float) -> None:
    """An independent formula in NumPy, to 1e-6; where few pre-activations are positive, negative ones are kept."""
    write_sae_made_easy(tmp_path / "theirs", scale=scale)
    sae, provenance = load_any(tmp_path / "theirs")
    x = activations()
    w = {name.rpartition("sae_")[2]: tensor.double().numpy() for name, tensor in
         load_file(tmp_path / "theirs/adapter_model.safetensors").items()}  # fmt: skip
    z = (x.double().numpy() - w["b_dec"]) @ w["encoder.weight"].T
    rows, latents = np.arange(len(z))[:, None], np.argsort(-z, axis=1)[:, :K]
    dense = np.zeros_like(z)
    dense[rows, latents] = z[rows, latents]
    output = sae(x)
    for found, want in ((output.latents.to_dense(F), dense), (output.x_hat, dense @ w["W_dec"] + w["b_dec"])):
        assert np.abs(found.numpy() - want).max() <= 1e-6 * max(1.0, np.abs(want).max())
    assert bool((output.latents.values < 0).any()) == (scale == 0.0)
    assert provenance["hook"] == MODULE
    close(sae, *sae_made_easy(tmp_path / "theirs", x), x)


def test_signed_topk_is_kept_by_our_folder_and_neither_trained_nor_written_elsewhere(tmp_path: Path) -> None:
    write_sae_made_easy(tmp_path / "theirs", scale=0.0)
    assert detect(tmp_path / "theirs") == "sae_made_easy"
    convert(tmp_path / "theirs", tmp_path / "ours", "granary")
    ours, x = SAE.from_pretrained(tmp_path / "ours"), activations()
    assert torch.equal(ours(x).x_hat, load_any(tmp_path / "theirs")[0](x).x_hat)
    assert (ours.config.activation, ours.config.k) == ("signed_topk", K)
    with pytest.raises(GranaryError, match="which are read and not trained here: choose topk"):
        Objective(ours)
    for form in ("sparsify", "saelens"):
        with pytest.raises(GranaryError, match=f"the {form} format has no signed_topk SAEs"):
            convert(tmp_path / "ours", tmp_path / form, form)
    empty = ours.encode(torch.zeros(0, D))
    assert empty.values.shape == empty.indices.shape == (0, K)


def test_config_says_0_latents_or_as_many_as_there_are(tmp_path: Path) -> None:
    write_sae_made_easy(tmp_path / "right", num_latents=F)
    assert load_any(tmp_path / "right")[0].config.d_latent == F
    write_sae_made_easy(tmp_path / "wrong", num_latents=F + 1)
    with pytest.raises(GranaryError, match=f"has num_latents={F + 1}, its tensors have {F}"):
        load_any(tmp_path / "wrong")
    write_sae_made_easy(tmp_path / "lora", peft_type="LORA")
    with pytest.raises(GranaryError, match=r"peft_type=LORA: SAEs \(TOPK_SAE\) can be read"):
        load_any(tmp_path / "lora")


def test_a_folder_of_several_modules_is_attached_whole_and_converted_one_by_one(tmp_path: Path) -> None:
    model, places = seeded(MLP)(), ("fc1", "norm")
    write_sae_made_easy(tmp_path / "theirs", places)
    with pytest.raises(GranaryError, match=f"2 modules: choose one by --set module={places[0]}"):
        load_any(tmp_path / "theirs")
    with pytest.raises(GranaryError, match="holds no SAE of elsewhere"):
        load_any(tmp_path / "theirs", given={"module": "elsewhere"})
    x = activations()
    for place in places:
        one, _ = load_any(tmp_path / "theirs", given={"module": place})
        close(one, *sae_made_easy(tmp_path / "theirs", x, place), x)
    with attach(model, tmp_path / "theirs") as saes:
        assert set(saes) == set(places)
        assert torch.equal(saes["norm"](x).x_hat, one(x).x_hat)


SAEV = [
    ("Relu", None, None), ("Relu", 1, None), ("TopK", 1, None), ("Relu", 2, None), ("TopK", 2, None), ("TopK", 3, None),
    ("TopK", 4, None), ("Relu", 5, None), ("TopK", 5, None), ("BatchTopK", 5, 0.7), ("BatchTopK", 5, -0.5),
]  # fmt: skip


@pytest.mark.parametrize(("name", "schema", "threshold"), SAEV)
def test_saev_checkpoints_of_every_schema(
    tmp_path: Path, name: str, schema: int | None, threshold: float | None
) -> None:
    write_saev(tmp_path / "theirs", name, schema, threshold=threshold)
    x, is_early = activations(), schema is None or schema < 2
    if is_early:
        with pytest.raises(GranaryError, match="whether b_dec is taken off the input"):
            load_any(tmp_path / "theirs")
    for pre_bias in (True, False) if is_early else (False,):
        given = {"pre_bias": pre_bias} if is_early else {}
        sae, _ = load_any(tmp_path / "theirs", given=given)
        close(sae, *saev(tmp_path / "theirs", x, name, pre_bias=pre_bias), x)
    lone, _ = load_any(tmp_path / "theirs" / "sae.pt", reads_as="saev", given=given)
    assert torch.equal(lone(x).x_hat, sae(x).x_hat)


def test_what_saev_files_do_not_say_is_asked_for(tmp_path: Path) -> None:
    write_saev(tmp_path / "batch", "BatchTopK", 4)
    with pytest.raises(GranaryError, match="--set threshold=NUMBER"):
        load_any(tmp_path / "batch")
    sae, _ = load_any(tmp_path / "batch", given={"threshold": 0.7})
    assert float(sae.state_dict()["activation.threshold"]) == pytest.approx(0.7)
    header, tensors = read_saev_file(tmp_path / "batch/sae.pt")
    cfg = header["cfg"]
    wrong: list[tuple[Any, str]] = [
        ({**header, "schema": 6}, "schema=6: 1 to 5, and none, can be read"),
        ({**header, "cfg": {**cfg, "d_model": 3}}, "d_model makes 3, its tensors have"),
        ({**header, "cfg": {**cfg, "d_sae": 3}}, "d_sae makes 3"),
        ({**header, "cfg": {**cfg, "activation": {"cls": "Tanh", "params": {}}}}, "the activation Tanh"),
        ({**header, "cfg": {name: value for name, value in cfg.items() if name != "activation"}}, "lacks the key"),
        ({**header, "cfg": {**cfg, "mean": 1.0}}, "the key mean, which"),
        ({**header, "extra": 1}, "the key extra, which"),
        ([], "does not begin with a JSON object"),
    ]
    for changed, told in wrong:
        write_saev_file(tmp_path / "batch/sae.pt", changed, tensors)
        given = {"threshold": 0.7} if "which" in told else {}
        with pytest.raises(GranaryError, match=told):
            load_any(tmp_path / "batch" / "sae.pt", reads_as="saev", given=given)


PRISMA = [
    {}, {"normalize_activations": "layer_norm"}, {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}},
    {"architecture": "gated"}, {"architecture": "gated", "normalize_activations": "layer_norm"},
]  # fmt: skip


@pytest.mark.parametrize("changes", PRISMA, ids=str)
def test_prisma_folders(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_prisma(tmp_path / "theirs", **changes)
    sae, x = load_any(tmp_path / "theirs")[0], activations()
    assert_same(sae, *prisma(tmp_path / "theirs", x), x)  # type: ignore[arg-type]


def test_what_prisma_has_more_is_refused(tmp_path: Path) -> None:
    for number, (changes, told) in enumerate((
        ({"is_transcoder": True}, "is_transcoder=True: SAEs can be read"),
        ({"hook_point_head_index": 3}, "hook_point_head_index=3"),
        ({"activation_fn_str": "tanh-relu"}, "standard with relu or topk"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K, "postact_fn": "id"}}, "standard with relu"),
        ({"normalize_activations": "constant_norm_rescale"}, "none and layer_norm can be read"),
        ({"d_in": 3}, "has d_in=3, its tensors have"),
        ({"mean_subtracted": True}, "the key mean_subtracted, which"),
    )):  # fmt: skip
        write_prisma(tmp_path / str(number), **changes)
        with pytest.raises(GranaryError, match=told):
            load_any(tmp_path / str(number))
    torch.save({}, tmp_path / "0" / "n_images_7.pt")
    write_prisma(tmp_path / "two")
    torch.save({}, tmp_path / "two" / "n_images_7.pt")
    with pytest.raises(GranaryError, match="name one file, with --as prisma"):
        load_any(tmp_path / "two")
    load_any(tmp_path / "two" / "n_images_2600058.pt", reads_as="prisma")


class Mine:
    """What runs when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_unpickling_never_happens_on_any_imported_file(tmp_path: Path) -> None:
    mine = Mine(tmp_path / "ran")
    write_prisma(tmp_path / "prisma")
    torch.save({"cfg": mine, "state_dict": {}}, tmp_path / "prisma" / "n_images_2600058.pt")
    write_saev(tmp_path / "saev")
    write_saev_file(tmp_path / "saev/sae.pt", {"schema": 5, "cfg": {}}, {"W_enc": mine})
    write_sae_made_easy(tmp_path / "made_easy")
    (tmp_path / "made_easy/adapter_model.safetensors").write_bytes(pickle.dumps(mine))
    (tmp_path / "sae.pkl.gz").write_bytes(gzip.compress(pickle.dumps({"cfg": mine})))
    for name in ("prisma", "saev", "made_easy"):
        with pytest.raises(GranaryError):
            load_any(tmp_path / name)
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(GranaryError, match="can't be read as tensors"):
        load_any(tmp_path / "sae.pkl.gz", reads_as="prisma", given={"architecture": "standard"})
    assert not (tmp_path / "ran").exists()
