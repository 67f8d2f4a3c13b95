"""SAELens's four classes of transcoders both ways, and its loaders of Gemma Scope's, by the package itself."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from shared.sae.loading import convert, load_any
from shared.sae.sites import Sites
from tests.circuits import PROVENANCE, assert_same, started
from tests.foreign_transcoders import SAELENS, D, F, tokens, write_gemma_scope, write_saelens

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    sae_lens = pytest.importorskip("sae_lens", reason="SAELens is not in this environment: make test-peers")

BETWEEN = Sites(("layers.3.mlp_in",), ("layers.3.mlp_out",))
CHOICES: dict[str, dict[str, Any]] = {
    "batchtopk": {},
    "jumprelu": {"normalisation": "scale"},
    "relu": {"normalisation": "none"},
}


def computes(folder: Path, x_ND: Tensor) -> tuple[Tensor, Tensor, Any]:
    """(Latents, all that is written, the transcoder) by the folder as SAELens loads it."""
    loaded = sae_lens.SAE.load_from_disk(folder).requires_grad_(False)
    return loaded.encode(x_ND).double(), loaded(x_ND).double(), loaded


@pytest.mark.parametrize("kind", ["transcoder", "skip_transcoder"])
@pytest.mark.parametrize("activation", CHOICES)
def test_saelens_computes_what_is_written_here(tmp_path: Path, activation: str, kind: str) -> None:
    made, x_ND = started(kind, BETWEEN, activation=activation, **CHOICES[activation])
    made.save_pretrained(tmp_path / "ours", PROVENANCE)
    convert(tmp_path / "ours", tmp_path / "theirs", "saelens")
    latents_NF, y_ND, loaded = computes(tmp_path / "theirs", x_ND)
    assert_same(made, x_ND, latents_NF, y_ND)
    assert loaded.cfg.architecture() == (kind if activation == "relu" else f"jumprelu_{kind}")
    assert loaded.cfg.metadata.hook_name_out == "blocks.3.hook_mlp_out"
    # Saved again by SAELens, it comes back.
    loaded.save_model(tmp_path / "saved")
    again, _ = load_any(tmp_path / "saved")
    assert (again.config.kind, again.sites) == (kind, BETWEEN)
    assert_same(again, x_ND, latents_NF, y_ND)


@pytest.mark.parametrize("architecture", SAELENS)
def test_what_saelens_saves_is_read(tmp_path: Path, architecture: str) -> None:
    write_saelens(tmp_path / "made", architecture)
    sae_lens.SAE.load_from_disk(tmp_path / "made").save_model(tmp_path / "theirs")
    x_ND = tokens(D)
    latents_NF, y_ND, _ = computes(tmp_path / "theirs", x_ND)
    assert_same(load_any(tmp_path / "theirs")[0], x_ND, latents_NF, y_ND)


@pytest.mark.parametrize(("version", "skip"), [(1, False), (2, False), (2, True)])
def test_saelens_reads_gemma_scope_transcoders_the_same_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, skip: bool
) -> None:
    """Its loaders for the hub, given local files."""
    from sae_lens.loading import pretrained_sae_loaders as loaders

    repository = ["google/gemma-scope-2b-pt-transcoders", "google/gemma-scope-2-270m-pt"][version - 1]
    inside = ["layer_20/width_16k/average_l0_71", "transcoder/layer_9_width_16k_l0_small"][version - 1]
    root = tmp_path / repository.replace("/", "--")
    write_gemma_scope(root / inside, version, skip=skip)

    def local(repo_id: str, filename: str, subfolder: str = "", **_: object) -> str:
        return str(root / subfolder / filename)

    monkeypatch.setattr(loaders, "hf_hub_download", local)
    monkeypatch.setattr(
        loaders,
        "get_safetensors_tensor_shapes",
        lambda _, filename: {name: list(tensor.shape) for name, tensor in load_file(root / filename).items()},
    )
    given: dict[str, Any] = {"d_in": D, "d_out": D, "d_sae": F, "reshape_activations": "none"}
    load = [loaders.gemma_2_transcoder_huggingface_loader, loaders.gemma_3_sae_huggingface_loader][version - 1]
    cfg, tensors, _ = load(repository, inside, cfg_overrides=given)
    cfg["metadata"] = {"sae_lens_version": "6.54.12"}
    (tmp_path / "loaded").mkdir()
    (tmp_path / "loaded" / "cfg.json").write_text(json.dumps(cfg))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "loaded/sae_weights.safetensors"
    )
    x_ND = tokens(D)
    latents_NF, y_ND, _ = computes(tmp_path / "loaded", x_ND)
    assert_same(load_any(root / inside)[0], x_ND, latents_NF, y_ND)
