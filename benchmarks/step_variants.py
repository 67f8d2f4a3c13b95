"""One training step of each kind of dictionary, as ``step_providers`` has those of SAEs, and what it is held against.

granary-transcoder   an SAE of the same shape (granary)
granary-crosscoder   2 sites: an SAE of twice the width (granary-wide)
granary-molt         transforms of ranks 64 to 4: a dense step by autograd (molt-dense)
granary-lorsa        16 heads of queries and keys, contexts of 256 tokens: a dense step by autograd (lorsa-dense)
granary-clt          4 layers, batchtopk over all of them: a dense step by autograd (clt-dense), and the products
                     of its own encoders alone (clt-gemm, clt-gemm-onednn)
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from step_providers import Shape, Step, gemm, gemm_onednn, granary, make_batch

LAYERS = 4
# A contender, what it is held against, and the most (or least) that its time may be of that.
RATIOS = (
    ("granary-transcoder", ("granary",), "<= 1.1"),
    ("granary-crosscoder", ("granary-wide",), "<= 1.1"),
    ("granary-clt", ("clt-gemm", "clt-gemm-onednn"), "<= 2"),
    ("clt-dense", ("granary-clt",), "> 5"),
    ("molt-dense", ("granary-molt",), "> 1.5"),
    ("granary-lorsa", ("lorsa-dense",), "<= 1.5"),
)


def wide(shape: Shape) -> Step:
    """An SAE of twice the width."""
    return granary(replace(shape, d_model=2 * shape.d_model))


def of_all_layers(product: Callable[[Shape], Step], shape: Shape) -> Step:
    """The encoder's product of every layer of a CLT."""
    steps = [product(shape) for _ in range(LAYERS)]
    return lambda: sum(step() for step in steps)


def clt_dense(shape: Shape) -> Step:
    """Plain dense PyTorch of a CLT: batchtopk over all layers, every decoder a product with all latents."""
    d, latents = shape.d_model, shape.d_latent
    x = make_batch(replace(shape, d_model=LAYERS * d))
    y = x.roll(1, dims=1)

    def rows(width: int) -> torch.nn.Parameter:
        return torch.nn.Parameter(F.normalize(torch.randn(latents, width), dim=1))

    W_enc, W_dec = [rows(d) for _ in range(LAYERS)], [rows((LAYERS - layer) * d) for layer in range(LAYERS)]
    b_enc = [torch.nn.Parameter(torch.zeros(latents)) for _ in range(LAYERS)]
    b_dec = torch.nn.Parameter(torch.zeros(LAYERS * d))
    parameters = [*W_enc, *W_dec, *b_enc, b_dec]
    optimiser = torch.optim.Adam(parameters, lr=1e-3)

    def step() -> float:
        z = torch.cat([torch.relu(F.linear(x[:, n * d : (n + 1) * d], W_enc[n], b_enc[n])) for n in range(LAYERS)], 1)
        values, indices = z.flatten().topk(LAYERS * shape.k * shape.batch)
        f = torch.zeros(z.numel()).scatter(0, indices, values).view_as(z).split(latents, dim=1)
        y_hat = sum((F.pad(f[n] @ W_dec[n], (n * d, 0)) for n in range(LAYERS)), start=b_dec)
        loss = (y_hat - y).square().sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        with torch.no_grad():
            for W in W_dec:
                W.grad -= (W.grad * W).sum(1, keepdim=True) * W
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            for W in W_dec:
                W.div_(W.norm(dim=1, keepdim=True))
        return float(loss.detach())

    return step


def molt_dense(shape: Shape) -> Step:
    """Plain dense PyTorch of a MoLT: every transform of every token, by the products of all factors."""
    from gpu_stages.trainee import ranks_of

    ranks = torch.tensor([rank for rank, count in ranks_of(shape).items() for _ in range(count)])
    latents, rows, d = len(ranks), int(ranks.sum()), shape.d_model
    x = make_batch(shape)
    y = x.roll(1, dims=1)
    W_enc, V, U = (torch.nn.Parameter(F.normalize(torch.randn(n, d), dim=1)) for n in (latents, rows, rows))
    b_enc, b_dec = torch.nn.Parameter(torch.zeros(latents)), torch.nn.Parameter(torch.zeros(d))
    parameters = [W_enc, V, U, b_enc, b_dec]
    optimiser = torch.optim.Adam(parameters, lr=1e-3)

    def step() -> float:
        z = torch.relu(F.linear(x, W_enc, b_enc))
        values, indices = z.topk(shape.k)
        f = torch.zeros_like(z).scatter(1, indices, values)
        y_hat = (f.repeat_interleave(ranks, dim=1, output_size=rows) * (x @ V.T)) @ U + b_dec
        loss = (y_hat - y).square().sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        with torch.no_grad():
            pairs = zip(U.split(ranks.tolist()), V.split(ranks.tolist()), strict=True)
            norms = torch.stack([((u @ u.T) * (v @ v.T)).sum().sqrt() for u, v in pairs])
            U.div_(norms.repeat_interleave(ranks)[:, None])
        return float(loss.detach())

    return step


def lorsa_dense(shape: Shape) -> Step:
    """Plain dense PyTorch of a Lorsa: every pattern and every latent of every token, kept for the backward pass."""
    from gpu_stages.trainee import CONTEXT, QK_HEADS, QK_WIDTH

    from shared.kernels.attention.pattern import rotated

    latents, d = shape.d_latent, shape.d_model
    x = make_batch(shape)
    y = x.roll(1, dims=1)
    x_CTD = x.view(-1, CONTEXT, d)
    W_Q, W_K = (torch.nn.Parameter(torch.randn(QK_HEADS * QK_WIDTH, d) / d**0.5) for _ in "QK")
    W_V, W_O = (torch.nn.Parameter(F.normalize(torch.randn(latents, d), dim=1)) for _ in "VO")
    b_Q, b_K = (torch.nn.Parameter(torch.zeros(QK_HEADS * QK_WIDTH)) for _ in "QK")
    b_V, b_dec = torch.nn.Parameter(torch.zeros(latents)), torch.nn.Parameter(torch.zeros(d))
    parameters = [W_Q, W_K, W_V, W_O, b_Q, b_K, b_V, b_dec]
    optimiser = torch.optim.Adam(parameters, lr=1e-3)
    angles = torch.arange(CONTEXT)[:, None] * 10_000 ** (-torch.arange(0, QK_WIDTH, 2) / QK_WIDTH)
    turn = tuple(part[None, :, None] for part in (angles.cos(), angles.sin()))

    def step() -> float:
        q, k = (
            rotated(F.linear(x_CTD, W, b).unflatten(2, (QK_HEADS, -1)), *turn).transpose(1, 2)
            for W, b in ((W_Q, b_Q), (W_K, b_K))
        )
        v = F.linear(x_CTD, W_V).unflatten(2, (QK_HEADS, -1)).transpose(1, 2)
        causal = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).tril()
        scores = (q @ k.transpose(2, 3) / QK_WIDTH**0.5).masked_fill(~causal, -torch.inf)
        z = torch.relu((torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2).flatten(0, 1) + b_V)
        values, indices = z.topk(shape.k)
        f = torch.zeros_like(z).scatter(1, indices, values)
        loss = (f @ W_O + b_dec - y).square().sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        with torch.no_grad():
            W_O.grad -= (W_O.grad * W_O).sum(1, keepdim=True) * W_O
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            W_O.div_(W_O.norm(dim=1, keepdim=True))
        return float(loss.detach())

    return step


VARIANT_PROVIDERS: dict[str, Callable[[Shape], Step]] = {
    "granary-transcoder": partial(granary, kind="transcoder"),
    "granary-crosscoder": partial(granary, kind="crosscoder"),
    "granary-wide": wide,
    "granary-clt": partial(granary, kind="clt"),
    "clt-dense": clt_dense,
    "granary-molt": partial(granary, kind="molt"),
    "molt-dense": molt_dense,
    "granary-lorsa": partial(granary, kind="lorsa"),
    "lorsa-dense": lorsa_dense,
    "clt-gemm": partial(of_all_layers, gemm),
    "clt-gemm-onednn": partial(of_all_layers, gemm_onednn),
}
