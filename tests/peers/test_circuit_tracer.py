"""circuit-tracer's own loaders encode and reconstruct, from what is written here, as what was trained.

Only its transcoder modules are imported: the rest needs packages of other pins than this environment's.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.sae.sets import convert_set, load_set
from shared.sae.sites import Sites
from tests.circuits import LAYERS, PROVENANCE, READS, WRITES, D, assert_same, save_set, started

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

if importlib.util.find_spec("circuit_tracer") is None:
    pytest.skip("circuit-tracer is not in this environment: make test-peers", allow_module_level=True)
utils: Any = types.ModuleType("circuit_tracer.utils")
utils.get_default_device = lambda: torch.device("cpu")
sys.modules.setdefault("circuit_tracer.utils", utils)


@pytest.mark.parametrize("kind", ["transcoder", "skip_transcoder"])
@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu", "relu"])
def test_a_set_of_transcoders(tmp_path: Path, kind: str, activation: str) -> None:
    from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set

    made, x = save_set(tmp_path / "ours", kind, activation=activation)
    convert_set(tmp_path / "ours", tmp_path / "theirs", "circuit_tracer")
    loaded = load_transcoder_set(
        {layer: str(tmp_path / "theirs" / f"layer_{layer}.safetensors") for layer in range(LAYERS)},
        scan="test",
        feature_input_hook="mlp.hook_in",
        feature_output_hook="mlp.hook_out",
        device=torch.device("cpu"),
        dtype=torch.float32,
        lazy_encoder=False,
        lazy_decoder=False,
    )
    with torch.no_grad():
        for layer in range(LAYERS):
            one = loaded[layer]
            latents = one.encode(x[layer])
            assert_same(made[layer], x[layer], latents.double(), one.decode(latents, x[layer]).double())


@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu", "relu"])
def test_a_clt(tmp_path: Path, activation: str) -> None:
    from circuit_tracer.transcoder.cross_layer_transcoder import load_clt

    made, x_ND = started("clt", Sites(READS, WRITES), activation=activation)
    made.save_pretrained(tmp_path / "ours", PROVENANCE)
    convert_set(tmp_path / "ours", tmp_path / "theirs", "circuit_tracer")
    loaded = load_clt(str(tmp_path / "theirs"), device=torch.device("cpu"), dtype=torch.float32, lazy_decoder=False)
    x_LND = torch.stack(x_ND.split(D, dim=1))
    with torch.no_grad():
        latents_LNF = loaded.encode(x_LND)
        y_LND = loaded.decode(latents_LNF)
    assert_same(made, x_ND, torch.cat(list(latents_LNF), 1).double(), torch.cat(list(y_LND), 1).double())


@pytest.mark.parametrize("activation", ["relu", "jump_relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_clt_of_its_own_is_read(tmp_path: Path, activation: str, dtype: torch.dtype) -> None:
    """Made and written by the package; what it encodes and reconstructs of its own file, in float32, is ours."""
    from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder, load_clt

    generator = torch.Generator().manual_seed(0)
    theirs = CrossLayerTranscoder(
        LAYERS, 20, D, activation, lazy_decoder=False, device=torch.device("cpu"), dtype=dtype
    ).requires_grad_(False)
    for parameter in theirs.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    if activation == "jump_relu":
        theirs.activation_function.threshold.abs_()
    theirs.to_safetensors(str(tmp_path))
    places = {"feature_input_hook": theirs.feature_input_hook, "feature_output_hook": theirs.feature_output_hook}
    config = {"model_name": "owner/model", "model_kind": "cross_layer_transcoder", "scan": "it", **places}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    (found,) = load_set(tmp_path).values()
    assert found.sites == Sites(tuple(site.replace("mlp_in", "resid_mid") for site in READS), WRITES)
    x_LND = 2 * torch.randn(LAYERS, 50, D, generator=generator)
    loaded = load_clt(str(tmp_path), device=torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():
        latents_LNF = loaded.encode(x_LND)
        y_LND = loaded.decode(latents_LNF)
    x_ND = torch.cat(list(x_LND), 1)
    assert_same(found, x_ND, torch.cat(list(latents_LNF), 1).double(), torch.cat(list(y_LND), 1).double())
