"""Which SAEs are evaluated, where their results go, and dictionaries that write elsewhere than they read."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from shared.lm import packed_inputs
from shared.sae import Transcoder
from shared.sae.sites import Sites
from shared.sae.variants.transcoder import TranscoderConfig
from shared.store import Store
from tests.pipeline.test_eval import BOS, HOOK, evaluate, make_model, make_store, plain_sae, read_report, run, save_sae

READ, WRITTEN = "layers.1.mlp_in", "layers.1.mlp_out"
QUICK = ("downstream=false", "contexts=2")
REPORTS = {"folder": {"../sweep/k%3D2/report.html", "../sweep/k%3D4/report.html"}, "glob": {None}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("folders") / "model")


@pytest.fixture(scope="module")
def store(model: Path) -> Path:
    return make_store(model.parent / "store", model, "isolated", hooks=[HOOK, READ, WRITTEN])


def test_an_unfinished_run_is_left_out_of_a_sweep(store: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    for k in (2, 4):
        save_sae(sweep / f"k={k}", plain_sae(16, k))
    (sweep / "k=8").mkdir()
    (sweep / "k=8/train.yaml").write_text("sae: {}\n")
    torn = save_sae(sweep / "k=16", plain_sae(16, 4)) / "sae.safetensors"
    torn.write_bytes(torn.read_bytes()[:-10])
    for name, spec in (("folder", str(sweep)), ("glob", f"{sweep}/*")):
        keys = [*QUICK, f"report={str(name == 'folder').lower()}"]
        done = run(f"run_dir={tmp_path / name}", f"sae={spec}", f"store.url={store}", *keys)
        assert done.returncode == 0, done.stderr
        comparison = json.loads((tmp_path / name / "comparison.json").read_text())
        assert [row["k"] for row in comparison["rows"]] == [2, 4]
        assert [Path(left["path"]).name for left in comparison["left_out"]] == ["k=8", "k=16"]
        assert "k=8 has no sae.safetensors: finish its training" in done.stderr
        assert "k=16/sae.safetensors is damaged" in done.stderr
        assert (tmp_path / name / "comparison.html").exists() == (name == "folder")
        assert ("report    " in done.stderr) == (name == "folder")
        assert {row["report"] for row in comparison["rows"]} == REPORTS[name]
        assert all((folder / "report.html").exists() == (name == "folder") for folder in (sweep / "k=2", sweep / "k=4"))
    assert "Left out: " in (tmp_path / "folder" / "comparison.html").read_text()
    # What is named itself must be sound; and where nothing is, that is an error.
    for spec in (f"['{sweep}/k=2','{sweep}/k=8']", f"{sweep}/k=8"):
        done = run(f"run_dir={tmp_path}", f"sae={spec}", f"store.url={store}", *QUICK)
        assert done.returncode == 2
        assert "k=8 has no sae.safetensors" in done.stderr


def test_a_second_sae_takes_nothing_from_the_first(store: Path, tmp_path: Path) -> None:
    own = save_sae(tmp_path / "sae", plain_sae(16, 2))
    other = save_sae(tmp_path / "another sae's", plain_sae(16, 4))
    for sae in (own, other):
        done = run(f"run_dir={tmp_path}", f"sae={sae}", f"store.url={store}", *QUICK)
        assert done.returncode == 0, done.stderr
    assert read_report(tmp_path)["sae"]["config"]["k"] == 2
    assert read_report(other)["sae"]["config"]["k"] == 4
    for name in ("report.html", "latents.safetensors", "plots"):
        assert (other / name).exists()
    line = next(line for line in done.stderr.splitlines() if "next" in line)
    found: dict[str, Any] = {}
    exec(line.partition("next")[2].strip(), found)  # pasted as it is, whatever the path
    assert found["sae"].config.k == 4


def transcoder(folder: Path) -> Path:
    config = TranscoderConfig(
        d_in=16, d_out=16, d_latent=48, k=6, normalisation="none", pre_bias=False, sites=Sites((READ,), (WRITTEN,))
    )
    made = Transcoder(config, generator=torch.Generator().manual_seed(3)).requires_grad_(False)
    made.b_dec.copy_(torch.randn(16, generator=torch.Generator().manual_seed(4)))
    made.save_pretrained(folder)
    return folder


def test_a_transcoder_is_scored_against_what_it_writes(model: Path, store: Path, tmp_path: Path) -> None:
    folder = transcoder(tmp_path / "transcoder")
    report = evaluate(tmp_path / "out", folder, store)
    opened, sae = Store.open(store), Transcoder.from_pretrained(folder)
    heldout = opened.contexts("heldout")
    mask = torch.from_numpy(opened.mask(heldout)).flatten()
    x, y = (torch.cat([opened.read_context(hook, int(c)) for c in heldout])[mask].double() for hook in (READ, WRITTEN))
    y_hat = sae(x.float()).x_hat.double()
    fvu = (y - y_hat).square().sum() / (y - y.mean(0)).square().sum()
    assert report["fvu"] == pytest.approx(float(fvu), rel=1e-6)
    cosine = torch.nn.functional.cosine_similarity(y, y_hat, dim=1).mean()
    assert report["reconstruction"]["cosine"] == pytest.approx(float(cosine), rel=1e-6)
    assert report["l0"] == pytest.approx(float((sae.encode(x.float()).values != 0).sum(1).double().mean()))
    assert report["activations"]["norm_of_mean"] == pytest.approx(
        opened.statistics(WRITTEN).mean.dot(opened.statistics(WRITTEN).mean) ** 0.5
    )
    assert report["sae"]["hook"] == f"{READ} -> {WRITTEN}"
    assert (report["sae"]["reads"], report["sae"]["writes"]) == ([READ], [WRITTEN])
    assert report["decoder"]["encoder_cosine_mean"] is None

    # The losses by plain hooks on the MLP's own module: input in, reconstruction out.
    llama = AutoModelForCausalLM.from_pretrained(model).eval()
    tokens = torch.from_numpy(opened.tokens(heldout)).long()
    segments = torch.from_numpy(opened.segments(heldout)).long()
    replaced = torch.from_numpy(opened.mask(heldout)) & (tokens != BOS)
    totals = {}
    for name in ("ce_clean", "ce_spliced", "ce_zero"):

        def edit(_module: Any, args: Any, out: torch.Tensor, name: str = name) -> torch.Tensor:
            new = {"ce_clean": out, "ce_spliced": sae(args[0]).x_hat, "ce_zero": out * 0}[name]
            return torch.where(replaced[..., None], new, out)

        handle = llama.model.layers[1].mlp.register_forward_hook(edit)
        with torch.no_grad():
            logs = llama(**packed_inputs(llama, tokens, segments, isolated=True)).logits.double().log_softmax(-1)
        handle.remove()
        scored = (segments[:, 1:] == segments[:, :-1]) & replaced[:, 1:]
        totals[name] = float(-logs[:, :-1].gather(2, tokens[:, 1:, None])[..., 0][scored].mean())
    assert {name: report[name] for name in totals} == pytest.approx(totals, rel=1e-5)


def test_a_hook_is_no_way_to_move_a_transcoder(store: Path, tmp_path: Path) -> None:
    folder = transcoder(tmp_path / "transcoder")
    done = run(f"run_dir={tmp_path}", f"sae={folder}", f"store.url={store}", f"hook={HOOK}")
    assert done.returncode == 2
    assert "hook=layers.1.resid_post is for dictionaries of one site" in done.stderr
    shutil.rmtree(folder)
