"""Other projects' transcoders, read and written: the same latents fire, and what is written is the same."""

from pathlib import Path
from typing import Any

import pytest
import torch

from shared.basics.errors import GranaryError
from shared.sae import SAE
from shared.sae.__main__ import main
from shared.sae.loading import convert, detect, load, load_any
from shared.sae.sites import Sites, SiteWidths
from shared.sae.variants import SkipTranscoder, Transcoder
from tests.circuits import PROVENANCE, assert_same, started
from tests.foreign_transcoders import (
    D_OUT,
    SAELENS,
    D,
    F,
    gemma_scope,
    saelens,
    sparsify,
    tokens,
    write_gemma_scope,
    write_saelens,
    write_sparsify,
)
from tests.formulas import make_sae

BETWEEN = Sites(("layers.3.mlp_in",), ("layers.3.mlp_out",))
KINDS = ("transcoder", "skip_transcoder")
WRITTEN: list[tuple[str, str, dict[str, Any]]] = [
    ("saelens", "jumprelu_{}", {"activation": "batchtopk"}),
    ("saelens", "jumprelu_{}", {"activation": "jumprelu", "normalisation": "scale"}),
    ("saelens", "{}", {"activation": "relu", "normalisation": "none"}),
    ("sparsify", "", {"activation": "topk"}),
    ("sparsify", "", {"activation": "topk", "normalisation": "none"}),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("form", "architecture", "given"), WRITTEN, ids=[f"{form}-{'-'.join(given.values())}" for form, _, given in WRITTEN]
)
def test_f07_f08_written_transcoders_compute_the_same(
    tmp_path: Path, kind: str, form: str, architecture: str, given: dict[str, Any]
) -> None:
    made, x_ND = started(kind, BETWEEN, **given)
    made.save_pretrained(tmp_path / "ours", PROVENANCE)
    folder = tmp_path / "layers.3.mlp"
    assert convert(tmp_path / "ours", folder, form) == "granary"
    formula = {"saelens": saelens, "sparsify": sparsify}[form]
    assert_same(made, x_ND, *formula(folder, x_ND))
    assert detect(folder) == form
    convert(folder, tmp_path / "back", "granary")
    again = load(tmp_path / "back")
    assert (again.config.kind, again.sites) == (kind, BETWEEN)
    assert_same(again, x_ND, *formula(folder, x_ND))
    if form == "saelens":
        assert f'"architecture": "{architecture.format(kind)}"' in (folder / "cfg.json").read_text()


@pytest.mark.parametrize("architecture", SAELENS)
def test_saelens_transcoders(tmp_path: Path, architecture: str) -> None:
    write_saelens(tmp_path / "theirs", architecture)
    made, provenance = load_any(tmp_path / "theirs")
    assert (made.config.kind, made.config.activation) == SAELENS[architecture]
    assert made.widths == SiteWidths((D,), (D_OUT,))
    assert made.sites == BETWEEN
    assert provenance["converted_from"] == "saelens"
    x_ND = tokens(D)
    assert_same(made, x_ND, *saelens(tmp_path / "theirs", x_ND))


@pytest.mark.parametrize("skip", [True, False])
def test_sparsify_transcoders(tmp_path: Path, skip: bool) -> None:
    write_sparsify(tmp_path / "layers.3.mlp", skip=skip)
    made, _ = load_any(tmp_path / "layers.3.mlp")
    assert isinstance(made, SkipTranscoder if skip else Transcoder)
    assert made.sites == BETWEEN
    x_ND = tokens(D)
    assert_same(made, x_ND, *sparsify(tmp_path / "layers.3.mlp", x_ND))


@pytest.mark.parametrize("skip", [True, False])
def test_f05_gemma_scope_2_transcoders(tmp_path: Path, skip: bool) -> None:
    """Its skip is [in, out]."""
    write_gemma_scope(tmp_path / "theirs", 2, skip=skip)
    made, _ = load_any(tmp_path / "theirs")
    assert made.config.kind == ("skip_transcoder" if skip else "transcoder")
    assert made.sites == Sites(("layers.9.mlp_in",), ("layers.9.mlp_out",))
    x_ND = tokens(D)
    assert_same(made, x_ND, *gemma_scope(x_ND, skip=skip))
    with pytest.raises(GranaryError, match=r"not a sae: use granary\.load"):
        SAE.from_pretrained(tmp_path / "theirs")


def test_gemma_scope_1_transcoders_are_told_by_their_repository(tmp_path: Path) -> None:
    inside = "layer_20/width_16k/average_l0_71"
    theirs = tmp_path / "models--google--gemma-scope-2b-pt-transcoders/snapshots/abc" / inside
    write_gemma_scope(theirs, 1)
    x_ND = tokens(D)
    made, _ = load_any(theirs)
    assert made.config.kind == "transcoder"
    assert made.sites is None
    assert_same(made, x_ND, *gemma_scope(x_ND, skip=False))
    # A copy under another name says nothing, so its owner does.
    write_gemma_scope(tmp_path / "copied", 1)
    assert load_any(tmp_path / "copied")[0].config.kind == "sae"
    places = ["--reads", "layers.20.mlp_in", "--writes", "layers.20.mlp_out"]
    main(["convert", str(tmp_path / "copied"), str(tmp_path / "ours"), "--to", "granary", *places])
    ours = load(tmp_path / "ours")
    assert ours.config.kind == "transcoder"
    assert ours.sites == Sites(("layers.20.mlp_in",), ("layers.20.mlp_out",))
    assert_same(ours, x_ND, *gemma_scope(x_ND, skip=False))


def test_what_a_format_cannot_hold_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        ("transcoder", "topk", "saelens"): (
            r"the saelens format has no topk transcoders: it holds relu, jumprelu, batchtopk\. Train with "
            r"sae=batchtopk sae\.k=4, or give this one a threshold: .*--threshold STORE.* the same L0 of 4"
        ),
        ("skip_transcoder", "batchtopk", "sparsify"): "the sparsify format has no batchtopk skip transcoders",
        ("transcoder", "topk", "opensae"): "the opensae format has no transcoders: it holds SAEs",
        ("transcoder", "relu", "dictionary_learning"): "the dictionary_learning format has no transcoders",
    }
    for (kind, activation, form), message in cases.items():
        source = tmp_path / f"{kind}-{activation}-{form}"
        started(kind, BETWEEN, activation=activation)[0].save_pretrained(source, PROVENANCE)
        with pytest.raises(GranaryError, match=message) as caught:
            convert(source, tmp_path / "out", form)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()
    sites, widths = Sites(("layers.3.mlp_in",), ("layers.3.mlp_out",)), SiteWidths((D,), (D_OUT,))
    config = Transcoder.config_class.of(widths, {"d_latent": F, "k": 2, "pre_bias": False}, sites)
    Transcoder(config, generator=torch.Generator().manual_seed(0)).save_pretrained(tmp_path / "uneven")
    with pytest.raises(GranaryError, match="this one reads 8, writes 6"):
        convert(tmp_path / "uneven", tmp_path / "out", "sparsify")
    make_sae("topk", "none", True).save_pretrained(tmp_path / "ours")
    given = ["convert", str(tmp_path / "ours"), str(tmp_path / "out"), "--to", "saelens", "--reads", "layers.1.mlp_in"]
    wrong = {(): "--reads and --writes go together", ("--writes", "layers.1.mlp_out"): "of other projects"}
    for more, told in wrong.items():
        with pytest.raises(SystemExit) as stop:
            main([*given, *more])
        assert stop.value.code == 2
        assert told in capsys.readouterr().err


def test_what_changes_the_function_of_a_transcoder_is_refused(tmp_path: Path) -> None:
    write_saelens(tmp_path / "bias", "transcoder", apply_b_dec_to_input=True)
    write_saelens(tmp_path / "unknown", "skip_transcoder", gain=2.0)
    write_saelens(tmp_path / "width", "skip_transcoder", d_out=D_OUT + 1)
    write_sparsify(tmp_path / "skip", skip=True, transcode=False)
    write_sparsify(tmp_path / "groups", skip=True, activation="groupmax")
    write_sparsify(tmp_path / "left", skip=True, skip_connection=False)
    cases = {
        "bias": "apply_b_dec_to_input=True: transcoders without a bias on what they read",
        "unknown": "the key gain",
        "width": r"W_dec has shape \(20, 6\), not \(20, 7\)",
        "skip": "skip_connection=True with transcode=False",
        "groups": "activation=groupmax",
        "left": "the tensor W_skip",
    }
    for name, message in cases.items():
        with pytest.raises(GranaryError, match=message):
            load_any(tmp_path / name)
