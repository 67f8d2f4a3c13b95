"""Every activation against its formula written out plainly: what it encodes, its loss, and every gradient."""

import pytest
import torch

from shared.sae import SAE
from shared.sae.learn.batch_facts import kth_largest
from tests.learning import LearningSAE

D, F, N = 10, 48, 37
VARIANTS = {
    "topk": {"k": 4},
    "batchtopk": {"k": 4},
    "batchtopk_multi": {"activation": "batchtopk", "k": 3, "multi_topk_weight": 0.125},
    "matryoshka": {"activation": "batchtopk", "k": 4, "prefixes": (6, 20, F)},
    "matryoshka_topk": {"activation": "topk", "k": 4, "prefixes": (6, 20, F)},
    "relu": {"penalty": "l1", "penalty_weight": 0.3},
    "relu_free": {"activation": "relu", "penalty": "l1", "penalty_weight": 0.3, "unit_norm_decoder": False},
    "relu_tanh": {"activation": "relu", "penalty": "tanh", "penalty_weight": 0.3, "unit_norm_decoder": False},
    "relu_tanh_quad": {"activation": "relu", "penalty": "tanh_quad", "penalty_weight": 0.1, "frequency_scale": 0.2},
    "jumprelu": {"penalty": "l0", "penalty_weight": 0.3},
    "jumprelu_tanh": {"activation": "jumprelu", "penalty": "tanh", "penalty_weight": 0.3, "unit_norm_decoder": False},
    "jumprelu_quad": {"activation": "jumprelu", "penalty": "tanh_quad", "penalty_weight": 0.1, "preact_weight": 0.2},
    "gated": {"penalty": "l1", "penalty_weight": 0.3},
    "gated_free": {"activation": "gated", "penalty": "l1", "penalty_weight": 0.3, "unit_norm_decoder": False},
}
MORE = {
    "per_dim": {"loss": "fvu_per_dim"},
    "raw_target": {"normalisation": "layer_norm", "shift_back": False},
    "layer_norm": {"normalisation": "layer_norm"},
    "centre_scale": {"normalisation": "centre_scale"},
}


def make_sae(variant, seed=0, **overrides):
    fields = {"activation": variant, "d_model": D, "d_latent": F, "normalisation": "none", "bandwidth": 0.8}
    fields |= {"auxk_alpha": 0.5, "threshold_init": 0.3, **VARIANTS[variant], **overrides}
    generator = torch.Generator().manual_seed(seed)
    sae = LearningSAE(**fields, generator=generator).double()
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.normal_(generator=generator)
            if name == "W_dec" and sae.config.unit_norm_decoder:
                parameter.div_(parameter.norm(dim=1, keepdim=True))
            if name.startswith("activation."):
                parameter.mul_(0.3).sub_(0.2)
        sae.input_variance.uniform_(0.5, 2.0, generator=generator)
        if sae.config.normalisation == "centre_scale":
            sae.input_mean.normal_(generator=generator)
            sae.input_scale.fill_(1.7)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    return sae, x


def plain(sae, x, dead, penalty_scale=1.0):
    """The loss and the dense latents, by plain autograd over [N, F]; straight-through parts by the detach trick."""
    c, W, t = sae.choices, sae.W_dec, getattr(sae.activation, "log_threshold", None)
    target = x
    if c.normalisation == "layer_norm":
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True).sqrt() + 1e-5)
    elif c.normalisation == "centre_scale":
        x = (x - sae.input_mean) * sae.input_scale
    target = x if c.shift_back else target
    weight = 1 / (D * sae.input_variance) if c.loss == "fvu_per_dim" else 1 / sae.input_variance.sum().expand(D)
    z = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    norm = W.norm(dim=1)

    def square(error):
        return (error.square() * weight).sum(1).mean()

    def keep(k):
        positive = torch.relu(z)
        least = positive.flatten().sort(descending=True).values[k * N - 1]
        if c.activation == "topk":
            least = positive.sort(dim=1, descending=True).values[:, k - 1 : k]
        return positive * (positive >= least)

    step = None
    if c.k is not None:
        f = keep(c.k)
    elif c.activation == "relu":
        f = torch.relu(z)
    elif c.activation == "gated":
        f = (z > 0) * torch.relu(torch.exp(sae.activation.r_mag) * (z - sae.b_enc) + sae.activation.b_mag)
    else:
        theta = t.exp()
        ramp = ((z.detach() - theta) / c.bandwidth + 0.5).clamp(0, 1) * (z > 0)
        step = (z > theta) + ramp - ramp.detach()
        f = z * (z > theta) + theta.detach() * (ramp - ramp.detach())

    error = f @ W + sae.b_dec - target
    total = square(error)
    if c.prefixes is not None:
        total = sum(square(f[:, :m] @ W[:m] + sae.b_dec - target) for m in c.prefixes)
    if c.multi_topk_weight:
        total = total + c.multi_topk_weight * square(keep(4 * c.k) @ W + sae.b_dec - target)
    n = torch.ones(F, dtype=x.dtype) if c.unit_norm_decoder else norm
    gate = torch.relu(z) if c.activation == "gated" else f
    p = torch.tanh(c.tanh_scale * gate * n).mean(0)
    penalty = {
        "none": lambda: 0,
        "l0": lambda: step.sum(1).mean(),
        "l1": lambda: (gate * n).sum(1).mean(),
        "tanh": lambda: p.sum(),
        "tanh_quad": lambda: (p * (1 + p / c.frequency_scale)).sum(),
    }[c.penalty]()
    total = total + c.penalty_weight * penalty_scale * penalty
    if c.activation == "gated":
        total = total + square(torch.relu(z) @ W.detach() + sae.b_dec.detach() - target)
    if c.preact_weight:
        total = total + c.preact_weight * penalty_scale * (torch.relu(t.exp() - z) * n * dead).sum(1).mean()
    residual = -error.detach()
    z_dead = torch.relu((x - sae.b_dec.detach()) @ sae.W_enc.T + sae.b_enc) * dead
    k_aux = min(D // 2, int(dead.sum()))
    kept = z_dead * (z_dead >= z_dead.sort(dim=1, descending=True).values[:, k_aux - 1 : k_aux])
    aux = ((residual - kept @ W).square().sum(1) / residual.square().sum(1)).mean()
    return total + c.auxk_alpha * min(int(dead.sum()) / (D // 2), 1) * aux, f


def gradients(loss, sae):
    return dict(zip(dict(sae.named_parameters()), torch.autograd.grad(loss, list(sae.parameters())), strict=True))


def some_dead():
    return torch.arange(F) < 7


@pytest.mark.parametrize("more", ["none", *MORE])
@pytest.mark.parametrize("pre_bias", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_value_and_every_gradient(variant, pre_bias, more):
    sae, x = make_sae(variant, pre_bias=pre_bias, **MORE.get(more, {}))
    if not pre_bias:
        with torch.no_grad():  # the formula above subtracts it
            sae.b_enc += sae.W_enc @ sae.b_dec
    dead, scale = some_dead(), 0.7
    expected, f = plain(sae, x, dead, scale) if pre_bias else plain_without_pre_bias(sae, x, dead, scale)
    losses = sae.losses(x, dead, penalty_scale=scale)
    torch.testing.assert_close(losses.total, expected)
    torch.testing.assert_close(losses.metrics["l0"].double(), (f > 0).sum(1).double().mean())
    assert torch.equal(losses.fired, (f > 0).any(0))
    wanted = gradients(expected, sae)
    for name, grad in gradients(losses.total, sae).items():
        torch.testing.assert_close(grad, wanted[name], msg=lambda text, name=name: f"{name}: {text}")
    penalty = losses.metrics.get("penalty")
    assert (penalty is None) == (sae.learning.penalty == "none")


def plain_without_pre_bias(sae, x, dead, scale):
    """`plain` for an encoder that reads the input itself: with a b_dec of zero before it, and the real one behind."""
    shadow = LearningSAE(**vars(sae.choices)).double()
    shadow.load_state_dict(sae.state_dict())
    bias = sae.b_dec

    class Late:
        """The SAE, whose b_dec is 0 where the formula subtracts it from the input."""

        def __getattr__(self, name):
            return getattr(sae, name)

    late = Late()
    late.b_dec = _Behind(bias)
    return plain(late, x, dead, scale)


class _Behind:
    """b_dec that vanishes when it is subtracted: ``x - b`` is x, ``y + b`` adds it."""

    def __init__(self, bias):
        self.bias = bias

    def detach(self):
        return _Behind(self.bias.detach())

    def __rsub__(self, x):
        return x

    def __radd__(self, y):
        return y + self.bias


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_loss_does_not_depend_on_how_the_batch_is_cut(variant):
    sae, x = make_sae(variant)
    dead, cuts = some_dead(), (5, 1, 11, 20)
    whole = sae.losses(x, dead)
    parts = x.split(cuts)
    cut = sae.config.activation == "batchtopk" or sae.learning.penalty == "tanh_quad"
    facts = sae.facts(parts, N) if cut else [None] * len(parts)
    total = sum(
        sae.losses(part, dead, facts=fact).total * len(part) / N for part, fact in zip(parts, facts, strict=True)
    )
    torch.testing.assert_close(total, whole.total, rtol=1e-10, atol=0)
    wanted = gradients(whole.total, sae)
    for name, grad in gradients(total, sae).items():
        torch.testing.assert_close(grad, wanted[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_inference_equals_the_formula(variant):
    sae, x = make_sae(variant)
    if sae.config.activation == "batchtopk":
        sae.activation.threshold.fill_(1.5)
    z = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    _, f = plain(sae, x, some_dead())
    if sae.config.activation == "batchtopk":
        f = z * (z > 1.5)
    output = sae(x)
    torch.testing.assert_close(output.latents.to_dense(F), f.detach())
    torch.testing.assert_close(output.x_hat, (f @ sae.W_dec + sae.b_dec).detach())
    assert torch.equal((output.latents.values == 0), (output.latents.indices < 0))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_tokens_features_do_not_depend_on_its_batch(variant):
    sae, x = make_sae(variant)
    if sae.config.activation == "batchtopk":
        sae.activation.threshold.fill_(1.0)
    together = sae.encode(torch.cat([x, 100 * x])).to_dense(F)[:N]
    for row in range(0, N, 9):
        torch.testing.assert_close(sae.encode(x[row : row + 1]).to_dense(F)[0], together[row])


@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpoint_round_trip(variant, tmp_path):
    sae, x = make_sae(variant)
    sae = sae.float()
    if sae.config.activation == "batchtopk":
        sae.activation.threshold.fill_(0.9)
    sae.save_pretrained(tmp_path)
    loaded = SAE.from_pretrained(tmp_path)
    assert loaded.config == sae.config
    assert loaded.state_dict().keys() == sae.state_dict().keys()
    assert torch.equal(loaded(x.float()).x_hat, sae(x.float()).x_hat)


def test_names_of_the_tensors():
    own = {
        variant: sorted(name for name in make_sae(variant)[0].state_dict() if name.startswith("activation."))
        for variant in ("topk", "batchtopk", "relu", "jumprelu", "gated")
    }
    assert own == {
        "topk": [],
        "batchtopk": ["activation.threshold"],
        "relu": [],
        "jumprelu": ["activation.log_threshold"],
        "gated": ["activation.b_mag", "activation.r_mag"],
    }


def test_the_gate_learns_through_its_own_losses_alone():
    """W_enc's gradient from the main reconstruction comes through the magnitudes, not through which latents are on."""
    sae, x = make_sae("gated", penalty_weight=1e-9, auxk_alpha=0.0)
    with torch.no_grad():
        sae.activation.b_mag.fill_(-1e3)  # no latent has a magnitude
    losses = sae.losses(x)
    assert float(losses.metrics["l0"]) == 0
    gate_only = gradients(losses.total, sae)
    assert float(gate_only["W_enc"].norm()) > 1e-3
    assert float(gate_only["W_dec"].norm()) == 0  # frozen in the auxiliary reconstruction
    assert float(gate_only["activation.r_mag"].norm()) == 0


def test_a_bandwidth_far_from_any_threshold_leaves_thresholds_alone():
    sae, x = make_sae("jumprelu", bandwidth=1e-9)
    assert float(gradients(sae.losses(x).total, sae)["activation.log_threshold"].norm()) == 0


def test_batchtopk_keeps_n_k_and_learns_its_threshold():
    sae, x = make_sae("batchtopk", threshold_decay=0.5)
    (fact,) = sae.facts([x], N)
    losses = sae.losses(x, facts=fact)
    assert int((losses.latents.indices >= 0).sum()) == 4 * N
    assert float(losses.latents.values[losses.latents.indices >= 0].min()) == float(fact.least)
    before = float(sae.activation.threshold)
    sae.objective.rule.after_step(fact)
    assert float(sae.activation.threshold) == pytest.approx(0.5 * before + 0.5 * float(fact.least))


def test_batchtopk_finds_the_same_threshold_wherever_it_begins_to_look():
    sae, x = make_sae("batchtopk")
    found = []
    for start in (None, 0.0, 0.5, 3.0, 1e3):
        sae.objective.rule.memory.lower_bound = start
        (fact,) = sae.facts([x], N)
        found.append((float(fact.least), int((fact.values >= fact.least).sum())))
    assert len(set(found)) == 1


def test_batchtopk_with_fewer_positive_values_than_wanted_keeps_all_of_them():
    sae, x = make_sae("batchtopk")
    with torch.no_grad():
        sae.b_enc -= 9
    z = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    assert 0 < int((z > 0).sum()) < 4 * N
    losses = sae.losses(x)
    assert int((losses.latents.indices >= 0).sum()) == int((z > 0).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 7, 500, 999, 1000, 1001])
def test_kth_largest_is_exact(dtype, k):
    generator = torch.Generator().manual_seed(k)
    values = torch.rand(1000, generator=generator, dtype=dtype) * 10.0 ** torch.randint(-30, 30, (1000,))
    values = torch.cat([values, values[:3], -values])  # ties, and what is not positive
    wanted = values[values > 0].sort(descending=True).values
    expected = wanted[k - 1]
    assert float(kth_largest(values, k)) == float(expected)
    assert float(kth_largest(values, 1004)) == 0
