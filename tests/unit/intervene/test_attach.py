"""SAEs at any modules: what is seen there, what the model goes on from, and that nothing of it is left."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shared.basics.errors import GranaryError
from shared.intervene.attach import Attached, attach
from shared.intervene.edits import Edit
from shared.lm import capture
from shared.lm.hookpoint import HookPoint
from shared.sae import SAEConfig
from shared.sae.variants.transcoder import Transcoder, TranscoderConfig
from tests.modules import CASES, MLP, llava, llava_inputs, noise, sae_of, seeded
from tests.splicing import BOS, HOOK, prompt, tiny_llama

OPEN = SAEConfig(k=3, expansion=2)


def tensors(output: Any) -> list[Tensor]:
    """All tensors of a model's output."""
    if isinstance(output, Tensor):
        return [output]
    inside = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()
    return [one for value in inside for one in tensors(value)]


def hooks_of(model: nn.Module) -> int:
    """How many hooks there are anywhere in a model."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
             "_forward_hooks_always_called", "_backward_hooks")  # fmt: skip
    return sum(len(getattr(module, name)) for module in model.modules() for name in names)


def run(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        return [tensor.clone() for tensor in tensors(model(**inputs))]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) > 0 and all(map(torch.equal, one, other))


@pytest.mark.parametrize("name", CASES)
def test_observing_is_bit_equal_and_replacing_goes_on_from_the_reconstruction(name):
    case = CASES[name]
    model, inputs = case.make(), case.inputs()
    clean = run(model, inputs)  # in its first forward transformers places hooks of its own, for good
    names, before = [n for n, _ in model.named_modules()], hooks_of(model)
    with attach(model, {case.target: sae_of(case.width)}) as saes:
        assert same(run(model, inputs), clean)
        (place,) = saes
        rows = saes.rows(place)
        assert rows.shape == (case.rows, case.width)
        assert saes.latents(place).values.shape[-1] == 3
    with attach(model, {case.target: sae_of(case.width)}, mode="replace") as saes:
        assert not same(run(model, inputs), clean)
        assert torch.equal(saes.rows(place), rows)
    edits = {place: [Edit([1], "set", 9.0)]}
    with attach(model, {case.target: sae_of(case.width)}, mode="replace", keep_error=True, edits=edits):
        assert not same(run(model, inputs), clean)
    assert same(run(model, inputs), clean)
    assert [n for n, _ in model.named_modules()] == names
    assert hooks_of(model) == before


def test_replacing_is_what_the_plain_code_computes():
    model, x = seeded(MLP)(), noise(4, 6)
    sae = sae_of(12)
    hidden = sae(model.norm(model.fc1(x).relu())).x_hat
    with attach(model, {"norm": sae}, mode="replace"), torch.no_grad():
        assert torch.equal(model(x), model.fc2(model.batch_norm(hidden)))


def test_the_features_of_a_convolution_are_its_channels():
    case = CASES["conv"]
    model, inputs = case.make(), case.inputs()
    sae = sae_of(9)
    want = sae(model.stage(inputs["x"]).permute(0, 2, 3, 1)).x_hat.permute(0, 3, 1, 2).mean((-2, -1))
    with attach(model, {"stage.2": sae}, mode="replace"), torch.no_grad():
        assert torch.equal(model(**inputs), model.head(want))


def test_padding_and_special_tokens_are_left_as_they_are():
    model = tiny_llama()
    tokens = torch.cat([torch.zeros(2, 2, dtype=torch.int64), prompt()], 1)
    mask = (tokens != 0).long()
    inputs = {"input_ids": tokens, "attention_mask": mask}
    real = (tokens != 0) & (tokens != BOS)
    with attach(model, {HOOK: sae_of(16)}) as saes:
        model(**inputs)
        (clean,) = saes.activations(HOOK)
        assert torch.equal(saes.rows(HOOK), clean[real])
    with attach(model, {HOOK: sae_of(16)}, mode="replace"), capture(model, [HookPoint.parse(HOOK)]) as captured:
        model(**inputs)
    changed = (captured[HookPoint.parse(HOOK)] != clean).any(-1)
    assert torch.equal(changed, real)


def test_generating_sees_each_token():
    model = tiny_llama()
    with attach(model, {HOOK: sae_of(16)}, mode="replace", keep_error=True) as saes:
        made = model.generate(prompt(), max_new_tokens=3, do_sample=False)
        assert saes.rows(HOOK).shape == (2, 16)
    assert torch.equal(made, model.generate(prompt(), max_new_tokens=3, do_sample=False))


def test_a_place_of_a_vision_tower_has_every_row():
    model = llava()
    with attach(model, {"re:model.*layers.0": OPEN}) as saes:
        model(**llava_inputs())
        assert {name: len(saes.rows(name)) for name in saes} == {
            next(name for name in saes if "vision" in name): 10,
            "model.language_model.layers.0": 12,  # of 16, less one BOS in each row and two of padding
        }


def test_hook_left_after_exception():
    class Broken(MLP):
        def forward(self, x: Tensor) -> Tensor:
            self.fc1(x)
            raise RuntimeError("broken")

    model = Broken()
    with pytest.raises(RuntimeError, match="broken"), attach(model, {"fc1": OPEN}):
        model(noise(4, 6))
    assert hooks_of(model) == 0
    with pytest.raises(GranaryError, match="has no module fc3"):
        attach(model, {"fc1": OPEN, "fc3": OPEN})
    with pytest.raises(GranaryError, match="at fc1 is not there yet"):
        attach(model, {"fc1": OPEN}, mode="replace")
    assert hooks_of(model) == 0
    saes = attach(model, {"fc1": OPEN})
    saes.detach()
    saes.detach()
    assert hooks_of(model) == 0


def test_a_forward_that_fails_does_not_spoil_the_next():
    model = seeded(MLP)()
    with attach(model, {"fc1": OPEN}) as saes:
        with pytest.raises(RuntimeError):
            model(noise(4, 7))
        with pytest.raises(GranaryError, match="fc1 did not run in the last forward"):
            saes.rows("fc1")
        model(noise(3, 6))
        assert len(saes.rows("fc1")) == 3


def test_several_at_once_in_one_and_in_many_attachments_that_end_in_any_order():
    model, x = seeded(MLP)(), noise(4, 6)
    clean = model(x)
    first = attach(model, {"fc1": sae_of(12), "fc2": sae_of(5)}, mode="replace")
    second = attach(model, {"fc1": sae_of(12, 1)})
    replaced = model(x)
    assert torch.equal(second.rows("fc1"), sae_of(12)(first.rows("fc1")).x_hat)
    first.detach()
    assert torch.equal(model(x), clean)
    assert not torch.equal(replaced, clean)
    assert torch.equal(second.latents("fc1").values, sae_of(12, 1).encode(model.fc1(x)).values)
    second.detach()
    assert hooks_of(model) == 0


def test_the_mode_does_not_follow_that_of_the_model():
    model, x = seeded(MLP)(), noise(4, 6)
    model.drop.p = 0.0
    model.batch_norm = nn.BatchNorm1d(12, track_running_stats=False)
    clean = model(x)
    with attach(model, {"fc1": sae_of(12)}):
        assert torch.equal(model.train()(x), model.eval()(x))
    with attach(model, {"fc1": sae_of(12)}, mode="replace"):
        assert torch.equal(model.train()(x), model.eval()(x))
        assert not torch.equal(model(x), clean)


class Twice(nn.Module):
    """One module that runs twice in a forward, and one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.idle = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.shared(self.shared(x))
        return out


def test_shared_module_called_twice_per_forward():
    model, x = Twice(), noise(4, 6)
    with torch.no_grad(), attach(model, {"shared": sae_of(6)}) as saes:
        model(x)
        once = model.shared(x)
        assert torch.equal(saes.rows("shared"), torch.cat([once, model.shared(once)]))
        with pytest.raises(GranaryError, match="shared ran 2 times"):
            saes.latents("shared")
    with attach(model, {"shared": sae_of(6)}, mode="replace"), pytest.raises(GranaryError, match="ran 2 times"):
        model(x)


def test_module_never_called():
    model = Twice()
    with attach(model, {"idle": sae_of(6)}) as saes:
        model(noise(4, 6))
        with pytest.raises(GranaryError, match="idle did not run in the last forward of Twice"):
            saes.rows("idle")
    with attach(model, {"idle": sae_of(6)}, mode="replace"), pytest.raises(GranaryError, match="idle did not run"):
        model(noise(4, 6))


def test_a_compiled_model_runs_its_hooks():
    model, x = seeded(MLP)(), noise(4, 6)
    compiled = torch.compile(model, backend="eager")
    clean = compiled(x)
    with attach(compiled, {"fc1": sae_of(12)}) as saes:
        assert torch.equal(compiled(x), clean)
        assert len(saes.rows("fc1")) == 4
    with attach(compiled, {"fc1": sae_of(12)}, mode="replace"):
        replaced = compiled(x)
    assert torch.equal(compiled(x), clean)
    assert not torch.equal(replaced, clean)


def test_attachments_that_end_out_of_order_leave_compiled_code_compiled():
    runs = 0

    def counting(graph: Any, _inputs: Any) -> Any:
        nonlocal runs
        runs += 1
        return graph.forward

    gone = seeded(MLP)()
    model_ref = weakref.ref(gone)
    attach(gone, {"fc1": OPEN})
    attach(gone, {"fc1": sae_of(12)}, mode="replace")
    del gone
    gc.collect()  # of an attachment that nobody detached nothing is left once its model is gone
    assert model_ref() is None
    model = seeded(MLP)()
    first, second = attach(model, {"fc1": OPEN}), attach(model, {"fc1": OPEN})
    first.detach()
    torch.compile(nn.Linear(2, 2), backend=counting)(noise(1, 2))
    assert runs == 0
    second.detach()
    torch.compile(nn.Linear(2, 2), backend=counting)(noise(1, 2))
    assert runs == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_calls_a_hook_twice(reentrant):
    class Checkpointed(MLP):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc2(checkpoint(self.fc1, x, use_reentrant=reentrant))
            return out

    model, x = Checkpointed(), noise(4, 6).requires_grad_()
    model.fc2.weight.requires_grad_()
    model(x).square().sum().backward()
    clean, x.grad = x.grad, None
    with attach(model, {"fc1": sae_of(12)}) as saes:
        loss = model(x).square().sum()
        rows = saes.rows("fc1")
        loss.backward()
        assert torch.equal(x.grad, clean)
        assert torch.equal(saes.rows("fc1"), rows)
        assert len(rows) == 4


def test_attach_to_a_base_in_bfloat16():
    model = tiny_llama().bfloat16()
    clean = model(prompt()).logits
    with attach(model, {HOOK: sae_of(16)}) as saes:
        assert torch.equal(model(prompt()).logits, clean)
        assert saes.rows(HOOK).dtype == torch.bfloat16
        assert saes.latents(HOOK).values.dtype == torch.float32
    with attach(model, {HOOK: sae_of(16)}, mode="replace"):
        assert model(prompt()).logits.dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_attach_to_a_quantised_linear():
    model, x = torch.ao.quantization.quantize_dynamic(seeded(MLP)(), {nn.Linear}), noise(4, 6)
    assert not isinstance(model.fc1, nn.Linear)
    clean = model(x)
    with attach(model, {"fc1": sae_of(12)}) as saes:
        assert torch.equal(model(x), clean)
        assert saes.rows("fc1").shape == (4, 12)
    with attach(model, {"fc1": sae_of(12)}, mode="replace"):
        assert not torch.equal(model(x), clean)


def test_what_can_not_be_attached_is_said():
    model = seeded(MLP)()
    transcoder = Transcoder(TranscoderConfig(d_in=12, d_out=12, d_latent=24, k=3, pre_bias=False))
    for targets, told in (
        ({}, "nothing to attach"),
        ({"fc1": transcoder}, "fc1: an SAE or an SAEConfig is attached, not a transcoder"),
        ({"fc1": "sae"}, "not a str"),
        ({"fc1": OPEN, "re:fc.": OPEN}, "fc1 is named twice, the second time by re:fc."),
    ):
        with pytest.raises(GranaryError, match=told):
            attach(model, targets)
    for settings, told in (
        ({"mode": "train"}, "choose observe or replace"),
        ({"keep_error": True}, 'give mode="replace"'),
        ({"edits": {"fc1": [Edit([1], "set", 1.0)]}}, 'give mode="replace"'),
        ({"mode": "replace", "edits": {"fc9": [Edit([1], "set", 1.0)]}}, "edits name fc9"),
        ({"mode": "replace", "edits": {"fc1": [Edit([99], "set", 1.0)]}}, "latent 99 is not in the SAE"),
    ):
        with pytest.raises(GranaryError, match=told):
            attach(model, {"fc1": sae_of(12)}, **settings)
    with attach(model, {"fc1": sae_of(13)}, mode="replace"), pytest.raises(GranaryError, match="width 13, got 12"):
        model(noise(4, 6))
    assert hooks_of(model) == 0


def test_a_module_that_is_named_in_two_ways_is_named_twice():
    """By its path in the whole model, and by that in the trunk, as stores name it."""
    model = tiny_llama()
    with attach(model, {"layers.1.mlp": sae_of(16)}) as saes:
        model(prompt())
        assert saes.rows("layers.1.mlp").shape == (12, 16)
    with pytest.raises(GranaryError, match="named twice, the second time by model"):
        attach(model, {"layers.1.mlp": OPEN, "model.layers.1.mlp": OPEN})
    assert hooks_of(model) == 0


def test_it_is_a_mapping_of_the_places():
    model = seeded(MLP)()
    sae = sae_of(12)
    with attach(model, {"fc1": sae, "re:norm|fc2": OPEN}) as saes:
        assert isinstance(saes, Attached)
        assert list(saes) == ["fc1", "fc2", "norm"] or list(saes) == ["fc1", "norm", "fc2"]
        assert saes["fc1"] is sae
        assert set(saes.untrained) == {"norm", "fc2"}
        with pytest.raises(GranaryError, match=r"granary\.fit"):
            saes["norm"]
        with pytest.raises(KeyError):
            saes["fc7"]
    assert saes["fc1"] is sae
