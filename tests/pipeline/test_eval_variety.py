"""Evaluation of every activation and of every kind of hook, against direct computation."""

from pathlib import Path
from typing import Any

import pytest
import torch

from shared.sae import SAE
from shared.store import Store
from tests.learning import LearningSAE
from tests.pipeline.test_eval import (
    CONTEXTS,
    HOOK,
    D,
    constant_sae,
    evaluate,
    identity_sae,
    make_model,
    make_store,
    read_report,
    run,
    save_sae,
)

SITES = ("layers.0.resid_pre", "layers.1.attn_out", "layers.1.mlp_in", "layers.0.mlp_out")
ACTIVATIONS = ("topk", "batchtopk", "matryoshka", "relu", "jumprelu", "gated")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("variety") / "model")


@pytest.fixture(scope="module")
def store(model: Path) -> Path:
    return make_store(model.parent / "store", model, "isolated")


def heldout_tokens(folder: Path, hook: str) -> torch.Tensor:
    store = Store.open(folder)
    heldout = store.contexts("heldout")
    x = torch.cat([store.read_context(hook, int(context)) for context in heldout])
    return x[torch.from_numpy(store.mask(heldout)).flatten()]


def make(activation: str, x: torch.Tensor) -> SAE:
    sae = LearningSAE(
        d_model=D,
        d_latent=4 * D,
        k=6 if activation in ("topk", "batchtopk", "matryoshka") else None,
        activation="batchtopk" if activation == "matryoshka" else activation,
        prefixes=(16, 4 * D) if activation == "matryoshka" else None,
        normalisation="centre_scale",
        generator=torch.Generator().manual_seed(0),
    ).requires_grad_(False)
    sae.initialise(None, x)
    for name, tensor in sae.activation.state_dict().items():
        tensor.fill_({"threshold": 0.5, "log_threshold": -1.0, "r_mag": 0.1, "b_mag": 0.05}[name])
    return sae


def test_every_activation_evaluates(store: Path, tmp_path: Path) -> None:
    x = heldout_tokens(store, HOOK)
    saes = {name: make(name, x) for name in ACTIVATIONS}
    for name, sae in saes.items():
        save_sae(tmp_path / "saes" / name, sae)
    done = run(f"run_dir={tmp_path}", f"sae={tmp_path / 'saes'}", f"store.url={store}", "report=false")
    assert done.returncode == 0, done.stderr
    mean = x.double().mean(0)
    for name, sae in saes.items():
        report = read_report(tmp_path / "saes" / name)
        output = sae(x)
        error = (x - output.x_hat).double().square().sum()
        dense = output.latents.to_dense(4 * D)
        expected: dict[str, Any] = {
            "fvu": float(error / (x.double() - mean).square().sum()),
            "l0": float((dense > 0).double().sum(1).mean()),
            "dead_fraction": float((dense == 0).all(0).double().mean()),
            "n_tokens": len(x),
        }
        assert {key: report[key] for key in expected} == pytest.approx(expected, rel=1e-5)
        assert report["ce_clean"] < report["ce_zero"]
        assert report["ce_spliced"] != report["ce_clean"]


def test_every_kind_of_hook_evaluates(model: Path, tmp_path: Path) -> None:
    """Spliced anywhere, the identity changes nothing and the zero SAE is zero ablation; jointly too."""
    folder = make_store(tmp_path / "store", model, "isolated", hooks=SITES)
    for name, sae in (("identity", identity_sae()), ("zero", constant_sae(torch.zeros(D)))):
        paths = [save_sae(tmp_path / name / hook, sae, hook) for hook in SITES]
        keys = ["joint=true", "report=false"]
        done = run(f"run_dir={tmp_path / name}", f"sae={tmp_path / name}", f"store.url={folder}", *keys)
        assert done.returncode == 0, done.stderr
        reports = [read_report(path) for path in paths]
        assert [report["sae"]["hook"] for report in reports] == list(SITES)
        for report in reports:
            damage = report["ce_zero"] - report["ce_clean"]
            assert abs(damage) > 1e-3
            wanted = report["ce_clean"] if name == "identity" else report["ce_zero"]
            assert report["ce_spliced"] == pytest.approx(wanted, abs=1e-5)


def test_norms_and_dimensions_are_those_of_the_tokens(store: Path, tmp_path: Path) -> None:
    x = heldout_tokens(store, HOOK).double()
    sae = save_sae(tmp_path / "sae", identity_sae())
    report = evaluate(tmp_path / "out", sae, store, "downstream=false")["activations"]
    groups = report["norm_by_position"]
    assert sum(groups["tokens"]) == len(x)
    assert max(value for value in groups["max"] if value) == pytest.approx(float(x.norm(dim=1).max()), rel=1e-9)
    largest = report["largest"]["dimensions"]
    assert {row["dimension"]: row["max"] for row in largest} == pytest.approx(
        {row["dimension"]: float(x[:, row["dimension"]].abs().max()) for row in largest}, rel=1e-9
    )
    bos = report["bos_norm"]
    opened = Store.open(store)
    assert bos["tokens"] == int((opened.tokens(opened.contexts("heldout")) == 1).sum())
    assert 0 < len(opened.contexts("heldout")) < CONTEXTS
