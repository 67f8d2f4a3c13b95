"""Other projects' formats, proven by reconstruction: against their documented formulas, and SAELens against itself."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shared.errors import GranaryError
from shared.sae import SAE, SAEConfig
from shared.sae.__main__ import main
from shared.sae.formats import FORMATS, convert, detect, load_any

D, F, K, N = 12, 40, 5, 64
PROVENANCE = {"hook": "layers.3.resid_post", "model": {"id": "tiny"}, "seq_len": 128}


def activations() -> Tensor:
    """Rows with a large mean and one huge dimension, as residual streams have them."""
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0)) * 3 + torch.linspace(-4, 9, D)
    x[:, 2] *= 30
    return x


def make_sae(normalisation: str, pre_bias: bool) -> SAE:
    config = SAEConfig(d_model=D, d_latent=F, k=K, normalisation=normalisation, pre_bias=pre_bias)
    sae = SAE(config, generator=torch.Generator().manual_seed(1)).requires_grad_(False)
    sae.initialise(None, activations())
    generator = torch.Generator().manual_seed(2)
    sae.b_enc.copy_(torch.randn(F, generator=generator) * 0.3)
    sae.b_dec.add_(torch.randn(D, generator=generator) * 0.3)
    return sae


def topk(pre: Tensor) -> Tensor:
    """Dense latents: the k largest of relu(pre), the rest 0."""
    values, indices = pre.relu().topk(K, dim=-1)
    return torch.zeros_like(pre).scatter_(-1, indices, values)


def saelens_formula(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    cfg, w = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    if cfg["normalize_activations"] == "layer_norm":
        mean = x.mean(-1, keepdim=True)
        std = (x - mean).std(-1, keepdim=True)
        x = (x - mean) / (std + 1e-5)
    pre = (x - w["b_dec"] * cfg["apply_b_dec_to_input"]) @ w["W_enc"] + w["b_enc"]
    if cfg["rescale_acts_by_decoder_norm"]:
        pre = pre * w["W_dec"].norm(dim=1)
    f = topk(pre)
    scaled = f / w["W_dec"].norm(dim=1) if cfg["rescale_acts_by_decoder_norm"] else f
    y = scaled @ w["W_dec"] + w["b_dec"]
    return f, y * std + mean if cfg["normalize_activations"] == "layer_norm" else y


def sparsify_formula(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    w = load_file(folder / "sae.safetensors")
    f = topk((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"])
    return f, f @ w["W_dec"] + w["b_dec"]


def dictionary_learning_formula(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    w = torch.load(folder / "ae.pt", weights_only=True)
    f = topk((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"])
    return f, f @ w["decoder.weight"].T + w["b_dec"]


def opensae_formula(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    config = json.loads((folder / "config.json").read_text())
    w: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        w |= load_file(file)
    z = x
    if config["input_normalize"]:
        mean = x.mean(-1, keepdim=True)
        scale = (x - mean).std(-1, keepdim=True) + config["input_normalize_eps"]
        z = (x - mean) / scale
    f = topk((z - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"])
    y = f @ w["W_dec"] + w["b_dec"]
    return f, y * scale + mean if config["normalize_shift_back"] else y


FORMULAS: dict[str, Callable[[Path, Tensor], tuple[Tensor, Tensor]]] = {
    "saelens": saelens_formula,
    "sparsify": sparsify_formula,
    "dictionary_learning": dictionary_learning_formula,
    "opensae": opensae_formula,
}


def assert_same(sae: SAE, latents: Tensor, reconstruction: Tensor, x: Tensor) -> None:
    """Relative to the largest entry: the weights were folded in another order."""
    output = sae(x)
    for found, expected in ((output.latents.to_dense(F), latents), (output.x_hat, reconstruction)):
        assert float((found - expected).abs().max()) <= 2e-5 * float(expected.abs().max())
    assert ((latents > 0).sum(1) == K).all()


@pytest.mark.parametrize("pre_bias", [True, False])
@pytest.mark.parametrize("normalisation", ["none", "scale", "centre_scale", "layer_norm"])
@pytest.mark.parametrize("name", ["saelens", "sparsify", "dictionary_learning"])
def test_written_folders_compute_the_same(tmp_path: Path, name: str, normalisation: str, pre_bias: bool) -> None:
    sae, x = make_sae(normalisation, pre_bias), activations()
    sae.save_pretrained(tmp_path / "ours", PROVENANCE)
    if normalisation == "layer_norm" and name != "saelens":
        with pytest.raises(GranaryError, match="has no layer_norm"):
            convert(tmp_path / "ours", tmp_path / "theirs", name)
        return
    assert convert(tmp_path / "ours", tmp_path / "theirs", name) == "granary"
    assert detect(tmp_path / "theirs") == name
    assert_same(sae, *FORMULAS[name](tmp_path / "theirs", x), x)
    # And back.
    assert convert(tmp_path / "theirs", tmp_path / "back", "granary") == name
    again = SAE.from_pretrained(tmp_path / "back")
    assert_same(again, *FORMULAS[name](tmp_path / "theirs", x), x)


def foreign_weights() -> dict[str, Tensor]:
    """Weights no convention was used to make: decoder rows of any length, biases everywhere."""
    generator = torch.Generator().manual_seed(5)
    names = {"encoder.weight": (F, D), "encoder.bias": (F,), "W_dec": (F, D), "b_dec": (D,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in names.items()}


def write_opensae(folder: Path, *, normalise: bool, shift_back: bool, shards: bool, **more: Any) -> None:
    """A folder as OpenSAE's released ones are laid out."""
    folder.mkdir()
    config = {
        "activation": "topk",
        "architectures": ["OpenSae"],
        "feature_size": F,
        "hidden_size": D,
        "input_hookpoint": "layers.25",
        "output_hookpoint": "layers.25",
        "input_normalize": normalise,
        "input_normalize_eps": 1e-5,
        "k": K,
        "multi_topk": 4,
        "normalize_shift_back": shift_back,
        "torch_dtype": "float32",
        **more,
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = foreign_weights()
    if not shards:
        save_file(weights, folder / "model.safetensors")
        return
    files = {"model-00001-of-00002.safetensors": ["W_dec", "b_dec"]}
    files["model-00002-of-00002.safetensors"] = ["encoder.weight", "encoder.bias"]
    for file, names in files.items():
        save_file({name: weights[name] for name in names}, folder / file)
    index = {"weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [True, False])
@pytest.mark.parametrize(("normalise", "shift_back"), [(True, False), (True, True), (False, False)])
def test_opensae_folders(tmp_path: Path, normalise: bool, shift_back: bool, shards: bool) -> None:
    write_opensae(tmp_path / "released", normalise=normalise, shift_back=shift_back, shards=shards)
    sae, provenance = load_any(tmp_path / "released")
    x = activations()
    assert_same(sae, *opensae_formula(tmp_path / "released", x), x)
    assert provenance["hook"] == "layers.25.resid_post"
    convert(tmp_path / "released", tmp_path / "ours", "granary")
    assert_same(SAE.from_pretrained(tmp_path / "ours"), *opensae_formula(tmp_path / "released", x), x)
    if normalise and not shift_back:
        with pytest.raises(GranaryError, match="shift_back=false can't be expressed"):
            convert(tmp_path / "released", tmp_path / "theirs", "saelens")


def write_saelens(folder: Path, **changes: Any) -> None:
    folder.mkdir()
    weights = foreign_weights()
    weights = {
        "W_enc": weights["encoder.weight"].T.contiguous(),
        "b_enc": weights["encoder.bias"],
        "W_dec": weights["W_dec"],
        "b_dec": weights["b_dec"],
    }
    save_file(weights, folder / "sae_weights.safetensors")
    cfg = {
        "architecture": "topk",
        "d_in": D,
        "d_sae": F,
        "k": K,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {"hook_name": "blocks.3.hook_resid_pre", "sae_lens_version": "6.54.12"},
    }
    (folder / "cfg.json").write_text(json.dumps({**cfg, **changes}))


SAELENS_CASES = [
    {},
    {"apply_b_dec_to_input": False},
    {"rescale_acts_by_decoder_norm": True},
    {"normalize_activations": "layer_norm"},
    {"normalize_activations": "layer_norm", "apply_b_dec_to_input": False, "rescale_acts_by_decoder_norm": True},
]


@pytest.mark.parametrize("changes", SAELENS_CASES, ids=lambda changes: ",".join(changes) or "plain")
def test_saelens_folders(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_saelens(tmp_path / "theirs", **changes)
    sae, provenance = load_any(tmp_path / "theirs")
    x = activations()
    assert_same(sae, *saelens_formula(tmp_path / "theirs", x), x)
    assert provenance["hook"] == "layers.3.resid_pre"


def real_saelens(folder: Path) -> Any:
    """The folder as the installed sae_lens loads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed: pip install sae-lens")
        return sae_lens.SAE.load_from_disk(folder).requires_grad_(False)


@pytest.mark.parametrize("pre_bias", [True, False])
@pytest.mark.parametrize("normalisation", ["none", "scale", "centre_scale", "layer_norm"])
def test_sae_lens_itself_computes_the_same(tmp_path: Path, normalisation: str, pre_bias: bool) -> None:
    sae, x = make_sae(normalisation, pre_bias), activations()
    sae.save_pretrained(tmp_path / "ours", PROVENANCE)
    convert(tmp_path / "ours", tmp_path / "theirs", "saelens")
    theirs = real_saelens(tmp_path / "theirs")
    latents = theirs.encode(x)
    assert_same(sae, latents, theirs.decode(latents), x)
    assert theirs.cfg.metadata.hook_name == "blocks.3.hook_resid_post"


@pytest.mark.parametrize("changes", SAELENS_CASES, ids=lambda changes: ",".join(changes) or "plain")
def test_what_sae_lens_saves_is_read(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_saelens(tmp_path / "made", **changes)
    theirs = real_saelens(tmp_path / "made")
    theirs.save_model(tmp_path / "theirs")
    x = activations()
    latents = theirs.encode(x)
    assert_same(load_any(tmp_path / "theirs")[0], latents, theirs.decode(latents), x)


def test_half_precision_files_are_read(tmp_path: Path) -> None:
    write_saelens(tmp_path / "theirs")
    weights = load_file(tmp_path / "theirs" / "sae_weights.safetensors")
    save_file(
        {name: tensor.bfloat16() for name, tensor in weights.items()}, tmp_path / "theirs/sae_weights.safetensors"
    )
    sae, _ = load_any(tmp_path / "theirs")
    assert sae.W_enc.dtype == torch.float32


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_sae("scale", True).save_pretrained(tmp_path / "ours", PROVENANCE)
    arguments = ["convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", "saelens"]
    main(arguments)
    assert capsys.readouterr().out.strip().endswith("granary to saelens")
    assert detect(tmp_path / "theirs") == "saelens"
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'theirs'} is not empty: choose another folder\n"


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_saelens(tmp_path / "gated", architecture="gated")
    write_saelens(tmp_path / "rescaled", normalize_activations="constant_norm_rescale")
    write_saelens(tmp_path / "width", d_in=D + 1)
    write_opensae(tmp_path / "jump", normalise=True, shift_back=True, shards=False, activation="jumprelu")
    write_opensae(tmp_path / "coder", normalise=True, shift_back=True, shards=False, output_hookpoint="layers.26")
    (tmp_path / "sparsify").mkdir()
    (tmp_path / "sparsify" / "cfg.json").write_text(
        json.dumps({"d_in": D, "num_latents": F, "k": K, "transcode": True})
    )
    save_file(foreign_weights(), tmp_path / "sparsify" / "sae.safetensors")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"trainer": {"dict_class": "GatedAutoEncoder"}}))
    torch.save(foreign_weights(), tmp_path / "other" / "ae.pt")
    cases = {
        "empty": "not an SAE folder of a known format",
        "gated": "holds a gated SAE",
        "rescaled": "fold it into the weights with SAELens first",
        "width": r"W_enc has shape \(12, 40\), not \(13, 40\)",
        "jump": "activation=jumprelu",
        "coder": "a transcoder, not an SAE",
        "sparsify": "has transcode=True",
        "other": "holds a GatedAutoEncoder",
    }
    for name, message in cases.items():
        with pytest.raises(GranaryError, match=message):
            load_any(tmp_path / name)
    with pytest.raises(GranaryError, match="format 'opensae' can't be written: choose from granary, saelens, sparsify"):
        convert(tmp_path / "gated", tmp_path / "new", "opensae")


def test_every_format_is_tested() -> None:
    assert set(FORMULAS) == set(FORMATS)
