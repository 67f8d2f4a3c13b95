"""Fitting SAEs on a model's own forwards: what is learnt, what is left alone, what goes on after a stop."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import granary
from shared.basics.errors import GranaryError
from shared.basics.metrics_file import read_metrics
from shared.basics.run_folder import RunFolder
from shared.lm.early_end import may_end_early
from shared.sae import SAEConfig, load_provenance
from stage_train.state.checkpoint import newest_checkpoint
from stage_train.step import loop
from tests.modules import CASES, MLP, llava, llava_inputs, noise, planted_rows, sae_of, seeded
from tests.splicing import BOS, HOOK, tiny_llama
from tests.training import Died, interrupted_after, signalled_in, watching

QUICK = ["stream.batch_size=32", "logger.progress=false", "logger.every=5", "checkpoint.every=0"]
OPEN = SAEConfig(k=3, expansion=4)


def fit(model: nn.Module, target: str = "fc1", tokens: int = 640, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """The SAEs and the last metrics of the one at `target`."""
    overrides = [*QUICK, *settings.pop("overrides", [])]
    with granary.attach(model, {target: settings.pop("config", OPEN)}) as saes:
        metrics = granary.fit(
            saes, settings.pop("batches", planted_rows()), tokens=tokens, overrides=overrides, **settings
        )
    return saes, next(iter(metrics.values()))


@contextmanager
def noting_rows(seen: list[Tensor]) -> Iterator[None]:
    """Within it, the rows of every step are put into `seen`."""

    class Watcher:
        def before_step(self, run: Any, batch: Any) -> None:
            seen.extend(rows.clone() for rows in batch.activations.values())

        def after_step(self, run: Any, batch: Any) -> None:
            pass

    watcher = Watcher()
    loop.observers.append(watcher)
    try:
        yield
    finally:
        loop.observers.remove(watcher)


def state_of(model: nn.Module) -> tuple[dict[str, Tensor], list[bool], list[bool]]:
    tensors = {name: tensor.clone() for name, tensor in model.state_dict(keep_vars=True).items()}
    modes = [module.training for module in model.modules()]
    return tensors, modes, [tensor.requires_grad for tensor in model.parameters()]


def test_train_step_leaves_base_bit_equal():
    """Parameters and buffers, with dropout and running statistics in a model that is in training mode."""
    model = MLP().train()
    model.fc2.eval()
    tensors, modes, grads = state_of(model)
    saes, _ = fit(model)
    after, modes_after, grads_after = state_of(model)
    assert all(torch.equal(tensors[name], after[name]) for name in tensors)
    assert (modes, grads) == (modes_after, grads_after)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in saes["fc1"].parameters())


def test_it_learns_and_tells_how_well():
    saes, metrics = fit(seeded(MLP)(), tokens=6400)
    assert (metrics["step"], metrics["tokens"], metrics["l0"]) == (200, 6400, 3.0)
    assert metrics["fvu"] < 0.1
    model, x = seeded(MLP)(), torch.cat(planted_rows())
    hidden = model.fc1(x)
    error = (saes["fc1"](hidden).x_hat - hidden).square().sum() / (hidden - hidden.mean(0)).square().sum()
    assert error < 0.1
    assert saes["fc1"].config == SAEConfig(d_model=12, d_latent=48, k=3, sites=saes["fc1"].sites)
    assert saes.saved["fc1"].provenance["hook"] == "fc1"
    assert saes.saved["fc1"].provenance["model"] == {"id": "MLP", "class": "MLP"}


@pytest.mark.parametrize("name", CASES)
def test_width_from_activation_not_weight(name):
    case = CASES[name]
    saes, metrics = fit(
        case.make(), case.target, tokens=64, batches=[case.inputs()], overrides=["stream.batch_size=8"],
        config=SAEConfig(k=2, expansion=2),
    )  # fmt: skip
    (place,) = saes
    assert saes[place].config.d_model == case.width
    assert saes[place].config.d_latent == 2 * case.width
    assert metrics["tokens"] == 64


def test_what_is_saved_is_what_was_fitted(tmp_path):
    saes, _ = fit(seeded(MLP)())
    saes.save_pretrained(tmp_path / "saes")
    with granary.attach(seeded(MLP)(), tmp_path / "saes") as again:
        assert all(map(torch.equal, saes["fc1"].state_dict().values(), again["fc1"].state_dict().values()))
    assert load_provenance(tmp_path / "saes" / "fc1")["steps"] == 20
    assert granary.load(tmp_path / "saes" / "fc1").sites == saes["fc1"].sites


def test_several_places_are_fitted_as_each_alone():
    model = seeded(MLP)()
    with granary.attach(model, {"fc1": OPEN, "norm": OPEN, "fc2": sae_of(5)}) as saes:
        metrics = granary.fit(saes, planted_rows(), tokens=640, overrides=QUICK)
    assert set(metrics) == {"fc1", "norm"}
    for place in metrics:
        alone, _ = fit(model, place)
        assert all(map(torch.equal, alone[place].state_dict().values(), saes[place].state_dict().values()))


def test_places_of_other_numbers_of_rows_are_fitted_together():
    model = llava()
    with granary.attach(model, {"re:model.*layers.0": SAEConfig(k=2, expansion=2)}) as saes:
        metrics = granary.fit(saes, [llava_inputs()], tokens=96, overrides=[*QUICK, "stream.batch_size=16"])
    assert [one["tokens"] for one in metrics.values()] == [96, 96]


def test_padding_not_in_loss():
    tokens = torch.randint(2, 50, (6, 9), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = BOS
    tokens[::2, 5:] = 0
    mask = (tokens != 0).long()
    with torch.no_grad(), granary.attach(tiny_llama(), {HOOK: OPEN}) as saes:
        saes.model(tokens, attention_mask=mask)
        want = saes.rows(HOOK)
    assert len(want) == 36
    seen: list[Tensor] = []
    with noting_rows(seen):
        batches = iter([{"input_ids": tokens, "attention_mask": mask}])
        fit(tiny_llama(), HOOK, tokens=36, batches=batches, overrides=["stream.batch_size=9"])
    found = torch.cat(seen)
    assert torch.equal(found[:, 0].sort().values, want[:, 0].sort().values)


def test_rows_that_a_mask_leaves_out_are_not_learnt_from():
    seen, kept = [], torch.arange(24) % 3 > 0
    masked = [granary.Masked({"x": rows}, kept) for rows in planted_rows()]
    with noting_rows(seen):
        fit(seeded(MLP)(), tokens=320, batches=masked)
    model = seeded(MLP)()
    wanted = {tuple(row.tolist()) for rows in planted_rows() for row in model.fc1(rows)[kept]}
    assert {tuple(row.tolist()) for rows in seen for row in rows} <= wanted
    with pytest.raises(GranaryError, match=r"a batch's mask is \[24\], and there are \[5\] activations"):
        fit(seeded(MLP)(), batches=[granary.Masked(noise(5, 6), kept)])


def test_bf16_base_fp32_loss():
    saes, metrics = fit(seeded(MLP)().bfloat16(), batches=[x.bfloat16() for x in planted_rows()], tokens=3200)
    assert {tensor.dtype for tensor in saes["fc1"].state_dict().values()} == {torch.float32}
    assert metrics["fvu"] < 0.2


def test_any_activation_of_the_command_line_and_its_losses():
    jump = SAEConfig(expansion=4, activation="jumprelu", normalisation="scale")
    saes, metrics = fit(seeded(MLP)(), config=jump, overrides=["sae.penalty_weight=0.01", "optim.lr=0.002"])
    assert saes["fc1"].config.activation == "jumprelu"
    assert saes["fc1"].config.normalisation == "scale"
    record = saes.saved["fc1"].provenance["config"]
    assert (record["sae.penalty"], record["sae.penalty_weight"], record["optim.lr"]) == ("l0", 0.01, 0.002)
    assert metrics["lr"] > 0


def test_batches_of_every_form():
    model, x = seeded(MLP)(), torch.cat(planted_rows(2))
    fitted = [fit(model, batches=[form], tokens=64)[0]["fc1"] for form in (x, (x,), [x], {"x": x})]
    assert all(torch.equal(one.W_enc, fitted[0].W_enc) for one in fitted)


def test_a_run_goes_on_from_its_last_checkpoint(tmp_path):
    """Weights, moments, counts and the schedule go on; the rows are those of later batches."""
    often = ["checkpoint.every=5"]
    with pytest.raises(Died), watching(before=interrupted_after(13)):
        fit(seeded(MLP)(), folder=tmp_path, overrides=often, buffer_rows=64)
    assert newest_checkpoint(RunFolder(tmp_path / "fc1").checkpoints).name == "step-00000010"
    steps: list[int] = []
    used: list[Any] = []

    class Noting(list[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            for number, x in enumerate(super().__iter__()):
                used.append(number)
                yield x

    with watching(before=lambda run: steps.append(run.step)):
        saes, metrics = fit(
            seeded(MLP)(), folder=tmp_path, overrides=often, batches=Noting(planted_rows()), buffer_rows=64
        )
    assert steps == list(range(10, 20))
    assert metrics["step"] == 20
    assert [line["step"] for line in read_metrics(tmp_path / "fc1")] == [5, 10, 15, 20]
    assert saes["fc1"].config.d_model == 12


def test_what_is_trained_is_not_trained_again(tmp_path):
    first, metrics = fit(seeded(MLP)(), folder=tmp_path)

    def never(run: Any) -> None:
        raise AssertionError("a step")

    with watching(before=never):
        again, same = fit(seeded(MLP)(), folder=tmp_path, batches=iter([]))
    assert torch.equal(first["fc1"].W_enc, again["fc1"].W_enc)
    assert metrics == same
    _longer, more = fit(seeded(MLP)(), folder=tmp_path, tokens=960)
    assert more["step"] == 30


def test_batches_that_end_early_lose_nothing(tmp_path):
    with pytest.raises(GranaryError, match="the batches ended after 240 rows: give more"):
        fit(seeded(MLP)(), folder=tmp_path, batches=iter(planted_rows(10)), buffer_rows=64)
    assert newest_checkpoint(RunFolder(tmp_path / "fc1").checkpoints).name == "step-00000008"
    _, metrics = fit(seeded(MLP)(), folder=tmp_path)
    assert metrics["step"] == 20


@pytest.mark.parametrize(("number", "end"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_saves_and_stops(tmp_path, number, end):
    model = seeded(MLP)().train()
    with granary.attach(model, {"fc1": OPEN}) as saes:
        with pytest.raises(end), watching(before=signalled_in(7, number)):
            granary.fit(saes, planted_rows(), tokens=640, overrides=QUICK, folder=tmp_path)
        assert model.training
        assert newest_checkpoint(RunFolder(tmp_path / "fc1").checkpoints).name == "step-00000007"
        assert granary.fit(saes, planted_rows(), tokens=640, overrides=QUICK, folder=tmp_path)["fc1"]["step"] == 20


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"overrides": ["optim.learning_rate=1"]}, "optim.learning_rate|learning_rate"),
        ({"overrides": ["optim.lr=fast"]}, "optim.lr=fast"),
        *(
            ({"overrides": [key]}, "is not for fit")
            for key in (
                "schedule.tokens=3",
                "store.url=x",
                "stream.lanes=2",
                "sae.k=3",
                "sae=relu",
                "hook=x",
                "nproc=2",
            )
        ),
        ({"overrides": ["stream.batch_size=0"]}, "stream.batch_size=0: it must be at least 1"),
        ({"tokens": 0}, "tokens=0"),
        ({"config": SAEConfig(d_model=13, expansion=4, k=3)}, "is for activations of width 13, these have 12"),
        ({"config": SAEConfig(k=50, expansion=2)}, "sae.k=50 is more than the 24 latents"),
        ({"batches": []}, "are they empty"),
        ({"batches": [torch.full((40, 6), torch.nan)]}, "an activation at fc1 is not finite"),
        ({"buffer_rows": 40}, "buffer_rows=40 must hold two batches"),
    ],
)
def test_what_makes_no_sense_is_said(settings, told):
    with pytest.raises(GranaryError, match=told):
        fit(seeded(MLP)(), **settings)


def test_an_sae_that_diverges_leaves_the_others_trained():
    model = seeded(MLP)()
    with granary.attach(model, {"fc1": OPEN, "norm": OPEN}) as saes:

        def poison(run: Any) -> None:
            if run.name == "norm" and run.step == 12:
                run.trainer.objective.dictionary.W_dec.data.fill_(torch.nan)

        with pytest.raises(GranaryError, match="diverged at norm, see above"), watching(before=poison):
            granary.fit(saes, planted_rows(), tokens=640, overrides=QUICK)
        assert set(saes.untrained) == {"norm"}
        assert saes["fc1"].W_enc.isfinite().all()


def test_only_what_is_attached_and_untrained_is_fitted():
    model = seeded(MLP)()
    with granary.attach(model, {"fc1": sae_of(12)}) as saes, pytest.raises(GranaryError, match="every SAE is trained"):
        granary.fit(saes, planted_rows(), tokens=64)
    saes = granary.attach(model, {"fc1": OPEN})
    saes.detach()
    with pytest.raises(GranaryError, match="SAEs that are attached"):
        granary.fit(saes, planted_rows(), tokens=64)
    replacing = granary.attach(model, {"fc1": sae_of(12)}, mode="replace")
    with replacing as saes, pytest.raises(GranaryError, match='mode="observe"'):
        granary.fit(saes, planted_rows(), tokens=64)


def test_module_never_called_is_said_after_the_first_forward():
    model = nn.Sequential(nn.Linear(6, 6))
    model.add_module("idle", nn.Identity())
    model.forward = model[0].forward  # type: ignore[method-assign]
    with granary.attach(model, {"idle": OPEN}) as saes, pytest.raises(GranaryError, match="idle did not run"):
        granary.fit(saes, [noise(4, 6)], tokens=64, overrides=QUICK)


def counted(module: nn.Module) -> list[int]:
    """Grows by one at each forward of `module`."""
    runs: list[int] = []
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        runs.append(1)
        return original(*args, **kwargs)

    module.forward = forward  # type: ignore[method-assign]
    return runs


TOKENS = torch.randint(2, 50, (8, 2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("targets", [[HOOK], ["model.layers.0.mlp.up_proj", "layers.1.mlp_in"]])
def test_a_fit_runs_no_layer_behind_the_last_place_and_learns_the_same(targets, monkeypatch):
    fitted = []
    for may in (True, False):
        model = tiny_llama()
        if not may:
            monkeypatch.setattr("stage_train.online.rows.may_end_early", lambda model: False)
        runs, before = counted(model.model.layers[2]), counted(model.model.layers[1])
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with granary.attach(model, dict.fromkeys(targets, OPEN)) as saes:
            granary.fit(saes, list(TOKENS), tokens=320, overrides=QUICK)
        fitted.append([tensor for name in saes for tensor in saes[name].state_dict().values()])
        assert len(before) > 8
        assert len(runs) == (1 if may else len(before))
        assert all(torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items())
    assert all(map(torch.equal, *fitted))


def test_a_forward_is_whole_where_its_end_is_waited_for():
    """By hooks of somebody else, by weights that are put back behind each layer, in a model of any control flow."""
    model = tiny_llama()
    assert may_end_early(model)
    seen: list[int] = []
    handle = model.model.norm.register_forward_hook(lambda *_: seen.append(1))
    assert not may_end_early(model)
    fit(model, HOOK, batches=list(TOKENS), tokens=320)
    assert len(seen) > 8
    handle.remove()
    assert may_end_early(model)
    model.lm_head._hf_hook = object()  # as accelerate's offloading leaves one
    assert not may_end_early(model)
    assert not may_end_early(seeded(MLP)())


def test_a_place_that_runs_twice_keeps_the_rows_of_both():
    model = tiny_llama()
    model.model.layers[2] = model.model.layers[1]
    runs = counted(model.lm_head)
    fit(model, "model.layers.1.mlp.up_proj", batches=list(TOKENS), tokens=576)
    assert len(runs) > 1
