"""Every activation and option of training in a real run: it stops and continues exactly, and refuses what is wrong."""

import importlib.util
import math
from collections.abc import Callable

import pytest
import torch

from shared.basics.errors import GranaryError
from shared.basics.metrics_file import read_metrics
from shared.sae import SAE
from shared.store import Store
from tests.training import Runs

pytestmark = pytest.mark.usefixtures("train_configs")

CHOICES = {
    "batchtopk": ["sae=batchtopk"],
    "matryoshka": ["sae=matryoshka", "sae.activation=topk"],
    "relu": ["sae=relu", "sae.k=null"],
    "jumprelu": ["sae=jumprelu", "sae.k=null", "sae.preact_weight=0.01"],
    "gated": ["sae=gated", "sae.k=null"],
    "raw_target": ["sae.normalisation=layer_norm", "sae.shift_back=false"],
    "muon": ["optim=muon", "optim.lr=1e-2", "optim.ema_decay=0.9"],
    "signum": ["optim=signum", "optim.ema_decay=0.9", "optim.ema_export=true", "optim.spike_factor=2"],
    "half": ["optim.moments=bfloat16", "schedule.k_start=20", "schedule.k_warmup=0.5", "schedule.k_cold=2"],
}
if importlib.util.find_spec("bitsandbytes") is not None:
    CHOICES["adam8bit"] = ["optim=adam8bit", "sae.d_latent=256", "optim.lr=5e-3"]  # by_width asks more of 21 steps


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory, planted_store: Callable[..., Store]) -> Runs:
    folder = tmp_path_factory.mktemp("choices")
    planted_store(folder / "store")
    return Runs(folder, "schedule.tokens=320")


# By default one of each kind: a batch's own threshold, a penalty, an optimiser, moments that round. Others are trained
# on two ranks and resumed in tests/distributed.
RESUMED = ("batchtopk", "gated", "muon", "half")


@pytest.mark.parametrize(
    "choice", [pytest.param(name, marks=() if name in RESUMED else pytest.mark.slow) for name in CHOICES]
)
def test_a_stopped_run_continues_to_the_same_bits(train: Runs, choice: str) -> None:
    straight = train(f"{choice}_straight", *CHOICES[choice])
    train.killed(f"{choice}_stopped", *CHOICES[choice], "checkpoint.every=8", step=9)
    stopped = train(f"{choice}_stopped", *CHOICES[choice], "checkpoint.every=8")
    first, second = (SAE.from_pretrained(folder) for folder in (straight, stopped))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    lines = read_metrics(straight)
    assert lines[-1]["fvu"] < lines[0]["fvu"]


def test_the_average_is_exported_where_it_is_asked_for(train: Runs) -> None:
    last = SAE.from_pretrained(train("last", "optim.ema_decay=0.9"))
    average = SAE.from_pretrained(train("average", "optim.ema_decay=0.9", "optim.ema_export=true"))
    assert torch.equal(last.W_enc, SAE.from_pretrained(train("plain")).W_enc)
    distance = float(((average.W_enc - last.W_enc).norm() / last.W_enc.norm()).detach())
    assert 1e-4 < distance < 0.5
    norms = average.W_dec.detach().norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_k_comes_down_to_its_end(train: Runs) -> None:
    out = train("cold", "sae=batchtopk", "schedule.k_start=12", "schedule.k_cold=5", "schedule.k_warmup=5")
    l0 = [line["l0"] for line in read_metrics(out)]
    # Steps 6 to 10 fall from 12 by 9/5 a step, rounded up.
    assert l0[:4] == pytest.approx([12, (12 + 11 + 9 + 7 + 5) / 5, 3, 3], rel=0.01)


def test_whole_numbers_for_rates(train: Runs) -> None:
    """A number or a name: 1 is as good as 1.0."""
    runs = [train(f"lr {one}", f"optim.lr={one}", f"optim.bias_factor={one}") for one in ("1", "1.0")]
    whole, decimal = (SAE.from_pretrained(run).state_dict() for run in runs)
    assert all(torch.equal(tensor, decimal[name]) for name, tensor in whole.items())


def test_lr_auto(train: Runs) -> None:
    out = train("auto", "optim.lr=auto", "sae.d_latent=64", "schedule.warmup=0", "schedule.decay=0")
    assert {line["lr"] for line in read_metrics(out)} == {2e-4 / (64 / 2**14) ** 0.5}


@pytest.mark.parametrize(
    ("name", "decay", "shape"),
    [
        ("constant", 0.0, lambda progress: 1.0),
        ("linear", 1.0, lambda progress: 1 - progress),
        ("cosine", 1.0, lambda progress: (1 + math.cos(math.pi * progress)) / 2),
        ("wsd", 0.4, lambda progress: (1 + math.cos(math.pi * progress)) / 2),
    ],
)
@pytest.mark.parametrize("warmup", [4, pytest.param(0.2, marks=pytest.mark.slow)])
def test_named_schedules(train: Runs, name: str, decay: float, shape: Callable[[float], float], warmup: float) -> None:
    """The rate of every step of a run, with lengths in steps and in shares."""
    out = train(
        f"{name}_{warmup}", f"schedule={name}", f"schedule.warmup={warmup}", "schedule.final=0.1", "logger.every=1"
    )
    lr = [line["lr"] for line in read_metrics(out)]
    total = len(lr)
    rising = warmup if isinstance(warmup, int) else round(warmup * total)
    falling = min(round(decay * total), total - rising)
    wanted = [min(1.0, (step + 1) / rising) for step in range(total - falling)]
    wanted += [0.1 + 0.9 * shape(step / (falling + 1)) for step in range(1, falling + 1)]
    assert [rate / max(lr) for rate in lr] == pytest.approx(wanted)


def test_warmups_of_zero_steps(train: Runs) -> None:
    zero = ["schedule.warmup=0", "schedule.decay=0", "schedule.penalty_warmup=0", "schedule.k_warmup=0"]
    out = train("zero", "sae=relu", "sae.k=null", *zero)
    assert len({line["lr"] for line in read_metrics(out)}) == 1
    train("zero_k", *zero, "schedule.k_start=9", "schedule.k_cold=0")


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["optim.lr=fast"], "optim.lr=fast: give a number, by_width for"),
        (["optim.bias_factor=fast"], "optim.bias_factor=fast: give a number, or by_width for"),
        (["optim.decoder_factor=0"], "optim.decoder_factor=0.0: it multiplies optim.lr and must be positive"),
        (["sae=relu", "sae.k=null", "schedule.k_start=9"], "schedule.k_start=9 with sae.activation=relu: it has no k"),
        (["schedule.k_start=97"], "schedule.k_start=97 is more than the 96 latents"),
        (["schedule.k_start=2"], "schedule.k_start=2 is less than sae.k=3"),
        (["optim.ema_export=true"], "optim.ema_export=true needs optim.ema_decay"),
        (["optim.ema_decay=1.0"], "optim.ema_decay=1.0: must lie between 0 and 1"),
        (["optim.spike_factor=0.5"], "optim.spike_factor=0.5: must be above 1"),
        (["optim.kind=muon"], "optim.kind=muon needs a value for optim.momentum: begin from optim=muon"),
        (["optim=muon", "optim.momentum=1.0"], "optim.momentum=1.0: must lie in [0, 1)"),
        (["optim.momentum=0.9"], "optim.kind=adam has no optim.momentum: begin from optim=adam"),
        (["optim=signum", "optim.beta1=0.9"], "optim.kind=signum has no optim.beta1: begin from optim=signum"),
        (["schedule.penalty_warmup=1.5"], "schedule.penalty_warmup=1.5: write a whole number of steps"),
        (["sae=gated", "sae.k=null", "sae.penalty=none"], "sae.penalty_weight=0.02 with sae.penalty=none"),
        (["sae=jumprelu"], "sae.k=3 with sae.activation=jumprelu"),
    ],
)
def test_bad_combinations_are_refused_before_any_work(train: Runs, overrides: list[str], reason: str) -> None:
    with pytest.raises(GranaryError) as caught:
        train("refused", *overrides)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
