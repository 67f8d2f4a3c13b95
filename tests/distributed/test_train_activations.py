"""Every activation under every layout, in micro-batches or whole: ten steps give the weights of one process."""

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest

from shared.basics.metrics_file import read_metrics
from shared.sae import SAE
from shared.store import Store
from tests.cli import ForkServer
from tests.closeness import REORDERED, SAME_RUN, assert_close_in_norm, difference_in_norm
from tests.distributed.test_train_ranks import FIXED
from tests.ranks import Runs

TEN_STEPS = ["schedule.tokens=210", "logger.every=3", "optim.lr=3e-3"]
ACTIVATIONS = {
    "topk": ["sae.multi_topk_weight=0.125", "optim.clip_norm=0.05"],
    "batchtopk": ["sae=batchtopk"],
    "multi": ["sae=batchtopk", "sae.multi_topk_weight=0.125", "schedule.k_start=9", "schedule.k_warmup=0.5"],
    "matryoshka": ["sae=matryoshka"],
    "matryoshka_topk": ["sae=matryoshka", "sae.activation=topk", "optim.clip_norm=0.05"],
    "relu": ["sae=relu", "sae.k=null", "sae.penalty=tanh_quad", "sae.penalty_weight=0.01"],
    # Long enough for a second look at dead latents, of which high thresholds make some.
    "jumprelu": [
        "sae=jumprelu",
        "sae.k=null",
        "sae.preact_weight=0.01",
        "sae.threshold_init=1.0",
        "schedule.tokens=420",
    ],
    "gated": ["sae=gated", "sae.k=null"],
    "gated_clipped": ["sae=gated", "sae.k=null", "optim.clip_norm=0.05", "sae.unit_norm_decoder=false"],
}
OPTIMISERS = {
    "muon": ["optim=muon", "optim.ema_decay=0.9", "optim.ema_export=true"],
    "signum": ["optim=signum", "optim.lr=1e-3", "schedule.k_start=9", "optim.ema_decay=0.9", "optim.ema_export=true"],
}
LAYOUTS = {
    "ddp": [],
    "ddp_micro": ["optim.micro_batch=4"],
    "fsdp": ["parallel=fsdp"],
    "fsdp_micro": ["parallel=fsdp", "optim.micro_batch=4"],
    "latent": ["parallel=latent"],
    "latent_micro": ["parallel=latent", "optim.micro_batch=4"],
}
# One start of two processes runs these; the others are under the slow marker.
COMMON = [(name, "latent") for name in ("batchtopk", "multi", "matryoshka", "jumprelu", "topk", "muon")]
COMMON += [("batchtopk", "ddp"), ("batchtopk", "fsdp"), ("batchtopk", "ddp_micro"), ("relu", "ddp_micro")]
COMMON += [("gated", "fsdp_micro"), ("relu", "latent_micro"), ("signum", "ddp")]
MICRO = ("topk", "batchtopk", "multi", "relu")
if importlib.util.find_spec("bitsandbytes") is not None:
    OPTIMISERS["adam8bit"] = ["optim=adam8bit", "sae.d_latent=256"]
    COMMON.append(("adam8bit", "fsdp"))
RARE = [(name, layout) for name in ACTIVATIONS for layout in LAYOUTS if (name, layout) not in COMMON]
RARE += [(name, layout) for name in OPTIMISERS for layout in LAYOUTS if (name, layout) not in COMMON]
CHOICES = {**ACTIVATIONS, **OPTIMISERS}
ALIKE = ("ddp", "fsdp", "latent")
# Runs whose large messages are counted, and how many there are: none of the weights' size under latent.
COUNTED = {
    ("relu", "ddp_micro"): 10,
    ("batchtopk", "ddp_micro"): 10,
    ("gated", "fsdp_micro"): 10,
    ("topk", "latent"): 0,
}
# Runs that go from one process to two, and back, with the layout of the two.
TO_TWO = {"jumprelu": "latent", "muon": "latent"}
TO_TWO |= {"adam8bit": "fsdp"} if "adam8bit" in OPTIMISERS else {}
FROM_TWO = {"batchtopk": "latent", "gated": "fsdp"}


@pytest.fixture(scope="module")
def runs(stages: ForkServer, tmp_path_factory: pytest.TempPathFactory, planted_store: Callable[..., Store]) -> Runs:
    """Each activation in one process, whole and in micro-batches; then all COMMON runs, with one start of two."""
    runs = Runs(stages, tmp_path_factory.mktemp("activations"), *FIXED)
    planted_store(runs.folder / "store")
    runs.alone(*(runs.job(name, *TEN_STEPS, *choice) for name, choice in CHOICES.items()))
    runs.alone(*(runs.job(f"{name}_micro", *TEN_STEPS, *ACTIVATIONS[name], "optim.micro_batch=4") for name in MICRO))
    guard = [*TEN_STEPS, "optim.spike_factor=3"]
    runs.alone(runs.job("guarded", *guard, job="poisoned", step=7), runs.job("unharmed", *guard))
    runs.alone(runs.job("guarded_batchtopk", *guard, *ACTIVATIONS["batchtopk"], job="poisoned", step=7))
    runs.alone(*(moved(runs, name, job="signalled", step=5) for name in TO_TWO))
    runs.together(
        2,
        *jobs(runs, COMMON),
        *guarded(runs, guard),
        runs.job("guarded_batchtopk_2", *guard, *ACTIVATIONS["batchtopk"], job="poisoned", step=7),
        {"job": "tied_picks", "name": "ties", "k": 3},
        *(moved(runs, name, *LAYOUTS[layout]) for name, layout in TO_TWO.items()),
        *(moved(runs, name, *LAYOUTS[layout], job="signalled", step=1) for name, layout in FROM_TWO.items()),
    )
    assert {name: runs.ends[f"{name}_moved"] for name in FROM_TWO} == {name: {"stopped"} for name in FROM_TWO}
    runs.alone(*(moved(runs, name) for name in FROM_TWO))
    return runs


def moved(runs: Runs, name: str, *overrides: str, **fault: Any) -> dict[str, Any]:
    """A run that stops under one layout and continues under another."""
    return runs.job(f"{name}_moved", *TEN_STEPS, *CHOICES[name], *overrides, **fault)


def guarded(runs: Runs, overrides: list[str]) -> list[dict[str, Any]]:
    """Runs whose last rank alone sees NaN in step 7."""
    return [
        runs.job(f"guarded_{layout}_2", *overrides, *LAYOUTS[layout], job="poisoned", step=7)
        for layout in ("ddp", "fsdp", "latent")
    ]


def jobs(runs: Runs, pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Those whose messages are counted, or whose tensors must be alike on all ranks, tell of that."""
    made = []
    for name, layout in pairs:
        job: dict[str, Any] = {}
        if (name, layout) in COUNTED:
            job = {"job": "counted", "least": 2 * 96 * 12}
        elif name == "batchtopk" and layout in ALIKE:
            job = {"job": "digested"}
        made.append(runs.job(f"{name}_{layout}_2", *TEN_STEPS, *CHOICES[name], *LAYOUTS[layout], **job))
    return made


def assert_equal_runs(runs: Runs, one: str, two: str) -> None:
    """Weights in norm, every metric of every logged step to 1e-5 and dead counts exactly."""
    assert_equal_weights(runs, one, two)
    lines = list(zip(read_metrics(runs.folder / one), read_metrics(runs.folder / two), strict=True))
    assert len(lines) >= 4
    for before, after in lines:
        assert before.keys() == after.keys()
        for name in before.keys() - {"tokens_per_s", "wait_share"}:
            assert after[name] == pytest.approx(before[name], rel=1e-5, abs=1e-7), name


def assert_equal_weights(runs: Runs, one: str, two: str) -> None:
    (end,) = runs.ends[two]
    assert end.split(",")[0] == "done", end
    first, second = (SAE.from_pretrained(runs.folder / name).state_dict() for name in (one, two))
    for name, tensor in first.items():
        assert_close_in_norm(second[name], tensor, SAME_RUN, f"{name} after the same batches, {REORDERED}")


@pytest.mark.parametrize(("name", "layout"), COMMON)
def test_two_processes_equal_one(runs: Runs, name: str, layout: str) -> None:
    assert_equal_runs(runs, name, f"{name}_{layout}_2")


@pytest.mark.parametrize("name", MICRO)
def test_micro_batches_change_nothing(runs: Runs, name: str) -> None:
    assert_equal_runs(runs, name, f"{name}_micro")


def test_the_runs_did_what_they_are_to_show(runs: Runs) -> None:
    assert all(line["l0"] == pytest.approx(3, rel=0.01) for line in read_metrics(runs.folder / "batchtopk"))
    assert all(line["l0"] <= 3 and line["multi_topk"] > 0 for line in read_metrics(runs.folder / "topk"))
    for name in ("topk", "matryoshka_topk", "gated_clipped"):  # the clip takes part, so a local norm would show
        assert all(line["grad_norm"] > 0.05 for line in read_metrics(runs.folder / name))
    assert read_metrics(runs.folder / "multi")[0]["l0"] > 6  # k comes down from 9
    assert any(line["auxk"] > 0 and line["dead_fraction"] > 0 for line in read_metrics(runs.folder / "jumprelu"))
    assert any(line["penalty"] > 0 for line in read_metrics(runs.folder / "gated"))
    threshold = float(SAE.from_pretrained(runs.folder / "batchtopk").activation.threshold)
    assert threshold > 0


@pytest.mark.parametrize("name", [*TO_TWO, *FROM_TWO])
def test_resume_under_another_layout(runs: Runs, name: str) -> None:
    """The stops, after step 5 or 8, fall between two lines of the metrics."""
    assert_equal_runs(runs, name, f"{name}_moved")


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "latent"])
def test_a_nan_on_one_rank_is_left_out_by_all(runs: Runs, layout: str) -> None:
    """The guarded run goes on as one process does, without the step's update, statistics and dead counts."""
    assert_equal_runs(runs, "guarded", f"guarded_{layout}_2")
    assert read_metrics(runs.folder / "guarded")[-1]["refused_steps"] == 1
    assert read_metrics(runs.folder / "unharmed")[-1]["refused_steps"] == 0


def test_one_step_left_out_would_be_found(runs: Runs) -> None:
    """The bound of these comparisons is far below what a real difference makes."""
    first, second = (SAE.from_pretrained(runs.folder / name).state_dict() for name in ("guarded", "unharmed"))
    assert max(difference_in_norm(second[name], tensor) for name, tensor in first.items()) > 100 * SAME_RUN


def test_a_nan_on_one_rank_that_all_must_survey(runs: Runs) -> None:
    """BatchTopK's least value is searched by all ranks together, NaN or not."""
    assert_equal_runs(runs, "guarded_batchtopk", "guarded_batchtopk_2")
    assert read_metrics(runs.folder / "guarded_batchtopk_2")[-1]["refused_steps"] == 1


@pytest.mark.parametrize(("name", "layout"), COUNTED)
def test_gradients_meet_once_per_step_whatever_the_micro_batches(runs: Runs, name: str, layout: str) -> None:
    """Ten steps of three micro-batches each: ten messages that hold both matrices."""
    assert runs.ends[f"{name}_{layout}_2"] == {f"done, {COUNTED[name, layout]} messages"}


@pytest.mark.parametrize("layout", ALIKE)
def test_replicas_do_not_drift_apart(runs: Runs, layout: str) -> None:
    """What every rank holds alike is so to the last bit (MoLT of Language-Model-SAEs diverges silently)."""
    (end,) = runs.ends[f"batchtopk_{layout}_2"]
    assert "activation.threshold" in end
    assert ("W_dec" in end) == (layout == "ddp")


def test_exactly_k_global_picks_where_all_tie(runs: Runs) -> None:
    """Language-Model-SAEs searches a threshold, and keeps all that tie with it."""
    assert runs.ends["ties"] == {"3 picks, as one process: True"}


@pytest.mark.slow
def test_every_pair_on_two_processes(runs: Runs) -> None:
    runs.together(2, *jobs(runs, RARE))
    for name, layout in RARE:
        assert_equal_runs(runs, name, f"{name}_{layout}_2")


@pytest.mark.slow
def test_four_processes_and_a_mesh(runs: Runs) -> None:
    """Latents in two parts, each twice; FSDP and DDP on four."""
    layouts = {"mesh": ["parallel=latent", "parallel.latent=2"], "ddp": [], "fsdp": ["parallel=fsdp"]}
    made = [
        runs.job(f"{name}_{layout}_4", *TEN_STEPS, *choice, *overrides)
        for name, choice in CHOICES.items()
        for layout, overrides in layouts.items()
    ]
    half = [*TEN_STEPS, *CHOICES["relu"], *layouts["mesh"], "optim.micro_batch=4"]
    runs.together(4, *made, runs.job("counted_mesh", *half, job="counted", least=2 * 48 * 12))
    assert runs.ends["counted_mesh"] == {"done, 10 messages"}
    for name in CHOICES:
        for layout in layouts:
            assert_equal_runs(runs, name, f"{name}_{layout}_4")
