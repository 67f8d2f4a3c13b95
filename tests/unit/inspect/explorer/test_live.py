"""The model on the spot: what it says of a text is what the model and the dictionary give, and it refuses others."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.basics.errors import GranaryError
from shared.intervene.edits import Edit
from shared.intervene.splice import SplicedModel
from shared.lm import capture, load_causal_lm, load_tokenizer, model_identity
from shared.lm.modulepoint import ModulePoint
from shared.sae import SAE
from shared.sae.for_store import weights_sha256
from shared.sae.loading import load
from shared.sae.sites import Sites, SiteWidths
from stage_inspect.explorer.limits import GENERATED_TOKENS, TEXT_CHARACTERS, TEXT_TOKENS
from stage_inspect.explorer.live import Live, LiveSettings
from tests.exploring import LATENTS, opened_study, small_study
from tests.variants import make

TEXT = "def read(self, path):\n    return open(path).read()  # 日本 😀\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_study(tmp_path_factory.mktemp("live"))


@pytest.fixture(scope="module")
def live(folder: Path) -> Live:
    latents = opened_study(folder, model=dict(model_identity("bundled")))
    return Live(latents, LiveSettings.find(latents, None, None))


def test_every_latent_that_fires_is_told(live: Live, folder: Path) -> None:
    told = live.read(TEXT)
    tokenizer, model, sae = load_tokenizer("bundled"), load_causal_lm("bundled"), SAE.from_pretrained(folder / "sae")
    ids = [tokenizer.bos_token_id, *tokenizer(TEXT, add_special_tokens=False).input_ids]
    hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[3][0]
    dense = sae.encode(hidden).to_dense(LATENTS).detach().numpy()
    dense[0] = 0  # BOS
    assert len(told["pieces"]) == len(ids)
    assert not told["cut"]
    assert [found["latent"] for found in told["latents"]] == np.flatnonzero(dense.any(0)).tolist()
    for found in told["latents"]:
        column = dense[:, found["latent"]]
        assert found["at"] == np.flatnonzero(column).tolist()
        assert np.allclose(found["a"], column[found["at"]], rtol=1e-3, atol=1e-4)
        assert np.isclose(found["max"], column.max(), rtol=1e-3)
        assert column[found["peak"]] == column.max()
        assert np.isclose(found["sum"], column.sum(), rtol=1e-3)


def test_a_long_text_is_cut(live: Live) -> None:
    told = live.read("x = 1\n" * (TEXT_CHARACTERS // 6))
    assert told["cut"]
    assert len(told["pieces"]) == TEXT_TOKENS


def test_steering_is_the_splice(live: Live) -> None:
    tokenizer, model = load_tokenizer("bundled"), load_causal_lm("bundled")
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(TEXT, add_special_tokens=False).input_ids]])
    plain = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    told = live.steer(TEXT, 5, "add", 1000.0, 8)
    assert told["clean"] == tokenizer.decode(plain[0, ids.shape[1] :])
    assert told["steered"] != told["clean"]
    likely = model(ids).logits[0, -1].softmax(-1)
    before = {token: probability for token, probability, _ in told["next"]}
    best = int(likely.argmax())
    assert any(np.isclose(probability, float(likely[best]), rtol=1e-3) for probability in before.values())
    same = live.steer(TEXT, 5, "multiply", 1.0, 8)
    assert same["steered"] == same["clean"] == told["clean"]
    assert all(np.isclose(one, other, rtol=1e-3) for _, one, other in same["next"])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"latent": LATENTS}, "is not in the SAE"),
        ({"mode": "replace"}, "choose from set, add, multiply"),
        ({"strength": float("nan")}, "finite"),
        ({"tokens": 0}, "1 to"),
        ({"tokens": GENERATED_TOKENS + 1}, "1 to"),
        ({"prompt": "x = 1\n" * 2000}, f"more than {TEXT_TOKENS} tokens"),
        ({"prompt": "x" * (TEXT_CHARACTERS + 1)}, "characters"),
    ],
)
def test_what_cannot_be_steered_is_told(live: Live, changes: dict[str, Any], told: str) -> None:
    asked: dict[str, Any] = {"prompt": TEXT, "latent": 5, "mode": "set", "strength": 1.0, "tokens": 4, **changes}
    with pytest.raises(GranaryError, match=told):
        live.steer(**asked)


def test_another_model_tokenizer_or_dictionary_is_refused(folder: Path) -> None:
    latents = opened_study(folder, tokenizer={"hash": "0" * 64})
    with pytest.raises(GranaryError, match="is not that of the harvest"):
        Live(latents, LiveSettings.find(latents, None, None)).read(TEXT)
    latents = opened_study(folder, model={"id": "bundled", "weights_hash": "0" * 64})
    with pytest.raises(GranaryError, match="the models' weights differ"):
        Live(latents, LiveSettings.find(latents, None, None)).read(TEXT)
    latents = opened_study(folder, dictionary={"sha256": "0" * 64})
    with pytest.raises(GranaryError, match="is not the dictionary that"):
        Live(latents, LiveSettings.find(latents, None, None)).read(TEXT)
    latents = opened_study(folder, dictionary={"path": "elsewhere/sae"})  # the run folder was moved
    assert LiveSettings.find(latents, None, None).dictionary == folder / "sae"
    latents = opened_study(folder, dictionary={"path": "/nowhere"})
    with pytest.raises(GranaryError, match="give --dictionary FOLDER"):
        LiveSettings.find(latents, None, None)


@pytest.mark.parametrize("kind", ["transcoder", "clt", "lorsa"])
def test_what_writes_elsewhere_is_steered_where_it_writes(folder: Path, tmp_path: Path, kind: str) -> None:
    layers, block = (1, 2) if kind == "clt" else (1,), "attn" if kind == "lorsa" else "mlp"
    reads, writes = (tuple(f"layers.{layer}.{block}_{way}" for layer in layers) for way in ("in", "out"))
    places = Sites(reads, writes), SiteWidths((128,) * len(layers), (128,) * len(layers))
    more = {"k_scope": "layer"} if kind == "clt" else {}  # the k largest of all layers need a later layer first
    made = make(kind, places=places, d_latent=LATENTS, normalisation="none", **more).dictionary
    made.save_pretrained(tmp_path / "made")
    record: dict[str, Any] = {
        "kind": kind,
        "reads": list(reads),
        "writes": list(writes),
        "path": str(tmp_path / "made"),
    }
    record["sha256"] = weights_sha256(tmp_path / "made")
    latents = opened_study(folder, dictionary=record, model=dict(model_identity("bundled")))
    live = Live(latents, LiveSettings.find(latents, None, None))
    assert live.can_steer
    told = live.steer(TEXT, 5, "set", 300.0, 8)
    tokenizer, model = load_tokenizer("bundled"), load_causal_lm("bundled")
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(TEXT, add_special_tokens=False).input_ids]])
    for name, edits in (("clean", []), ("steered", [Edit([5], "set", 300.0)])):
        with SplicedModel(model, load(tmp_path / "made"), edits=edits) as spliced:
            full = spliced.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        assert told[name] == tokenizer.decode(full[0, ids.shape[1] :])
    assert told["steered"] != told["clean"]
    if kind == "lorsa":
        with torch.no_grad(), SplicedModel(model, made) as spliced:
            spliced(ids)
            dense = spliced.features.before.to_dense(LATENTS)[0]
        dense[0] = 0  # BOS
        fires = {found["latent"]: found["at"] for found in live.read(TEXT)["latents"]}
        assert fires == {latent: dense[:, latent].nonzero()[:, 0].tolist() for latent in fires}
        assert set(fires) == set(dense.any(0).nonzero()[:, 0].tolist())


def test_an_sae_of_a_module_is_read_and_steered_there(folder: Path, tmp_path: Path) -> None:
    site = "layers.1.mlp.down_proj-in"
    made = make("sae", places=(Sites.of(site), SiteWidths((384,), (384,))), d_latent=LATENTS).dictionary
    made.save_pretrained(tmp_path / "made")
    record: dict[str, Any] = {"kind": "sae", "reads": [site], "writes": [site], "path": str(tmp_path / "made")}
    record["sha256"] = weights_sha256(tmp_path / "made")
    latents = opened_study(folder, dictionary=record, model=dict(model_identity("bundled")))
    live = Live(latents, LiveSettings.find(latents, None, None))
    assert live.can_steer
    tokenizer, model = load_tokenizer("bundled"), load_causal_lm("bundled")
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(TEXT, add_special_tokens=False).input_ids]])
    with torch.no_grad(), capture(model, [ModulePoint("model.layers.1.mlp.down_proj", "input")]) as captured:
        model(ids)
    (x,) = captured.values()
    dense = made.encode(x[0]).to_dense(LATENTS).numpy()
    dense[0] = 0  # BOS
    assert [found["latent"] for found in live.read(TEXT)["latents"]] == np.flatnonzero(dense.any(0)).tolist()
    told = live.steer(TEXT, 5, "set", 300.0, 8)
    assert told["steered"] != told["clean"]


def test_what_lies_in_two_models_is_not_steered(folder: Path) -> None:
    latents = opened_study(
        folder, dictionary={"kind": "crosscoder", "reads": ["layers.2.resid_post", "chat:layers.2.resid_post"]}
    )
    live = Live(latents, LiveSettings.find(latents, None, None))
    assert not live.can_steer
    with pytest.raises(GranaryError, match="no places of one model"):
        live.steer(TEXT, 5, "set", 1.0, 4)
