"""Foreign folders: what changes the function and is not known is refused, and old, wrapped and wrong files."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.basics.errors import GranaryError
from shared.sae import SAE
from shared.sae.__main__ import main
from shared.sae.formats import FORMATS
from shared.sae.loading import convert, load_any
from tests.foreign import (
    foreign_weights,
    write_dictionary_learning,
    write_gemma_scope,
    write_llama_scope,
    write_opensae,
    write_saelens,
)
from tests.foreign_transcoders import SITES, write_crosscoder, write_llamascopium
from tests.foreign_transcoders import D as D_SITE
from tests.foreign_vision import read_saev_file, write_prisma, write_sae_made_easy, write_saev, write_saev_file
from tests.formulas import PROVENANCE, D, F, K, activations, assert_same, make_sae

WRITERS: dict[str, Callable[..., None]] = {
    "saelens": write_saelens,
    "opensae": lambda folder, **more: write_opensae(folder, normalise=True, shift_back=False, shards=False, **more),
    "llama_scope": write_llama_scope,
}


@pytest.mark.parametrize("name", WRITERS)
def test_an_unknown_key_is_refused_unless_it_is_ignored(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / "known")
    WRITERS[name](tmp_path / "theirs", mean_subtracted=True)
    with pytest.raises(GranaryError, match=r"the key mean_subtracted, which.*`convert --ignore mean_subtracted`"):
        load_any(tmp_path / "theirs")
    with pytest.raises(GranaryError, match=r"--ignore nothing: .* has no such key or tensor"):
        load_any(tmp_path / "theirs", ["mean_subtracted", "nothing"])
    one, two = (load_any(tmp_path / "known")[0], load_any(tmp_path / "theirs", ["mean_subtracted"])[0])
    x = activations()
    assert torch.equal(one(x).x_hat, two(x).x_hat)
    command = ["convert", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--to", "granary"]
    with pytest.raises(SystemExit):
        main(command)
    main([*command, "--ignore", "mean_subtracted"])
    assert torch.equal(SAE.from_pretrained(tmp_path / "ours")(x).x_hat, one(x).x_hat)


def every_folder(root: Path) -> dict[str, Path]:
    """One of each format, and the file of its weights."""
    for name, write in WRITERS.items():
        write(root / name)
    write_dictionary_learning(root / "dictionary_learning", "BatchTopKSAE")
    write_gemma_scope(root / "gemma_scope", 2)
    make_sae("topk", "none", True).save_pretrained(root / "ours", PROVENANCE)
    convert(root / "ours", root / "sparsify", "sparsify")
    write_crosscoder(root / "crosscoder_learning", 2, normalised=True)
    write_llamascopium(root / "llamascopium")
    write_sae_made_easy(root / "sae_made_easy")
    write_saev(root / "saev")
    write_prisma(root / "prisma")
    return {
        "sae_made_easy": root / "sae_made_easy/adapter_model.safetensors",
        "saev": root / "saev/sae.pt",
        "prisma": root / "prisma/n_images_2600058.pt",
        "crosscoder_learning": root / "crosscoder_learning/final.pt",
        "saelens": root / "saelens/sae_weights.safetensors",
        "opensae": root / "opensae/model.safetensors",
        "llama_scope": root / "llama_scope/checkpoints/final.safetensors",
        "dictionary_learning": root / "dictionary_learning/ae.pt",
        "gemma_scope": root / "gemma_scope/params.safetensors",
        "sparsify": root / "sparsify/sae.safetensors",
        "llamascopium": root / "llamascopium/sae_weights.safetensors",
    }


def read_by(name: str) -> torch.Tensor:
    """Activations of the width that the folder of this format reads."""
    widths = {"crosscoder_learning": SITES * D_SITE, "llamascopium": D_SITE}
    return torch.randn(20, widths[name]) if name in widths else activations()


def read_weights_file(path: Path) -> dict[str, torch.Tensor]:
    if path.name == "sae.pt":
        return read_saev_file(path)[1]
    return dict(torch.load(path, weights_only=True) if path.suffix == ".pt" else load_file(path))


def write_weights_file(path: Path, tensors: dict[str, Any]) -> None:
    if path.name == "sae.pt":
        write_saev_file(path, read_saev_file(path)[0], tensors)
    elif path.suffix == ".pt":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)


def test_an_unknown_tensor_is_refused_unless_it_is_ignored(tmp_path: Path) -> None:
    files = every_folder(tmp_path)
    assert files.keys() | {"plain"} == FORMATS.keys()  # a lone file: test_lone_files.py
    for name, path in files.items():
        x = read_by(name)
        before = load_any(tmp_path / name)[0](x).x_hat
        write_weights_file(path, {**read_weights_file(path), "router.weight": torch.ones(4, D)})
        with pytest.raises(GranaryError, match=r"the tensor router\.weight, which .*--ignore router\.weight"):
            load_any(tmp_path / name)
        assert torch.equal(load_any(tmp_path / name, ["router.weight"])[0](x).x_hat, before)


def test_wrapped_and_nested_state_dicts(tmp_path: Path) -> None:
    for name, path in every_folder(tmp_path).items():
        x = read_by(name)
        before, tensors = load_any(tmp_path / name)[0](x).x_hat, read_weights_file(path)
        for wrapper in ("_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."):
            write_weights_file(path, {f"{wrapper}{key}": tensor for key, tensor in tensors.items()})
            assert torch.equal(load_any(tmp_path / name)[0](x).x_hat, before), (name, wrapper)
        if path.suffix == ".pt":
            write_weights_file(path, {"state_dict": tensors})
            assert torch.equal(load_any(tmp_path / name)[0](x).x_hat, before)
            write_weights_file(path, {"state_dict": tensors, "input_mean": torch.ones(D), "epoch": 3})
            with pytest.raises(GranaryError, match="the key epoch, which"):
                load_any(tmp_path / name)
            assert torch.equal(load_any(tmp_path / name, ["epoch", "input_mean"])[0](x).x_hat, before)


OLD_SAELENS: dict[str, tuple[dict[str, Any], str]] = {
    "before there were architectures": ({"activation_fn": "relu", "hook_point": "blocks.3.hook_resid_pre"}, "relu"),
    "topk by its activation": ({"architecture": "standard", "activation_fn_str": "topk"}, "topk"),
    "k among the arguments": ({"architecture": "topk", "activation_fn_str": "topk"}, "topk"),
    "k as a fraction": ({"architecture": "topk", "k": float(K)}, "topk"),
    "a normalisation that is false": ({"activation_fn_str": "relu", "normalize_activations": False}, "relu"),
}


@pytest.mark.parametrize("name", OLD_SAELENS)
def test_old_saelens_schemas(tmp_path: Path, name: str) -> None:
    changes, activation = OLD_SAELENS[name]
    write_saelens(tmp_path / "present", {"relu": "standard", "topk": "topk"}[activation])
    write_saelens(tmp_path / "old", "standard")
    old = {
        "d_in": D,
        "d_sae": F,
        "dtype": "torch.float32",
        "hook_name": "blocks.3.hook_resid_pre",
        "lr": 1e-4,
        **changes,
    }
    if activation == "topk" and "k" not in changes:
        old["activation_fn_kwargs"] = {"k": K}
    (tmp_path / "old/cfg.json").write_text(json.dumps(old))
    (one, _), (two, provenance) = load_any(tmp_path / "present"), load_any(tmp_path / "old")
    assert (two.config.activation, two.config.k) == (activation, K if activation == "topk" else None)
    x = activations()
    assert torch.equal(one(x).x_hat, two(x).x_hat)
    assert provenance["hook"] == "layers.3.resid_pre"


def test_a_finetuned_scale_is_folded_or_refused(tmp_path: Path) -> None:
    scale = torch.rand(F, generator=torch.Generator().manual_seed(6)) + 0.5
    for name, flag, tensor in (("tuned", True, scale), ("plain", False, torch.ones(F)), ("wrong", False, scale)):
        write_saelens(tmp_path / name, "standard", finetuning_scaling_factor=flag)
        path = tmp_path / name / "sae_weights.safetensors"
        save_file({**load_file(path), "scaling_factor": tensor}, path)
    x = activations()
    tuned, plain = load_any(tmp_path / "tuned")[0], load_any(tmp_path / "plain")[0]
    latents = plain.encode(x).to_dense(F)
    assert torch.equal(tuned.encode(x).to_dense(F), latents)
    torch.testing.assert_close(tuned(x).x_hat, (latents * scale) @ plain.W_dec + plain.b_dec, rtol=1e-4, atol=1e-3)
    with pytest.raises(GranaryError, match="finetuning_scaling_factor is not set"):
        load_any(tmp_path / "wrong")


@pytest.mark.parametrize("include", [True, False])
def test_llama_scope_compares_scaled_by_the_decoder(tmp_path: Path, include: bool) -> None:
    write_llama_scope(tmp_path / "theirs", sparsity_include_decoder_norm=include, jump_relu_threshold=12.0)
    x, w = activations(), load_file(tmp_path / "theirs/checkpoints/final.safetensors")
    s = D**0.5 / 31.0
    z = (s * x) @ w["encoder.weight"].T + w["encoder.bias"]
    fired = z / s * (w["decoder.weight"].norm(dim=0) if include else 1) > 12.0
    assert_same(
        load_any(tmp_path / "theirs")[0], z * fired, ((z * fired) @ w["decoder.weight"].T + w["decoder.bias"]) / s, x
    )
    (tmp_path / "biasless").mkdir()
    write_llama_scope(tmp_path / "biasless/x", use_decoder_bias=False)
    path = tmp_path / "biasless/x/checkpoints/final.safetensors"
    with pytest.raises(GranaryError, match=r"the tensor decoder\.bias"):
        load_any(tmp_path / "biasless/x")
    save_file({name: tensor for name, tensor in w.items() if name != "decoder.bias"}, path)
    assert not load_any(tmp_path / "biasless/x")[0].b_dec.any()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "experts": ({"num_experts": 4}, "has num_experts=4"),
    "no number": ({"k": "four"}, "k='four', which is not a whole number"),
    "a fraction": ({"k": 4.5}, "k=4.5, which is not a whole number"),
    "null": ({"hidden_size": None}, "hidden_size=None, which is not"),
    "true": ({"feature_size": True}, "feature_size=True, which is not"),
    "a list": ({"input_hookpoint": [1]}, r"input_hookpoint=\[1\], which is not a text"),
    "another eps": ({"input_normalize_eps": 1e-3}, "input_normalize_eps=0.001"),
    "a flag": ({"input_normalize": "yes"}, "input_normalize='yes', which is not true or false"),
    "too many picks": ({"k": F + 1}, "more than the 40 latents"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_one_line(tmp_path: Path, name: str) -> None:
    changes, told = WRONG[name]
    WRITERS["opensae"](tmp_path / "theirs", **changes)
    with pytest.raises(GranaryError, match=told) as caught:
        load_any(tmp_path / "theirs")
    assert "\n" not in str(caught.value)


def test_an_index_names_files_of_its_own_folder(tmp_path: Path) -> None:
    write_opensae(tmp_path / "theirs", normalise=True, shift_back=False, shards=True)
    index = tmp_path / "theirs/model.safetensors.index.json"
    save_file(foreign_weights(), tmp_path / "outside.safetensors")
    for weight_map in (
        {"a": "../outside.safetensors"},
        {"a": str(tmp_path / "outside.safetensors")},
        {"a": 3},
        [1],
        None,
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(GranaryError, match=r"is not the name of a file|weight_map.* not of the type"):
            load_any(tmp_path / "theirs")


def test_a_file_that_unpacks_to_far_more_is_not_unpacked(tmp_path: Path) -> None:
    write_gemma_scope(tmp_path / "npz", 1)
    np.savez_compressed(tmp_path / "npz/params.npz", W_enc=np.zeros((2000, 20_000), np.float32))
    write_dictionary_learning(tmp_path / "pt", "AutoEncoder")
    with zipfile.ZipFile(tmp_path / "pt/ae.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ae/data.pkl", bytes(50 << 20))
    for name in ("npz", "pt"):
        with pytest.raises(GranaryError, match="would unpack to"):
            load_any(tmp_path / name)


def test_hooks_that_the_files_name(tmp_path: Path) -> None:
    make_sae("topk", "none", True).save_pretrained(tmp_path / "ours", PROVENANCE)
    for name, form in (("layers.7", "resid_post"), ("layers.7.mlp", "mlp_out"), ("layers.7.self_attn", "attn_out")):
        convert(tmp_path / "ours", tmp_path / name, "sparsify")
        assert load_any(tmp_path / name)[1]["hook"] == f"layers.7.{form}"
    write_dictionary_learning(tmp_path / "dl", "AutoEncoder")
    for more, hook in (
        ({"layer": 8, "submodule_name": "resid_post_layer_8"}, "layers.8.resid_post"),
        ({"submodule_name": "layers.2.mlp_out"}, "layers.2.mlp_out"),
        ({"layer": "8", "submodule_name": 3}, None),
    ):
        (tmp_path / "dl/config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoder", **more}}))
        assert load_any(tmp_path / "dl")[1].get("hook") == hook
    write_gemma_scope(tmp_path / "gemma", 2)
    assert load_any(tmp_path / "gemma")[1]["hook"] == "layers.9.resid_post"
