"""circuit-tracer's own loaders encode and reconstruct, from what is written here, as what was trained.

Only its transcoder modules are imported: the rest needs packages of other pins than this environment's.
"""

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.sae.sets import convert_set
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
