"""Faults that other projects' trainers shipped, each by name, where no other test has it for its subject.

Elsewhere: AuxK's sign, its b_dec, its missing detach, its gradient and Multi-TopK's for the encoder (test_sae_losses);
gradients through picks that ReLU zeroed (kernels/test_autograd); a slot with activation 0 that counts as fired
(test_sae_dead); a geometric median that is the mean, or in bfloat16 (test_sae_model); clipping by a norm that is not
the joint one (test_sae_optim); schedules that ignore their floor (test_train_schedule); warm-ups of zero steps and a k
schedule that nothing calls (test_train_choices); a resume that begins the data anew (test_train_run); losses that
depend on the micro-batch, reductions per micro-batch, dead counts of one rank (distributed).
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from shared.kernels import linear
from shared.parallel import World
from shared.sae import SAE
from shared.sae.learn.objective import Objective
from shared.sae.optim import AdamConfig, make_optimiser
from shared.store import Store
from stage_train import config
from stage_train.job import Job
from stage_train.state.identity import YOUNGER, identity
from tests.composing import composed
from tests.learning import LearningSAE

pytestmark = pytest.mark.usefixtures("train_configs")

WORLD = World(0, 1, 0, torch.device("cpu"))
SMALL = ["sae.k=3", "sae.expansion=8", "stream.batch_size=16", "stream.lanes=4", "schedule.tokens=160"]
SMALL += ["logger.progress=false", "logger.curves=false", "logger.every=5", "checkpoint.every=0"]
SMALL += ["sae.dead_after_tokens=20", "optim.lr=3e-3"]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory, planted_store: Callable[..., Store]) -> Callable[..., Path]:
    """Train with overrides; returns the output folder. The same overrides are trained once."""
    folder = tmp_path_factory.mktemp("faults")
    planted_store(folder / "store")
    done: dict[tuple[str, ...], Path] = {}

    def run(*overrides: str) -> Path:
        if overrides not in done:
            out = done[overrides] = folder / str(len(done))
            paths = [f"out_dir={out}", f"store.url={folder / 'store'}"]
            cfg: Any = OmegaConf.to_object(composed("train", [*SMALL, *paths, *overrides]))
            Job([cfg], WORLD).execute()
        return done[overrides]

    return run


def settings() -> dict[str, Any]:
    """Every key that may fix a run's result, with its default."""
    config.register()
    if GlobalHydra.instance().is_initialized():
        plain = OmegaConf.to_container(compose("train"), resolve=False, enum_to_str=True)
    else:
        with initialize_config_module("conf", version_base="1.3"):
            plain = OmegaConf.to_container(compose("train"), resolve=False, enum_to_str=True)
    assert isinstance(plain, dict)
    return identity({str(key): value for key, value in plain.items()})


RELU, JUMPRELU = ["sae=relu", "sae.k=null", "schedule.penalty_warmup=0"], ["sae=jumprelu", "sae.k=null"]
JUMPRELU += ["sae.threshold_init=0.5"]
LONG = ["schedule.tokens=640"]  # two looks at which latents are dead
FALLING = ["schedule.k_start=12", "schedule.k_warmup=0.8"]
# key: a value (or what sets one), and the settings under which it is of consequence.
OTHER: dict[str, tuple[str, list[str]]] = {
    "seed": ("1", []),
    "store.weight": ("0.5", []),
    "sae.k": ("4", []),
    "sae.expansion": ("6", []),
    "sae.d_latent": ("80", []),
    "sae.activation": ("batchtopk", []),
    "sae.prefixes": ("[0.5,1.0]", []),
    "sae.normalisation": ("scale", []),
    "sae.shift_back": ("false", ["sae.normalisation=layer_norm"]),
    "sae.pre_bias": ("false", []),
    "sae.unit_norm_decoder": ("false", []),
    "sae.loss": ("fvu_per_dim", []),
    "sae.auxk_alpha": ("0", LONG),
    "sae.auxk_k": ("1", LONG),
    "sae.auxk_slope": ("0.5", [*LONG, "sae.auxk_k=1000"]),
    "sae.multi_topk_weight": ("0.125", []),
    "sae.multi_topk_factor": ("2", ["sae.multi_topk_weight=0.125"]),
    "sae.penalty": ("tanh", RELU),
    "sae.penalty_weight": ("0.1", RELU),
    "sae.tanh_scale": ("1.0", [*RELU, "sae.penalty=tanh"]),
    "sae.frequency_scale": ("1.0", [*RELU, "sae.penalty=tanh_quad"]),
    "sae.bandwidth": ("0.5", JUMPRELU),
    "sae.threshold_init": ("1.0", JUMPRELU),
    "sae.preact_weight": ("0.5", [*JUMPRELU, *LONG]),
    "sae.threshold_decay": ("0.5", ["sae=batchtopk"]),
    "sae.dead_after_tokens": ("1000", LONG),
    "sae.bias_init": ("geometric_median", []),
    "sae.encoder_init": ("transpose", []),
    "sae.init_subspace": ("4", []),
    "optim.kind": ("optim=signum", []),
    "optim.lr": ("1e-3", []),
    "optim.decoder_factor": ("2", []),
    "optim.bias_factor": ("2", []),
    "optim.beta1": ("0.5", []),
    "optim.beta2": ("0.9", []),
    "optim.eps": ("1e-2", []),
    "optim.momentum": ("0.5", ["optim=muon", "optim.lr=3e-3"]),
    "optim.moments": ("bfloat16", []),
    "optim.clip_norm": ("1e-3", []),
    "optim.ema_decay": ("0.5", ["optim.ema_decay=0.1", "optim.ema_export=true"]),
    "optim.ema_export": ("true", ["optim.ema_decay=0.5"]),
    "optim.spike_factor": ("1.001", ["schedule.tokens=960"]),
    "compute.dtype": ("bfloat16", RELU),
    "schedule.tokens": ("320", []),
    "schedule.epochs": ("0.7", ["schedule.tokens=null", "schedule.epochs=0.4"]),
    "schedule.warmup": ("0.5", []),
    "schedule.decay": ("0.5", []),
    "schedule.shape": ("linear", ["schedule.decay=1.0"]),
    "schedule.final": ("0.5", []),
    "schedule.k_start": ("12", []),
    "schedule.k_cold": ("5", FALLING),
    "schedule.k_warmup": ("0.4", FALLING),
    "schedule.k_shape": ("exponential", FALLING),
    "schedule.penalty_warmup": ("1.0", [*RELU, "schedule.penalty_warmup=0"]),
    "stream.batch_size": ("8", []),
    "stream.seed": ("7", []),
    "stream.lanes": ("2", []),
    "stream.mix_contexts": ("1", []),
    "stream.drop_last": ("true", ["schedule.tokens=480"]),
    "stream.max_norm_multiple": ("1.5", []),
}
# Dead in another project, or here once; the rest is under the slow marker.
ALWAYS = {"sae.multi_topk_weight", "sae.auxk_alpha", "schedule.k_start", "schedule.k_shape", "compute.dtype"}
# hook: a store with several (test_train_run).
ELSEWHERE = {"hook"}


def test_every_setting_is_tried() -> None:
    assert (found := settings().keys()) - ELSEWHERE == OTHER.keys() - (YOUNGER.keys() - found)


@pytest.mark.parametrize("key", [pytest.param(key, marks=[] if key in ALWAYS else [pytest.mark.slow]) for key in OTHER])
def test_dead_switches(train: Callable[..., Path], key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read by nothing were OpenSAE's --multi_topk and --k_scheduler, SAE Made Easy's --aux_alpha, and others."""
    monkeypatch.setattr(linear, "FAST_BFLOAT16", True)  # else a processor may take float32 for bfloat16
    value, others = OTHER[key]
    before, after = train(*others), train(*others, value if "=" in value else f"{key}={value}")
    first, second = (SAE.from_pretrained(folder).state_dict() for folder in (before, after))
    same = all(first[name].shape == second[name].shape and torch.equal(first[name], second[name]) for name in first)
    assert not same, f"{key}={value} changes nothing"


def test_micro_batches_that_cut_nothing(train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """sparsify's micro_acc_steps scales the loss and leaves the batch whole."""
    rows, losses = [], Objective.losses

    def counting(self: Objective, x: torch.Tensor, *args: Any) -> Any:
        rows.append(len(x))
        return losses(self, x, *args)

    monkeypatch.setattr(Objective, "losses", counting)
    train("optim.micro_batch=5")
    assert max(rows) <= 5


def test_default_settings_that_crash(tmp_path: Path, planted_store: Callable[..., Store]) -> None:
    """OpenSAE: a linear schedule without a warm-up, and the spike guard's first look at past losses."""
    planted_store(tmp_path / "store")
    where = [f"store.url={tmp_path / 'store'}", f"out_dir={tmp_path / 'sae'}", "schedule.tokens=3_000"]
    guarded = ["optim.spike_factor=1.05", "stream.batch_size=64", "checkpoint.resume=never", "logger.curves=false"]
    for more in ([], guarded):
        cfg: Any = OmegaConf.to_object(composed("train", [*where, *more]))
        Job([cfg], WORLD).execute()
        assert SAE.from_pretrained(tmp_path / "sae").config.k == 32


def test_periodic_checkpoints_that_are_not_written(train: Callable[..., Path]) -> None:
    """Language-Model-SAEs compares steps with tokens, and saves one of four."""
    out = train("checkpoint.every=3", "checkpoint.keep=100")
    steps = sorted(int(path.name.removeprefix("step-")) for path in (out / "checkpoints").glob("step-*"))
    assert steps[:-1] == list(range(3, steps[-1], 3))
    assert len(steps) >= 4


def test_saved_rows_one_update_away_from_unit_norm(train: Callable[..., Path]) -> None:
    """OpenSAE divides the decoder's rows by their norm before each forward, and saves after the update."""
    norms = SAE.from_pretrained(train()).W_dec.detach().double().norm(dim=1)
    assert float((norms - 1).abs().max()) < 1e-6


def make_sae(activation: str, **fields: Any) -> LearningSAE:
    fields = {"d_model": 6, "d_latent": 64, "activation": activation, "normalisation": "none", **fields}
    sae = LearningSAE(generator=torch.Generator().manual_seed(0), **fields)
    if activation == "batchtopk":
        assert isinstance(sae.activation.threshold, torch.Tensor)
        sae.activation.threshold.fill_(0.1)
    return sae


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "relu", "jumprelu", "gated"])
def test_a_token_without_positive_latents_selects_all(activation: str) -> None:
    """OpenSAE's JumpReLU lowers the threshold below that token's largest, and the batch gets all F features."""
    sae = make_sae(activation, k=4 if "topk" in activation else None)
    with torch.no_grad():
        sae.b_enc.fill_(-1.0)
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(1)) * 3
    x[4] = sae.b_dec.detach()
    latents = sae.encode(x)
    assert int((latents.indices[4] >= 0).sum()) == 0
    assert latents.indices.shape[1] < 32
    losses = sae.losses(x)
    losses.total.backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in sae.parameters())


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_multi_topk_picks_that_count_as_fired(activation: str) -> None:
    """multimodal-sae hands its 4k picks to the dead counter and to whoever reads the features."""
    plain, multi = make_sae(activation, k=2), make_sae(activation, k=2, multi_topk_weight=0.125)
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(1))
    one, other = plain.losses(x), multi.losses(x)
    assert other.metrics["multi_topk"] > 0
    assert torch.equal(one.fired, other.fired)
    assert float(one.metrics["l0"]) == float(other.metrics["l0"]) == 2


def test_thresholds_that_stop_learning_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """SAELens kept thresholds in bfloat16, whose steps are larger than the updates: only products may be rounded."""
    monkeypatch.setattr(linear, "FAST_BFLOAT16", True)
    moved = {}
    for dtype in ("float32", "bfloat16"):
        sae = make_sae("jumprelu", penalty="l0", penalty_weight=0.05, threshold_init=0.5)
        sae.compute_dtype = dtype
        optimiser = make_optimiser(sae, AdamConfig(lr=1e-4))
        for step in range(40):
            sae.losses(torch.randn(64, 6, generator=torch.Generator().manual_seed(step))).total.backward()
            optimiser.step()
        assert {parameter.dtype for parameter in sae.parameters()} == {torch.float32}
        moved[dtype] = sae.activation.log_threshold.detach() - math.log(0.5)
    assert float(moved["float32"].norm()) > 1e-3
    difference = moved["bfloat16"] - moved["float32"]
    assert 0 < float(difference.norm()) < 0.1 * float(moved["float32"].norm())
