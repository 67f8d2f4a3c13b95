"""Other projects' formats, proven by reconstruction against their documented formulas.

`tests/peers` does the same against the projects themselves.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.basics.errors import GranaryError
from shared.sae import SAE
from shared.sae.__main__ import main
from shared.sae.formats import FORMATS
from shared.sae.loading import convert, detect, load_any
from tests.foreign import (
    foreign_weights,
    write_dictionary_learning,
    write_gemma_scope,
    write_llama_scope,
    write_opensae,
    write_saelens,
)
from tests.formulas import (
    ACTIVATIONS,
    FORMULAS,
    NORMALISATIONS,
    PROVENANCE,
    D,
    F,
    K,
    activations,
    assert_same,
    make_sae,
)

HOLDS = {
    "saelens": ACTIVATIONS,
    "dictionary_learning": ACTIVATIONS,
    "sparsify": ("topk",),
    "opensae": ("topk",),
}
WRITTEN = [(name, activation) for name, held in HOLDS.items() for activation in held]


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize(("name", "activation"), WRITTEN)
def test_written_folders_compute_the_same(tmp_path: Path, name: str, activation: str, normalisation: str) -> None:
    for pre_bias in (True, False):
        root = tmp_path / str(pre_bias)
        sae, x = make_sae(activation, normalisation, pre_bias), activations()
        sae.save_pretrained(root / "ours", PROVENANCE)
        if normalisation == "layer_norm" and name in ("sparsify", "dictionary_learning"):
            with pytest.raises(GranaryError, match="has no layer_norm"):
                convert(root / "ours", root / "theirs", name)
            continue
        assert convert(root / "ours", root / "theirs", name) == "granary"
        assert detect(root / "theirs") == name
        assert_same(sae, *FORMULAS[name](root / "theirs", x), x)
        # And back.
        assert convert(root / "theirs", root / "back", "granary") == name
        again = SAE.from_pretrained(root / "back")
        assert_same(again, *FORMULAS[name](root / "theirs", x), x)


@pytest.mark.parametrize(
    ("name", "activation"),
    [("sparsify", "relu"), ("sparsify", "batchtopk"), ("opensae", "jumprelu"), ("opensae", "gated")],
)
def test_what_a_format_cannot_express_is_refused(tmp_path: Path, name: str, activation: str) -> None:
    make_sae(activation, "none", True).save_pretrained(tmp_path / "ours", PROVENANCE)
    with pytest.raises(GranaryError, match=f"the {name} format has no {activation} SAEs: it holds topk"):
        convert(tmp_path / "ours", tmp_path / "theirs", name)


@pytest.mark.parametrize("shards", [True, False])
@pytest.mark.parametrize(("normalise", "shift_back"), [(True, False), (True, True), (False, False)])
def test_opensae_folders(tmp_path: Path, normalise: bool, shift_back: bool, shards: bool) -> None:
    write_opensae(tmp_path / "released", normalise=normalise, shift_back=shift_back, shards=shards)
    sae, provenance = load_any(tmp_path / "released")
    x = activations()
    assert_same(sae, *FORMULAS["opensae"](tmp_path / "released", x), x)
    assert provenance["hook"] == "layers.25.resid_post"
    convert(tmp_path / "released", tmp_path / "ours", "granary")
    convert(tmp_path / "ours", tmp_path / "again", "opensae")
    assert_same(SAE.from_pretrained(tmp_path / "ours"), *FORMULAS["opensae"](tmp_path / "released", x), x)
    assert_same(sae, *FORMULAS["opensae"](tmp_path / "again", x), x)
    if normalise and not shift_back:
        with pytest.raises(GranaryError, match="shift_back=false can't be expressed"):
            convert(tmp_path / "released", tmp_path / "theirs", "saelens")


SAELENS_CASES: list[dict[str, Any]] = [
    {"architecture": architecture, "apply_b_dec_to_input": pre_bias, "normalize_activations": normalisation}
    for architecture, pre_bias, normalisation in itertools.product(
        ("standard", "topk", "jumprelu", "gated", "batchtopk"), (True, False), ("none", "layer_norm")
    )
    if (architecture, normalisation) != ("batchtopk", "layer_norm")
] + [
    {"architecture": "topk", "rescale_acts_by_decoder_norm": True},
    {"architecture": "topk", "rescale_acts_by_decoder_norm": True, "normalize_activations": "layer_norm"},
    {"architecture": "batchtopk", "rescale_acts_by_decoder_norm": True},
]


def label(changes: dict[str, Any]) -> str:
    return ",".join(str(value) for value in changes.values())


@pytest.mark.parametrize("changes", SAELENS_CASES, ids=label)
def test_saelens_folders(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_saelens(tmp_path / "theirs", **changes)
    sae, provenance = load_any(tmp_path / "theirs")
    x = activations()
    if changes.get("normalize_activations") == "layer_norm" and changes["architecture"] == "jumprelu":
        lower_thresholds(tmp_path / "theirs")
        sae, provenance = load_any(tmp_path / "theirs")
    assert_same(sae, *FORMULAS["saelens"](tmp_path / "theirs", x), x)
    assert provenance["hook"] == "layers.3.resid_pre"


def lower_thresholds(folder: Path) -> None:
    """Layer-normalised inputs are small."""
    weights = load_file(folder / "sae_weights.safetensors")
    weights["threshold"] = weights["threshold"] / 20
    save_file(weights, folder / "sae_weights.safetensors")


def test_a_scale_that_saelens_keeps_beside_a_checkpoint_is_folded(tmp_path: Path) -> None:
    write_saelens(tmp_path / "theirs", "jumprelu", normalize_activations="expected_average_only_in")
    with pytest.raises(GranaryError, match=r"no activation_scaler\.json says by which factor"):
        load_any(tmp_path / "theirs")
    (tmp_path / "theirs" / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.25}))
    sae, _ = load_any(tmp_path / "theirs")
    write_saelens(tmp_path / "plain", "jumprelu")
    x = activations()
    latents, reconstruction = FORMULAS["saelens"](tmp_path / "plain", 0.25 * x)
    assert_same(sae, latents, 4 * reconstruction, x)


@pytest.mark.parametrize(
    "dict_class",
    [
        "AutoEncoder",
        "AutoEncoderNew",
        "AutoEncoderTopK",
        "BatchTopKSAE",
        "MatryoshkaBatchTopKSAE",
        "JumpReluAutoEncoder",
        "GatedAutoEncoder",
    ],
)
def test_dictionary_learning_folders(tmp_path: Path, dict_class: str) -> None:
    write_dictionary_learning(tmp_path / "theirs", dict_class)
    sae, provenance = load_any(tmp_path / "theirs")
    x = activations()
    assert_same(sae, *FORMULAS["dictionary_learning"](tmp_path / "theirs", x), x)
    assert provenance["source"]["lm_name"] == "tiny"


def test_llama_scope_folders(tmp_path: Path) -> None:
    write_llama_scope(tmp_path / "theirs")
    sae, provenance = load_any(tmp_path / "theirs")
    x = activations()
    assert_same(sae, *FORMULAS["llama_scope"](tmp_path / "theirs", x), x)
    assert provenance["hook"] == "layers.8.resid_post"


@pytest.mark.parametrize(
    ("version", "path", "hook"),
    [
        (1, "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71", "layers.20.resid_post"),
        (1, "gemma-scope-9b-pt-mlp/layer_3/width_16k/canonical", "layers.3.mlp_out"),
        (2, "resid_post/layer_9_width_16k_l0_medium", "layers.9.resid_post"),
        (1, "somewhere", None),
    ],
)
def test_gemma_scope_folders(tmp_path: Path, version: int, path: str, hook: str | None) -> None:
    write_gemma_scope(tmp_path / path, version)
    assert detect(tmp_path / path) == "gemma_scope"
    sae, provenance = load_any(tmp_path / path)
    x = activations()
    assert_same(sae, *FORMULAS["gemma_scope"](tmp_path / path, x), x)
    assert provenance.get("hook") == hook


def test_half_precision_files_are_read(tmp_path: Path) -> None:
    write_saelens(tmp_path / "theirs")
    path = tmp_path / "theirs" / "sae_weights.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    sae, _ = load_any(tmp_path / "theirs")
    assert sae.W_enc.dtype == torch.float32


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_sae("topk", "scale", True).save_pretrained(tmp_path / "ours", PROVENANCE)
    arguments = ["convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", "saelens"]
    main(arguments)
    assert capsys.readouterr().out.strip().endswith("granary to saelens")
    assert detect(tmp_path / "theirs") == "saelens"
    (tmp_path / "empty").mkdir()
    new = str(tmp_path / "new")
    wrong = {
        tuple(arguments): f"{tmp_path / 'theirs'} is not empty: choose another folder",
        ("convert", str(tmp_path / "empty"), new, "--to", "saelens"): (
            f"{tmp_path / 'empty'} is not an SAE folder of a known format: granary, {', '.join(FORMATS)}"
        ),
        ("convert", str(tmp_path / "ours"), new, "--to", "onnx"): (
            "format 'onnx' can't be written: choose from granary, saelens, sparsify, crosscoder_learning, "
            "dictionary_learning, opensae"
        ),
    }
    for command, message in wrong.items():
        with pytest.raises(SystemExit) as stop:
            main(list(command))
        assert stop.value.code == 2
        assert capsys.readouterr().err == f"error: {message}\n"


def test_the_help_names_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["convert", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("granary", *FORMATS))
    assert "examples:" in shown


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_saelens(tmp_path / "temporal", architecture="temporal")
    write_saelens(tmp_path / "rescaled", normalize_activations="constant_norm_rescale")
    write_saelens(tmp_path / "whitened", normalize_activations="covariance_whitening")
    write_saelens(tmp_path / "heads", reshape_activations="hook_z")
    write_saelens(tmp_path / "width", d_in=D + 1)
    write_opensae(tmp_path / "jump", normalise=True, shift_back=True, shards=False, activation="jumprelu")
    write_opensae(tmp_path / "coder", normalise=True, shift_back=True, shards=False, output_hookpoint="layers.26")
    (tmp_path / "sparsify").mkdir()
    (tmp_path / "sparsify" / "cfg.json").write_text(json.dumps({"d_in": D, "num_latents": F, "k": K, "signed": True}))
    save_file(foreign_weights(), tmp_path / "sparsify" / "sae.safetensors")
    write_dictionary_learning(tmp_path / "other", "AutoEncoder")
    (tmp_path / "other" / "config.json").write_text(json.dumps({"trainer": {"dict_class": "CrossCoder"}}))
    write_llama_scope(tmp_path / "mlp", hook_point_out="blocks.8.hook_mlp_out")
    write_llama_scope(tmp_path / "token", norm_activation="token-wise")
    write_gemma_scope(tmp_path / "tuned", 1, scaling_factor=torch.tensor(2.0))
    cases = {
        "empty": "not an SAE folder of a known format",
        "temporal": "holds a temporal SAE",
        "rescaled": "constant_norm_rescale: fold it into the weights with SAELens first",
        "whitened": "covariance_whitening: fold it into the weights with SAELens first",
        "heads": "reshape_activations=hook_z: SAEs of one stream, not of attention heads",
        "width": r"W_enc has shape \(12, 40\), not \(13, 40\)",
        "jump": "activation=jumprelu",
        "coder": "a transcoder, not an SAE",
        "sparsify": "has signed=True",
        "other": "holds a CrossCoder",
        "mlp": "a transcoder, not an SAE",
        "token": "norm_activation=token-wise",
        "tuned": "has a scaling_factor",
    }
    for name, message in cases.items():
        with pytest.raises(GranaryError, match=message):
            load_any(tmp_path / name)


def test_every_format_is_tested() -> None:
    # Of crosscoders: test_crosscoder_learning.py; of maps: test_llamascopium.py; of a lone file: test_lone_files.py;
    # of vision models: test_vision_formats.py.
    elsewhere = {"crosscoder_learning", "llamascopium", "plain", "prisma", "sae_made_easy", "saev"}
    assert {*FORMULAS, *elsewhere} == set(FORMATS)
