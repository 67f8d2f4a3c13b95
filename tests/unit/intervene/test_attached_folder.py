"""SAEs of places on disk: what is written, and what is refused."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.basics.errors import GranaryError
from shared.intervene.attach import attach
from shared.intervene.folder import folder_name
from shared.intervene.saved import Saved
from shared.sae import SAE, SAEConfig
from shared.sae.sites import Sites
from tests.isolation import REPOSITORY
from tests.modules import MLP, noise, sae_of, seeded

PLACES = {"fc1": 12, "fc2:in": 12, "batch_norm@-1": 12}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = seeded(MLP)()
    with attach(model, {place: sae_of(width) for place, width in PLACES.items()}) as saes:
        saes.put("fc1", Saved(saes["fc1"], {"steps": 7}, {"auxk_k": 3}))
        saes.save_pretrained(tmp_path / "saes")
    return tmp_path / "saes"


def test_two_adapters_saved_both_on_disk(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["1-fc2-in", "batch_norm@-1", "fc1"]
    for inside in folder.iterdir():
        assert sorted(path.name for path in inside.iterdir()) == ["config.json", "sae.safetensors"]
    model, x = seeded(MLP)(), noise(4, 6)
    with attach(model, folder, mode="replace") as saes:
        assert set(saes) == set(PLACES)
        replaced = model(x)
        assert saes.saved["fc1"].provenance["steps"] == 7
        assert dict(saes.saved["fc1"].training) == {"auxk_k": 3}
        for place, width in PLACES.items():
            assert all(map(torch.equal, saes[place].state_dict().values(), sae_of(width).state_dict().values()))
    with attach(model, {place: sae_of(width) for place, width in PLACES.items()}, mode="replace"):
        assert torch.equal(model(x), replaced)


def test_peft_s_layout_is_written_and_read_bit_for_bit(folder, tmp_path):
    model, x = seeded(MLP)(), noise(4, 6)
    with attach(model, folder) as saes:
        saes.put("fc2:in", Saved(saes["fc1"]))  # one SAE at two places
        saes.save_pretrained(tmp_path / "peft", layout="peft")
        with pytest.raises(GranaryError, match="choose from granary, peft"):
            saes.save_pretrained(tmp_path / "other", layout="hdf5")
        wanted = {place: saes[place].state_dict() for place in saes}
    assert sorted(path.name for path in (tmp_path / "peft").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert (config["peft_type"], config["target_modules"]) == ("GRANARY_SAE", list(wanted))
    names = load_file(tmp_path / "peft/adapter_model.safetensors").keys()
    assert "base_model.model.batch_norm@-1.sae_W_dec" in names
    with attach(model, tmp_path / "peft", mode="replace") as again:
        for place, tensors in wanted.items():
            assert all(map(torch.equal, again[place].state_dict().values(), tensors.values()))
            assert again[place].sites == Sites.of(place)
        assert again.saved["fc1"].provenance["steps"] == 7
        assert dict(again.saved["fc1"].training) == {"auxk_k": 3}
        replaced = model(x)
        again.save_pretrained(tmp_path / "back")
    with attach(model, tmp_path / "back", mode="replace"):
        assert torch.equal(model(x), replaced)


def test_a_folder_of_peft_s_layout_is_data(folder, tmp_path):
    model = seeded(MLP)()
    with attach(model, folder) as saes:
        saes.save_pretrained(tmp_path / "peft", layout="peft")
    file, weights = tmp_path / "peft/adapter_config.json", tmp_path / "peft/adapter_model.safetensors"
    config, tensors = json.loads(file.read_text()), load_file(weights)
    documents = config["dictionaries"]
    moved = {("../../etc" if place == "fc1" else place): document for place, document in documents.items()}
    for wrong in (
        {"dictionaries": moved}, {"dictionaries": {}}, {"dictionaries": {"fc1": documents["fc1"]}},
        {"dictionaries": {**documents, "fc1": {}}}, {"dictionaries": [1]}, {"peft_type": "LORA"},
        {"dictionaries": {**documents, "fc1": {**documents["fc1"], "kind": "clt"}}},
    ):  # fmt: skip
        file.write_text(json.dumps({**config, **wrong}))
        with pytest.raises(GranaryError):
            attach(model, tmp_path / "peft")
    file.write_text(json.dumps(config))
    for changed in ({"other": torch.ones(1)}, {"base_model.model.fc1.sae_more": torch.ones(1)}):
        save_file({**tensors, **changed}, weights)
        with pytest.raises(GranaryError):
            attach(model, tmp_path / "peft")


@pytest.mark.slow
def test_reload_bit_equal_in_a_fresh_process(folder):
    script = (
        "import granary, torch, sys\nfrom tests.modules import MLP, noise, seeded\n"
        "with granary.attach(seeded(MLP)(), sys.argv[1], mode='replace') as saes:\n"
        "    torch.save(saes.model(noise(4, 6)), sys.argv[2])"
    )
    out = folder.parent / "out.pt"
    subprocess.run(
        [sys.executable, "-c", script, folder, out], check=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}
    )
    model = seeded(MLP)()
    with attach(model, folder, mode="replace"):
        assert torch.equal(torch.load(out), model(noise(4, 6)))


def test_the_folder_holds_little_but_the_tensors(tmp_path):
    model = torch.nn.Linear(200, 200)
    sae = SAE(SAEConfig(d_model=200, d_latent=2000, k=3))
    with attach(torch.nn.Sequential(model), {"0": sae}) as saes:
        saes.save_pretrained(tmp_path / "saes")
    size = sum(path.stat().st_size for path in (tmp_path / "saes").rglob("*") if path.is_file())
    assert size < 1.01 * sum(tensor.nbytes for tensor in sae.state_dict().values())


def test_a_folder_with_files_and_an_untrained_sae_are_not_written(folder):
    before = sorted(folder.rglob("*"))
    with attach(seeded(MLP)(), {"fc1": sae_of(12)}) as saes, pytest.raises(GranaryError, match="is not empty"):
        saes.save_pretrained(folder)
    untrained = attach(seeded(MLP)(), {"fc1": SAEConfig(k=3, expansion=2)})
    with pytest.raises(GranaryError, match="fc1 is not there yet"):
        untrained.save_pretrained(folder.parent / "other")
    assert sorted(folder.rglob("*")) == before
    assert not (folder.parent / "other").exists()


def test_a_folder_of_one_trained_sae_is_attached_to_the_place_that_it_records(tmp_path):
    SAE(SAEConfig(d_model=12, d_latent=24, k=3, sites=Sites.of("norm"))).save_pretrained(tmp_path / "sae")
    with attach(seeded(MLP)(), tmp_path / "sae") as saes:
        assert list(saes) == ["norm"]


def test_what_is_no_folder_of_attached_saes_is_said(folder, tmp_path):
    model = seeded(MLP)()
    (tmp_path / "empty").mkdir()
    with pytest.raises(GranaryError, match="there is no SAE in"):
        attach(model, tmp_path / "empty")
    with pytest.raises(GranaryError, match="there is no SAE folder"):
        attach(model, tmp_path / "absent")
    SAE(SAEConfig(d_model=12, d_latent=24, k=3)).save_pretrained(tmp_path / "nowhere")
    with pytest.raises(GranaryError, match="records no place: attach it by name"):
        attach(model, tmp_path / "nowhere")
    SAE(SAEConfig(d_model=12, d_latent=24, k=3, sites=Sites.of("fc1"))).save_pretrained(folder / "again")
    with pytest.raises(GranaryError, match=r"two SAEs in .* record fc1"):
        attach(model, folder)
    SAE(SAEConfig(d_model=12, d_latent=24, k=3, sites=Sites.of("fc9"))).save_pretrained(tmp_path / "far" / "x")
    with pytest.raises(GranaryError, match="MLP has no module fc9"):
        attach(model, tmp_path / "far")


def test_what_a_stranger_wrote_is_data(folder, tmp_path):
    """A place is looked up among the modules, never a path; and nothing is unpickled."""
    config = folder / "fc1" / "config.json"
    document = json.loads(config.read_text())
    document["sites"] = {"reads": ["../../etc/passwd"], "writes": ["../../etc/passwd"], "unit": "token"}
    config.write_text(json.dumps(document))
    with pytest.raises(GranaryError):
        attach(seeded(MLP)(), folder)

    class Mine:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "sae.safetensors").write_bytes(pickle.dumps(Mine()))
    (tmp_path / "pickled" / "config.json").write_text((folder / "1-fc2-in" / "config.json").read_text())
    with pytest.raises(GranaryError):
        attach(seeded(MLP)(), tmp_path / "pickled")
    assert not (tmp_path / "ran").exists()
    save_file({"W": torch.ones(1)}, folder / "1-fc2-in" / "sae.safetensors")
    with pytest.raises(GranaryError):
        attach(seeded(MLP)(), folder / "1-fc2-in")


def test_names_of_folders():
    assert folder_name("model.layers.2.mlp", 3) == "model.layers.2.mlp"
    assert folder_name("a:in[x]", 3) == "3-a-in[x]"
    assert folder_name("../a", 0) == "0-..-a"
    assert len(folder_name("a" * 300, 2)) < 100
