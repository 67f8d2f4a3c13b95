"""circuit-tracer's folders: what is written computes what was trained, and what they can't hold is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from shared.basics.errors import GranaryError
from shared.sae.sets import convert_set, load_set
from shared.sae.sites import Sites
from tests.circuits import LAYERS, PROVENANCE, READS, WRITES, assert_same, of_clt, of_set, save_set, started

CHOICES: list[dict[str, Any]] = [
    {"activation": "batchtopk"},
    {"activation": "jumprelu", "normalisation": "scale"},
    {"activation": "relu", "normalisation": "none"},
]


@pytest.mark.parametrize("kind", ["transcoder", "skip_transcoder"])
@pytest.mark.parametrize("given", CHOICES, ids=lambda given: given["activation"])
def test_f07_f08_f09_a_set_is_folded(tmp_path: Path, kind: str, given: dict[str, Any]) -> None:
    """Thresholds stay, strict; W_skip is [out, in]."""
    made, x = save_set(tmp_path / "ours", kind, **given)
    assert convert_set(tmp_path / "ours", tmp_path / "theirs", "circuit_tracer") == "granary set"
    for layer in range(LAYERS):
        assert_same(made[layer], x[layer], *of_set(tmp_path / "theirs", layer, x[layer]))
    with pytest.raises(GranaryError, match="circuit-tracer's format already"):
        convert_set(tmp_path / "theirs", tmp_path / "again", "circuit_tracer")
    read = load_set(tmp_path / "theirs")
    assert list(read) == list(range(LAYERS))
    for layer, one in read.items():
        theirs, ours = (each.decode(each.encode(x[layer])) for each in (one, made[layer]))
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    config = OmegaConf.load(tmp_path / "theirs" / "config.yaml")
    assert config.model_name == "owner/model"
    assert (config.feature_input_hook, config.feature_output_hook) == ("mlp.hook_in", "mlp.hook_out")


@pytest.mark.parametrize("given", CHOICES, ids=lambda given: given["activation"])
def test_f19_a_clt_row_is_cut_by_target(tmp_path: Path, given: dict[str, Any]) -> None:
    made, x_ND = started("clt", Sites(READS, WRITES), **given)
    made.save_pretrained(tmp_path / "ours", PROVENANCE)
    assert convert_set(tmp_path / "ours", tmp_path / "theirs", "circuit_tracer") == "granary clt"
    assert_same(made, x_ND, *of_clt(tmp_path / "theirs", x_ND))
    for folder in ("ours", "theirs"):
        (read,) = load_set(tmp_path / folder).items()
        assert read[0] == 0
        torch.testing.assert_close(read[1](x_ND).x_hat, made(x_ND).x_hat, rtol=1e-4, atol=1e-4)
    assert read[1].sites == made.sites
    with pytest.raises(GranaryError, match="holds a CLT, which fills a folder of its own"):
        convert_set(tmp_path, tmp_path / "again", "circuit_tracer")


def test_f06_f50_what_the_folders_cannot_hold(tmp_path: Path) -> None:
    save_set(tmp_path / "topk", "transcoder", activation="topk")
    with pytest.raises(GranaryError, match=r"no topk.*Train with sae=batchtopk sae\.k=4.*the same L0 of 4"):
        convert_set(tmp_path / "topk", tmp_path / "a", "circuit_tracer")
    save_set(tmp_path / "gap", "transcoder", activation="relu")
    for file in (tmp_path / "gap" / "layer_1").iterdir():
        file.unlink()
    with pytest.raises(GranaryError, match="the set has layers 0, 2: train the others too"):
        convert_set(tmp_path / "gap", tmp_path / "a", "circuit_tracer")
    made, _ = started(
        "clt", Sites(READS, tuple(name.replace("mlp_out", "attn_out") for name in WRITES)), activation="relu"
    )
    made.save_pretrained(tmp_path / "other", PROVENANCE)
    with pytest.raises(GranaryError, match=r"no place for layers\.0\.attn_out"):
        convert_set(tmp_path / "other", tmp_path / "a", "circuit_tracer")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(GranaryError, match="is not empty"):
        convert_set(tmp_path / "gap", tmp_path / "full", "circuit_tracer")
