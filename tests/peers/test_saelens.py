"""SAELens both ways, by the package itself: it reads what is written here, and what it writes is read here."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from shared.sae import SAE
from shared.sae.loading import convert, load_any
from tests.foreign import foreign_weights, write_gemma_scope, write_llama_scope, write_saelens
from tests.formulas import ACTIVATIONS, NORMALISATIONS, PROVENANCE, D, F, K, activations, assert_same, make_sae
from tests.unit.sae.formats.test_formats import SAELENS_CASES, label

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    sae_lens = pytest.importorskip("sae_lens", reason="SAELens is not in this environment: make test-peers")

ARCHITECTURES = {"topk": "topk", "relu": "standard", "jumprelu": "jumprelu", "gated": "gated"}


def theirs(folder: Path, x: Tensor) -> tuple[Tensor, Tensor, Any]:
    """(latents, reconstruction, the SAE) by the folder as SAELens loads it."""
    sae = sae_lens.SAE.load_from_disk(folder).requires_grad_(False)
    latents = sae.encode(x)
    return latents, sae.decode(latents), sae


@pytest.mark.parametrize("pre_bias", [True, False], ids=["pre_bias", "no_pre_bias"])
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_saelens_computes_what_is_written_here(
    tmp_path: Path, activation: str, normalisation: str, pre_bias: bool
) -> None:
    sae, x = make_sae(activation, normalisation, pre_bias), activations()
    sae.save_pretrained(tmp_path / "ours", PROVENANCE)
    convert(tmp_path / "ours", tmp_path / "theirs", "saelens")
    latents, reconstruction, loaded = theirs(tmp_path / "theirs", x)
    assert_same(sae, latents, reconstruction, x)
    assert loaded.cfg.architecture() == ARCHITECTURES.get(activation, "jumprelu")  # batchtopk is saved as jumprelu
    assert loaded.cfg.metadata.hook_name == "blocks.3.hook_resid_post"
    # Saved again by SAELens, it comes back.
    loaded.save_model(tmp_path / "saved")
    assert_same(load_any(tmp_path / "saved")[0], latents, reconstruction, x)


INFERENCE = [changes for changes in SAELENS_CASES if changes["architecture"] != "batchtopk"]


@pytest.mark.parametrize("changes", INFERENCE, ids=label)
def test_what_saelens_saves_is_read(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_saelens(tmp_path / "made", **changes)
    x = activations()
    loaded = sae_lens.SAE.load_from_disk(tmp_path / "made").requires_grad_(False)
    if changes["architecture"] == "jumprelu" and changes["normalize_activations"] == "layer_norm":
        loaded.threshold.div_(20)
    loaded.save_model(tmp_path / "theirs")
    latents, reconstruction, _ = theirs(tmp_path / "theirs", x)
    assert_same(load_any(tmp_path / "theirs")[0], latents, reconstruction, x)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("matryoshka", [True, False])
def test_saelens_batchtopk_training_checkpoints(tmp_path: Path, rescale: bool, matryoshka: bool) -> None:
    """Read from the training checkpoint, it computes what SAELens's own export to JumpReLU does."""
    from sae_lens.saes import batchtopk_sae, matryoshka_batchtopk_sae

    settings = {"d_in": D, "d_sae": F, "k": K, "rescale_acts_by_decoder_norm": rescale, "apply_b_dec_to_input": True}
    if matryoshka:
        config = matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAEConfig(**settings, matryoshka_widths=[10, F])
        made = matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAE(config)
    else:
        made = batchtopk_sae.BatchTopKTrainingSAE(batchtopk_sae.BatchTopKTrainingSAEConfig(**settings))
    given = foreign_weights()
    made.requires_grad_(False)
    for parameter, name in ((made.W_dec, "W_dec"), (made.b_enc, "encoder.bias"), (made.b_dec, "b_dec")):
        parameter.copy_(given[name])
    made.W_enc.copy_(given["encoder.weight"].T)
    made.topk_threshold.fill_(15.0)
    made.save_model(tmp_path / "training")
    made.save_inference_model(tmp_path / "inference")
    x = activations()
    latents, reconstruction, _ = theirs(tmp_path / "inference", x)
    read, _ = load_any(tmp_path / "training")
    assert read.config.activation == "batchtopk"
    assert_same(read, latents, reconstruction, x)
    assert_same(load_any(tmp_path / "inference")[0], latents, reconstruction, x)


def test_the_scale_beside_a_checkpoint_is_folded_as_saelens_folds_it(tmp_path: Path) -> None:
    write_saelens(tmp_path / "training", "jumprelu", normalize_activations="expected_average_only_in")
    (tmp_path / "training" / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.25}))
    loaded = sae_lens.SAE.load_from_disk(tmp_path / "training").requires_grad_(False)
    loaded.fold_activation_norm_scaling_factor(0.25)
    x = activations()
    latents = loaded.encode(x)
    assert_same(load_any(tmp_path / "training")[0], latents, loaded.decode(latents), x)


def test_saelens_reads_llama_scope_folders_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loader for the hub, given local files; it folds the scale afterwards, as here."""
    from sae_lens.loading import pretrained_sae_loaders as loaders

    write_llama_scope(tmp_path / "Llama3_1-8B-Base-L8R-8x")
    monkeypatch.setattr(
        loaders,
        "hf_hub_download",
        lambda repo_id, filename, subfolder="", **_: str(tmp_path / subfolder / filename),
    )
    cfg, tensors, _ = loaders.llama_scope_sae_huggingface_loader(
        "fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L8R-8x", cfg_overrides={"dtype": "float32"}
    )
    cfg = {key: value for key, value in cfg.items() if key not in ("jump_relu_threshold", "activation_fn")}
    cfg |= {"normalize_activations": "none", "reshape_activations": "none", "metadata": {"sae_lens_version": "6.54.12"}}
    (tmp_path / "loaded").mkdir()
    (tmp_path / "loaded" / "cfg.json").write_text(json.dumps(cfg))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "loaded/sae_weights.safetensors"
    )
    loaded = sae_lens.SAE.load_from_disk(tmp_path / "loaded").requires_grad_(False)
    loaded.fold_activation_norm_scaling_factor(D**0.5 / 31.0)
    x = activations()
    latents = loaded.encode(x)
    assert_same(load_any(tmp_path / "Llama3_1-8B-Base-L8R-8x")[0], latents, loaded.decode(latents), x)


def test_saelens_reads_gemma_scope_folders_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_lens.loading import pretrained_sae_loaders as loaders

    place = "layer_20/width_16k/average_l0_71"
    write_gemma_scope(tmp_path / place, 1)
    monkeypatch.setattr(
        loaders, "hf_hub_download", lambda repo_id, filename, subfolder, **_: str(tmp_path / subfolder / filename)
    )
    overrides = {"d_in": D, "d_sae": F, "normalize_activations": "none", "reshape_activations": "none"}
    cfg, tensors, _ = loaders.gemma_2_sae_huggingface_loader(
        "google/gemma-scope-2b-pt-res", place, cfg_overrides=overrides
    )
    cfg["metadata"] = {"sae_lens_version": "6.54.12"}
    (tmp_path / "loaded").mkdir()
    (tmp_path / "loaded" / "cfg.json").write_text(json.dumps(cfg))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "loaded/sae_weights.safetensors"
    )
    x = activations()
    latents, reconstruction, _ = theirs(tmp_path / "loaded", x)
    assert_same(SAE.from_pretrained(tmp_path / place), latents, reconstruction, x)


def test_torch_is_the_pinned_one() -> None:
    assert torch.__version__.split("+")[0] == "2.13.0"
