"""The checkpoint folder: round trip, atomicity, clear errors."""

import json
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from shared.basics.errors import GranaryError
from shared.sae import SAE, load_provenance
from shared.sae import folder as sae_folder
from shared.sae.learn.objective import Objective
from shared.sae.sites import Sites
from tests.learning import LearningSAE


@pytest.fixture
def sae():
    sae = LearningSAE(d_model=6, d_latent=20, k=3, generator=torch.Generator().manual_seed(0))
    sae.initialise(None, torch.randn(50, 6, generator=torch.Generator().manual_seed(1)) + 2)
    return sae


def test_round_trip(sae, tmp_path):
    provenance = {"hook": "layers.2.resid_post", "tokens": 123}
    sae.save_pretrained(tmp_path / "sae", provenance)
    loaded = SAE.from_pretrained(tmp_path / "sae")
    assert loaded.config == replace(sae.config, sites=Sites.of("layers.2.resid_post"))
    assert loaded.state_dict().keys() == sae.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in sae.state_dict().items())
    assert load_provenance(tmp_path / "sae") == provenance
    x = torch.randn(9, 6)
    assert torch.equal(loaded(x).x_hat, sae(x).x_hat)
    assert sorted(path.name for path in (tmp_path / "sae").iterdir()) == ["config.json", "sae.safetensors"]


def test_a_loaded_sae_trains(sae, tmp_path):
    sae.save_pretrained(tmp_path)
    loaded = SAE.from_pretrained(tmp_path)
    Objective(loaded).losses(torch.randn(9, 6)).total.backward()
    assert loaded.W_enc.grad is not None


def test_saving_twice_gives_the_same_bytes(sae, tmp_path):
    for name in ("a", "b"):
        sae.save_pretrained(tmp_path / name, {"z": 1, "a": 2})
    for file in ("config.json", "sae.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_weights_are_float32_and_hold_the_normalisation(sae, tmp_path):
    sae.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "sae.safetensors")
    assert set(tensors) == {"W_enc", "b_enc", "W_dec", "b_dec", "input_mean", "input_scale", "input_variance"}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_a_save_that_died_between_its_files_is_noticed(sae, tmp_path):
    sae.save_pretrained(tmp_path, {"step": 1})
    sae.save_pretrained(tmp_path / "later", {"step": 2})
    (tmp_path / "later" / "sae.safetensors").replace(tmp_path / "sae.safetensors")
    with pytest.raises(GranaryError, match="different saves"):
        SAE.from_pretrained(tmp_path)


def test_a_failed_save_leaves_the_old_one(sae, tmp_path, monkeypatch):
    sae.save_pretrained(tmp_path, {"step": 1})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sae_folder, "write_weights", no_space)
    with pytest.raises(OSError, match="No space"):
        sae.save_pretrained(tmp_path, {"step": 2})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def damage(tmp_path, what):
    config, weights = tmp_path / "config.json", tmp_path / "sae.safetensors"
    document = json.loads(config.read_text())
    if what == "no config":
        config.unlink()
    elif what == "no weights":
        weights.unlink()
    elif what == "torn weights":
        weights.write_bytes(weights.read_bytes()[:100])
    elif what == "not json":
        config.write_text("{")
    elif what == "foreign":
        config.write_text(json.dumps({"architecture": "topk"}))
    elif what == "newer":
        config.write_text(json.dumps({**document, "version": 99}))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no config", "has no config.json"),
        ("no weights", "has no sae.safetensors"),
        ("torn weights", "is damaged"),
        ("not json", "is not JSON"),
        ("foreign", "does not describe an SAE"),
        ("newer", "format version 99"),
    ],
)
def test_damage_is_one_clear_line(sae, tmp_path, what, message):
    sae.save_pretrained(tmp_path)
    damage(tmp_path, what)
    with pytest.raises(GranaryError, match=message) as caught:
        SAE.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_wrong_shapes_are_named(sae, tmp_path):
    tensors = {**sae.state_dict(), "b_enc": torch.zeros(19), "extra": torch.zeros(1)}
    sae_folder.save(tmp_path, sae.config, tensors, {}, {})
    with pytest.raises(GranaryError, match="b_enc, extra"):
        SAE.from_pretrained(tmp_path)


def test_a_missing_folder_is_not_looked_up_on_the_hub(tmp_path):
    with pytest.raises(GranaryError, match="there is no SAE folder"):
        SAE.from_pretrained(tmp_path / "absent")
    with pytest.raises(GranaryError, match="there is no SAE folder"):
        SAE.from_pretrained("runs/demo/sae")


def test_tensors_are_fetched_one_at_a_time(sae, tmp_path):
    """No more than one is alive: a large SAE is exported within the memory of its largest matrix."""
    alive, most = weakref.WeakSet(), 0

    def fetch(name):
        nonlocal most
        tensor = sae.state_dict()[name].clone()
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    shapes = {name: tensor.to("meta") for name, tensor in sae.state_dict().items()}
    sae_folder.save(tmp_path, sae.config, shapes, {}, {}, fetch=fetch)
    assert most == 1
    loaded = SAE.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in sae.state_dict().items())
    with pytest.raises(GranaryError, match=r"is torch\.float32 \[1\], not as announced"):
        sae_folder.save(tmp_path, sae.config, shapes, {}, {}, fetch=lambda name: torch.zeros(1))
    with pytest.raises(GranaryError, match=r" has 0 rows, not as announced"):
        sae_folder.save(tmp_path, sae.config, shapes, {}, {}, fetch=lambda name: [])


@pytest.mark.slow
def test_loads_without_triton_or_transformers(sae, tmp_path):
    sae.save_pretrained(tmp_path)
    script = (
        "import sys; sys.modules['triton'] = None; sys.modules['transformers'] = None\n"
        "from shared.sae import SAE; import torch\n"
        f"print(SAE.from_pretrained({str(tmp_path)!r})(torch.ones(2, 6)).x_hat.shape)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "torch.Size([2, 6])" in result.stdout


def test_a_folder_of_a_hub_repository_is_downloaded_alone(sae, tmp_path, monkeypatch):
    asked = {}

    def download(repository, allow_patterns):
        asked[repository] = allow_patterns
        sae.save_pretrained(tmp_path / "layers.3")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    loaded = SAE.from_pretrained("hf://owner/name/layers.3")
    assert torch.equal(loaded.W_enc, sae.W_enc)
    assert asked == {"owner/name": ["layers.3/*"]}
    with pytest.raises(GranaryError, match=r"owner/name has no folder layers\.4"):
        SAE.from_pretrained("hf://owner/name/layers.4")
