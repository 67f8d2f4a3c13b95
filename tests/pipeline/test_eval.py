"""Evaluation end to end through its command line, on a small LLaMA whose activations are in a real store."""

import io
import json
import logging
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

from shared.lm import capture, load_causal_lm, model_identity, segment_positions
from shared.lm.hookpoint import HookPoint
from shared.sae import SAE, SAEConfig
from shared.store import Store, StorePlan
from tests.cli import ForkServer
from tests.foreign import write_saelens

REPOSITORY = Path(__file__).resolve().parents[2]
D, T, CONTEXTS, VOCAB, BOS = 16, 24, 12, 40, 1
HOOKS = ("layers.0.resid_post", "layers.1.resid_post")
HOOK = HOOKS[1]


def documents(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Contexts of documents of uneven length, each after BOS; the last context is padded."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, VOCAB, (CONTEXTS, T)).astype(np.int32)
    segments = np.zeros((CONTEXTS, T), np.int32)
    for context in range(CONTEXTS):
        starts = np.sort(rng.choice(np.arange(2, T - 2), 2, replace=False))
        for start in (0, *starts):
            tokens[context, start] = BOS
            segments[context, start:] += start > 0
    tokens[-1, 15:] = 0
    segments[-1, 15:] = -1
    return tokens, (tokens != BOS) & (segments >= 0), segments


# Half of the documents of `separated` are longer than its original positions.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 7,
    "long_factor": [1.0, 4.0, 16.0, 48.0],
    "short_factor": [1.0, 1.01, 1.02, 1.03],
}


def separated(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `documents`, but each context holds its first document alone."""
    tokens, mask, segments = documents(seed)
    return np.where(segments == 0, tokens, 0), mask & (segments == 0), np.where(segments == 0, 0, -1)


def make_model(folder: Path, seed: int = 0, family: type[LlamaConfig | Phi3Config] = LlamaConfig, **keys: Any) -> Path:
    torch.manual_seed(seed)
    config = family(
        vocab_size=VOCAB,
        hidden_size=D,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.5,
        bos_token_id=BOS,
        eos_token_id=2,
        pad_token_id=0,
        **keys,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def make_store(
    folder: Path, model_folder: Path, mode: str, heldout: float = 0.34, hooks: Sequence[str] = HOOKS
) -> Path:
    tokens, mask, segments = separated() if mode == "separate" else documents()
    model = load_causal_lm(str(model_folder))
    plan = StorePlan(
        num_contexts=CONTEXTS,
        seq_len=T,
        hooks=dict.fromkeys(hooks, D),
        dtype="float32",
        shard_contexts=2,
        chunk_tokens=T,
        codec="none",
        heldout_fraction=heldout,
        heldout_placement="last",
        provenance={
            "model": dict(model_identity(str(model_folder))),
            "tokenizer": {"hash": "t", "special_ids": {"bos": BOS, "eos": 2, "pad": 0, "all": [0, 1, 2]}},
            "corpus": {"description": "<b>made up</b> & random", "fingerprint": "f" * 64},
            "packing": {"mode": mode},
        },
        versions={"model_path": str(model_folder)},
    )
    store = Store.create(folder, plan, tokens, mask, segments)
    points = [HookPoint.parse(hook) for hook in hooks]
    for shard in store.pending():
        rows = store.shard_contexts(shard)
        positions = segment_positions(torch.from_numpy(segments[rows])) if mode == "isolated" else None
        ids = torch.from_numpy(tokens[rows].astype(np.int64))
        with torch.no_grad(), capture(model, points) as captured:
            if mode == "separate":
                values = {hook: torch.zeros(len(ids), T, D) for hook in points}
                for row, length in enumerate((segments[rows] == 0).sum(1)):
                    model(input_ids=ids[row : row + 1, :length], use_cache=False)
                    for hook in points:
                        values[hook][row, :length] = captured[hook][0]
            else:
                model(input_ids=ids, position_ids=positions)
                values = dict(captured)
        store.write_shard(shard, {str(hook): value for hook, value in values.items()})
    store.finalize()
    return folder


def save_sae(folder: Path, sae: SAE, hook: str = HOOK, **provenance: Any) -> Path:
    sae.save_pretrained(folder, {"hook": hook, **provenance})
    return folder


def plain_sae(d_latent: int, k: int, d_model: int = D) -> SAE:
    config = SAEConfig(d_model=d_model, d_latent=d_latent, k=k, normalisation="none", pre_bias=False)
    return SAE(config, generator=torch.Generator().manual_seed(3)).requires_grad_(False)


def identity_sae() -> SAE:
    """x = relu(x) - relu(-x): the latents are the dimensions and their negatives, all kept."""
    sae = plain_sae(2 * D, 2 * D)
    sae.W_dec.copy_(torch.cat([torch.eye(D), -torch.eye(D)]))
    sae.W_enc.copy_(sae.W_dec)
    return sae


def constant_sae(value: torch.Tensor) -> SAE:
    """No latent ever fires, so every reconstruction is b_dec."""
    sae = plain_sae(4, 1)
    sae.W_enc.zero_()
    sae.b_enc.fill_(-1)
    sae.b_dec.copy_(value)
    return sae


class World:
    """Model, stores and SAEs on disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = make_model(root / "model")
        self.store = make_store(root / "store", self.model, "isolated")
        self.joined = make_store(root / "joined", self.model, "joined")
        self.rope_model = make_model(
            root / "rope", family=Phi3Config, rope_parameters=LONGROPE, original_max_position_embeddings=7
        )
        self.separate = make_store(root / "separate", self.rope_model, "separate")
        mean = torch.from_numpy(Store.open(self.store).statistics(HOOK).mean).float()
        self.identity = save_sae(root / "saes" / "identity", identity_sae())
        self.zero = save_sae(root / "saes" / "zero", constant_sae(torch.zeros(D)))
        self.mean = save_sae(root / "saes" / "mean", constant_sae(mean))
        self.random = save_sae(root / "saes" / "k=4,expansion=2", plain_sae(2 * D, 4))
        self.lower = save_sae(root / "lower", plain_sae(2 * D, 6), HOOKS[0])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def unrendered(figure: Figure, target: io.StringIO | io.BytesIO, format: str, **options: object) -> None:
    """In place of Figure.savefig, which takes four fifths of a small evaluation; it is used in `run_process`."""
    target.write("<svg></svg>" if isinstance(target, io.StringIO) else b"")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line in this process: a new one would import torch and transformers for each of these tests."""
    out, err = io.StringIO(), io.StringIO()
    handlers, level = list(logging.root.handlers), logging.root.level
    status: Any = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["stage_eval", "device.name=cpu", "device.threads=1", *arguments])
        patch.setattr(Figure, "savefig", unrendered)
        patch.setenv("COLUMNS", "160")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HYDRA_FULL_ERROR", "1")
        try:
            runpy.run_module("stage_eval", run_name="__main__")
        except SystemExit as stop:
            status = stop.code
        finally:
            for handler in set(logging.root.handlers) - set(handlers):
                handler.close()
            logging.root.handlers, logging.root.level = handlers, level
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


def run_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line as a user types it, in a process of its own."""
    command = [sys.executable, "-m", "stage_eval", "device.name=cpu", "device.threads=1", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


def evaluate(out: Path, sae: Path, store: Path, *more: str) -> dict[str, Any]:
    """The figures of one SAE, without the report unless `more` asks for it."""
    done = run(f"run_dir={out / 'run'}", f"out_dir={out}", f"sae={sae}", f"store.url={store}", "report=false", *more)
    assert done.returncode == 0, done.stderr
    return read_report(out)


def read_report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "eval.json").read_text())


@pytest.fixture(scope="module")
def sweep(world: World) -> dict[str, Any]:
    """All SAEs of one hook, evaluated together."""
    out = world.root / "sweep"
    done = run(f"run_dir={out}", f"sae={world.root / 'saes'}", f"store.url={world.store}")
    assert done.returncode == 0, done.stderr
    names = ("identity", "zero", "mean", "k=4,expansion=2")
    reports = {name: read_report(world.root / "saes" / name) for name in names}
    return {"out": out, "stdout": done.stdout, "stderr": done.stderr, **reports}


def test_identity_sae_changes_nothing(sweep: dict[str, Any]) -> None:
    report = sweep["identity"]
    assert report["fvu"] == pytest.approx(0, abs=1e-12)
    assert report["reconstruction"]["cosine"] == pytest.approx(1, abs=1e-12)
    assert report["downstream"]["ce_increase"] == pytest.approx(0, abs=1e-4)
    assert report["loss_recovered"] == pytest.approx(1, abs=1e-4)
    assert report["kl"] == pytest.approx(0, abs=1e-6)
    assert report["downstream"]["top1_agreement"] == 1


def test_zero_sae_is_zero_ablation(sweep: dict[str, Any]) -> None:
    report = sweep["zero"]
    assert report["ce_spliced"] == report["ce_zero"]
    assert report["loss_recovered"] == 0
    assert report["l0"] == 0
    assert report["dead_fraction"] == 1
    assert report["reconstruction"]["fvu_uncentred"] == pytest.approx(1, rel=1e-12)


def test_mean_sae_is_mean_ablation(sweep: dict[str, Any]) -> None:
    report = sweep["mean"]
    assert report["ce_spliced"] == pytest.approx(report["ce_mean"], rel=1e-6)
    assert report["downstream"]["loss_recovered_over_mean"] == pytest.approx(0, abs=1e-5)
    # The training mean is not the held-out mean, hence a little above 1.
    assert 1 <= report["fvu"] < 1.2


def brute_force(world: World, store_folder: Path, sae_folder: Path, *, splice_bos: bool = False) -> dict[str, float]:
    """Every headline figure by plain loops: one document (or context) at a time, numpy float64, no hooks of ours."""
    store, sae = Store.open(store_folder), SAE.from_pretrained(sae_folder)
    mode = store.plan.provenance["packing"]["mode"]
    folder = world.rope_model if mode == "separate" else world.model
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    heldout = store.contexts("heldout")
    mean = torch.from_numpy(store.statistics(HOOK).mean).float()
    rows, hats, fired = [], [], np.zeros(sae.config.d_latent, int)
    totals = dict.fromkeys(("clean", "spliced", "zero", "mean", "kl"), 0.0)
    predictions = 0
    for context in heldout:
        tokens, mask, segments = (read([context])[0] for read in (store.tokens, store.mask, store.segments))
        for position in np.flatnonzero(mask):
            x = store.read_context(HOOK, int(context))[position]
            latents = sae.encode(x[None])
            rows.append(x.double().numpy())
            hats.append(sae.decode(latents)[0].double().numpy())
            fired += latents.to_dense(sae.config.d_latent)[0].numpy() != 0
        parts = [np.flatnonzero(segments == s) for s in np.unique(segments[segments >= 0])]
        for part in [np.flatnonzero(segments >= 0)] if mode == "joined" else parts:
            ids = torch.from_numpy(tokens[part].astype(np.int64))[None]
            chosen = torch.ones(len(part), dtype=torch.bool) if splice_bos else torch.from_numpy(tokens[part] != BOS)
            logs = {}
            for name in ("clean", "spliced", "zero", "mean"):

                def edit(_m: Any, _a: Any, x: torch.Tensor, name: str = name, chosen: torch.Tensor = chosen) -> Any:
                    new = {"clean": x, "spliced": sae(x).x_hat, "zero": x * 0, "mean": mean.expand_as(x)}[name]
                    return torch.where(chosen[None, :, None], new, x)

                handle = model.model.layers[1].register_forward_hook(edit)
                with torch.no_grad():
                    logs[name] = F.log_softmax(model(ids).logits[0].double(), -1)
                handle.remove()
            for t in range(len(part) - 1):
                label = tokens[part[t + 1]]
                if label == BOS or segments[part[t]] != segments[part[t + 1]]:
                    continue
                predictions += 1
                for name, log in logs.items():
                    totals[name] -= float(log[t, label])
                totals["kl"] += float((logs["clean"][t].exp() * (logs["clean"][t] - logs["spliced"][t])).sum())
    x, x_hat = np.array(rows), np.array(hats)
    error, centred = (x - x_hat) ** 2, (x - x.mean(0)) ** 2
    norms = np.linalg.norm(x, axis=1), np.linalg.norm(x_hat, axis=1)
    ce = {name: total / predictions for name, total in totals.items()}
    return {
        "n_tokens": len(x),
        "fvu": error.sum() / centred.sum(),
        "fvu_per_dimension_mean": (error.sum(0) / centred.sum(0)).mean(),
        "fvu_uncentred": error.sum() / (x**2).sum(),
        "mse": error.mean(),
        "cosine": ((x * x_hat).sum(1) / norms[0] / norms[1]).mean(),
        "relative_norm": (norms[1] / norms[0]).mean(),
        "reconstruction_bias": (x_hat**2).sum() / (x * x_hat).sum(),
        "l0": fired.sum() / len(x),
        "dead_fraction": (fired == 0).mean(),
        "dense_fraction": (fired > 0.1 * len(x)).mean(),
        "ce_clean": ce["clean"],
        "ce_spliced": ce["spliced"],
        "ce_zero": ce["zero"],
        "ce_mean": ce["mean"],
        "loss_recovered": (ce["zero"] - ce["spliced"]) / (ce["zero"] - ce["clean"]),
        "kl": ce["kl"],
        "n_predictions": predictions,
    }


def flat(report: dict[str, Any]) -> dict[str, Any]:
    return {**report["latents"], **report["reconstruction"], **report["downstream"], **report}


@pytest.mark.parametrize(("mode", "splice_bos"), [("isolated", False), ("joined", True), ("separate", False)])
def test_every_figure_equals_a_plain_recomputation(world: World, tmp_path: Path, mode: str, splice_bos: bool) -> None:
    store = {"isolated": world.store, "joined": world.joined, "separate": world.separate}[mode]
    report = evaluate(tmp_path, world.random, store, f"splice_bos={str(splice_bos).lower()}", "batch_contexts=3")
    expected = brute_force(world, store, world.random, splice_bos=splice_bos)
    assert report["settings"]["documents"] == mode
    found = flat(report)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=2e-5)


@pytest.fixture(scope="module")
def alone(world: World) -> dict[str, Any]:
    """One rank."""
    return evaluate(world.root / "alone", world.random, world.store, "batch_contexts=1")


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_1_2_and_4_ranks_give_the_same_figures(
    stages: ForkServer, world: World, alone: dict[str, Any], tmp_path: Path, ranks: int
) -> None:
    """Real processes on gloo; four of them share four contexts, two of them two each."""
    settings = (
        f"run_dir={tmp_path / 'run'}",
        f"out_dir={tmp_path}",
        f"sae={world.random}",
        f"store.url={world.store}",
        "batch_contexts=1",
        "device.name=cpu",
        "device.threads=1",
    )
    for rank in stages.at(tmp_path).ranks(ranks, "stage_eval", *settings):
        assert rank.code == 0, rank.stderr
    report = read_report(tmp_path)
    for part in ("reconstruction", "downstream", "latents", "breakdown", "decoder", "activations"):
        compare_nested(report[part], alone[part])
    assert (report["environment"]["processes"], alone["environment"]["processes"]) == (ranks, 1)


def compare_nested(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            compare_nested(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            compare_nested(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    else:
        assert found == expected


def test_a_sweep_is_compared(world: World, sweep: dict[str, Any]) -> None:
    comparison = json.loads((sweep["out"] / "comparison.json").read_text())
    assert {row["name"] for row in comparison["rows"]} == {"identity", "zero", "mean", "k=4,expansion=2"}
    assert (sweep["out"] / "comparison.html").is_file()
    for row in comparison["rows"]:
        folder = Path(row["path"])
        assert row["fvu"] == read_report(folder)["fvu"]
        assert (folder / "report.html").is_file()
        assert list((folder / "plots").glob("*.png"))
    assert "k=4,expansion=2" in sweep["stdout"]
    assert "comparison.html" in sweep["stderr"]


def test_what_a_report_records(world: World, sweep: dict[str, Any]) -> None:
    report = sweep["k=4,expansion=2"]
    for name in ("fvu", "l0", "dead_fraction", "ce_clean", "ce_spliced", "ce_zero", "ce_mean", "loss_recovered", "kl"):
        assert isinstance(report[name], float)
    assert isinstance(report["n_tokens"], int)
    store = Store.open(world.store)
    assert report["provenance"]["store"]["digest"] == store.digest()
    assert report["provenance"]["corpus"]["fingerprint"] == "f" * 64
    assert len(report["provenance"]["sae"]["sha256"]) == 64
    low, high = report["downstream"]["confidence95"]["loss_recovered"]
    assert low < report["loss_recovered"] < high
    bos = report["reconstruction"]["with_bos"]
    assert bos["n_bos"] == int((store.tokens(store.contexts("heldout")) == BOS).sum())
    assert bos["n_tokens"] == report["n_tokens"] + bos["n_bos"]


def test_latents_are_counted_one_by_one(world: World, sweep: dict[str, Any]) -> None:
    figures = load_file(world.random / "latents.safetensors")
    store, sae = Store.open(world.store), SAE.from_pretrained(world.random)
    heldout = store.contexts("heldout")
    x = torch.cat([store.read_context(HOOK, int(context)) for context in heldout])[store.mask(heldout).reshape(-1)]
    dense = sae.encode(x).to_dense(sae.config.d_latent)
    assert torch.equal(figures["firings"], (dense != 0).sum(0))
    torch.testing.assert_close(figures["max_activation"], dense.max(0).values)
    torch.testing.assert_close(figures["mean_activation"], dense.sum(0) / (dense != 0).sum(0).clamp_min(1))


def test_breakdowns_add_up(sweep: dict[str, Any]) -> None:
    report = sweep["k=4,expansion=2"]
    for groups in report["breakdown"].values():
        assert sum(groups["tokens"]) == report["n_tokens"]
        assert sum(groups["predictions"]) == report["downstream"]["n_predictions"]
        increase = sum(
            count * value for count, value in zip(groups["predictions"], groups["ce_increase"], strict=True) if count
        )
        mean = increase / report["downstream"]["n_predictions"]
        assert mean == pytest.approx(report["downstream"]["ce_increase"], rel=1e-9)
    # BOS stands at position 0 and is never evaluated; it predicts, though.
    assert report["breakdown"]["position"]["tokens"][0] == 0
    assert report["breakdown"]["position"]["predictions"][0] > 0


def test_without_the_language_model(world: World, tmp_path: Path, sweep: dict[str, Any]) -> None:
    report = evaluate(tmp_path, world.random, world.store, "downstream=false", "model=/not/here", "report=true")
    assert report["ce_clean"] is None
    assert report["fvu"] == pytest.approx(sweep["k=4,expansion=2"]["fvu"], rel=1e-12)
    assert "Next-token loss" not in (tmp_path / "report.html").read_text()


def test_two_hooks_spliced_at_once(world: World, tmp_path: Path) -> None:
    saes = f"[{world.lower},{world.identity}]"
    done = run(f"run_dir={tmp_path}", f"sae={saes}", f"store.url={world.store}", "joint=true")
    assert done.returncode == 0, done.stderr
    joint = json.loads((tmp_path / "comparison.json").read_text())["joint"]
    lower = read_report(world.lower)
    # The upper SAE is the identity, so splicing both is splicing the lower one; the ablations are not.
    assert joint["ce_spliced"] == pytest.approx(lower["ce_spliced"], rel=1e-6)
    assert joint["ce_zero"] != pytest.approx(lower["ce_zero"], rel=1e-3)


def test_settings_narrow_the_evaluation(world: World, tmp_path: Path) -> None:
    report = evaluate(tmp_path, world.random, world.store, "split=train", "contexts=3")
    assert report["settings"]["split"] == "train"
    assert report["reconstruction"]["n_contexts"] == 3


def fails(*arguments: str) -> str:
    done = run(*arguments)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert done.stdout == ""
    return lines[0]


@pytest.mark.slow
def test_a_wrong_input_is_one_line_in_a_process_of_its_own(world: World, tmp_path: Path) -> None:
    done = run_process(f"run_dir={tmp_path}", "sae=/not/here", f"store.url={world.store}")
    assert done.returncode == 2
    # Libraries may complain while they are imported; of ours there is one line.
    assert done.stderr.endswith("error: there is no SAE folder /not/here: train one, or give a hub id owner/name\n")
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def bad(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Inputs that do not fit."""
    root = tmp_path_factory.mktemp("bad")
    (root / "empty").mkdir()
    write_saelens(root / "saelens")
    return {
        "empty": root / "empty",
        "saelens": root / "saelens",
        "hook": save_sae(root / "hook", plain_sae(8, 2), "layers.2.resid_post"),
        "width": save_sae(root / "width", plain_sae(8, 2, d_model=8)),
        "model": make_model(root / "model", seed=9),
        "nothing held out": make_store(root / "store", world.model, "isolated", heldout=0.0),
        "other": save_sae(
            root / "other", plain_sae(8, 2), model={"id": "another", "config_hash": "0" * 64, "weights_hash": "1" * 64}
        ),
    }


WRONG: Sequence[tuple[str, Sequence[str], str]] = (
    ("missing SAE", ["sae=/not/here"], "there is no SAE folder /not/here"),
    ("folder without SAE", ["sae={empty}"], "no SAE in"),
    ("another project's format", ["sae={saelens}"], "is an SAE in the saelens format: convert it first, python -m"),
    ("glob without match", ["sae={empty}/*"], "no SAE folder matches"),
    ("hook not in the store", ["sae={hook}"], "has no hook layers.2.resid_post"),
    ("width", ["sae={width}"], "reads activations of width 8, but layers.1.resid_post has 16"),
    ("another model", ["sae={random}", "model={model}"], "weights differ; model.allow_other=true"),
    ("SAE of another model", ["sae={other}"], "belongs to model another"),
    ("missing model", ["sae={random}", "model=/not/here"], "no model folder at /not/here"),
    ("nothing held out", ["sae={random}", "store.url={nothing held out}"], "holds nothing out"),
    ("missing store", ["sae={random}", "store.url=/not/here"], "no activation store at /not/here"),
    ("joint of one", ["sae={random}", "joint=true"], "joint=true needs SAEs of two or more hooks"),
    ("unknown key", ["sae={random}", "splice_boss=true"], "unknown configuration key 'splice_boss'"),
)


@pytest.mark.parametrize(("arguments", "message"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_a_wrong_input_is_one_line(
    world: World, bad: dict[str, Path], tmp_path: Path, arguments: Sequence[str], message: str
) -> None:
    paths = {**bad, "random": world.random}
    filled = [argument.format(**paths) for argument in arguments]
    if not any(argument.startswith("store.url") for argument in filled):
        filled.append(f"store.url={world.store}")
    assert message in fails(f"run_dir={tmp_path}", *filled)


def test_another_model_may_be_allowed(
    world: World, bad: dict[str, Path], tmp_path: Path, sweep: dict[str, Any]
) -> None:
    report = evaluate(tmp_path, world.random, world.store, f"model={bad['model']}", "model.allow_other=true")
    assert report["ce_clean"] != pytest.approx(sweep["k=4,expansion=2"]["ce_clean"], rel=1e-3)
    assert report["fvu"] == pytest.approx(sweep["k=4,expansion=2"]["fvu"], rel=1e-12)
