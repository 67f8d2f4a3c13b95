"""The examples run as their docstrings say."""

from pathlib import Path

import matplotlib.image

from shared.lm import load_config
from shared.sae import SAE, SAEConfig
from tests.cli import ForkServer

STEER = str(Path(__file__).resolve().parents[2] / "examples/steer.py")


def test_steer(stages: ForkServer, tmp_path: Path) -> None:
    width = load_config("bundled").hidden_size
    sae = SAE(SAEConfig(d_model=width, d_latent=4 * width, k=8, normalisation="layer_norm"))
    sae.save_pretrained(tmp_path / "sae", {"hook": "layers.1.resid_post", "model": {"id": "bundled"}})
    done = stages.at(tmp_path).run(STEER, str(tmp_path / "sae"), "--tokens=6", f"--out={tmp_path / 'a.png'}")
    assert done.code == 0, done.stderr
    assert "unchanged" in done.stdout
    assert "set to" in done.stdout
    picture = matplotlib.image.imread(tmp_path / "a.png")
    assert picture.shape[0] > 600
    assert picture.shape[1] > 1200
    assert 0.02 < picture[..., :3].std() < 0.5  # neither empty nor noise


def test_steer_says_what_is_wrong(stages: ForkServer, tmp_path: Path) -> None:
    done = stages.at(tmp_path).run(STEER, str(tmp_path / "nothing"))
    assert done.code == 2
    wrong = f"error: there is no SAE folder {tmp_path / 'nothing'}: train one, or give a hub id owner/name"
    assert done.stderr.splitlines()[-1] == wrong
    assert "Traceback" not in done.stderr
