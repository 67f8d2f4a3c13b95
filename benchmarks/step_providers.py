"""One training step of each contender, behind one interface: ``make(name, shape) -> step()``.

Imports nothing but torch until a provider is chosen, so that peers can run in an environment of their own. Every step
is what the project's own trainer does for one batch, without data loading: TopK, float32, Adam, loss, backward, clip,
projection where the project projects. AuxK: ours is always active, on a 64th of the latents declared dead; the peers'
stay at their defaults, where nothing is dead in the first steps and AuxK costs them nothing.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

Step = Callable[[], float]


@dataclass(frozen=True)
class Shape:
    """Width, latents, picks per token, tokens per batch."""

    d_model: int
    d_latent: int
    k: int
    batch: int

    def __str__(self) -> str:
        return f"d{self.d_model}_F{self.d_latent}_k{self.k}_N{self.batch}"


SHAPES = {
    "a": Shape(512, 16384, 32, 4096),
    "b": Shape(1024, 32768, 64, 4096),
    "quick": Shape(256, 4096, 32, 1024),
    "quick-variants": Shape(256, 8192, 8, 2048),
}


def make_batch(shape: Shape, device: str = "cpu") -> torch.Tensor:
    """Sparse positive combinations of 4 d random directions, plus noise: [N, d], mean norm about sqrt(d)."""
    generator = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(4 * shape.d_model, shape.d_model, generator=generator), dim=1)
    chosen = torch.randint(4 * shape.d_model, (shape.batch, 24), generator=generator)
    weights = torch.rand(shape.batch, 24, generator=generator)
    x = F.embedding_bag(chosen, directions, per_sample_weights=weights, mode="sum")
    x += 0.02 * torch.randn(x.shape, generator=generator)
    return (x * (shape.d_model**0.5 / x.norm(dim=1).mean())).to(device)


def gemm(shape: Shape) -> Step:
    """The encoder's matrix product alone, in float32 by ``F.linear``: what the dense forward costs at least."""
    x = make_batch(shape)
    W, b = torch.randn(shape.d_latent, shape.d_model), torch.zeros(shape.d_latent)

    def step() -> float:
        return float(F.linear(x, W, b)[0, 0])

    return step


def gemm_onednn(shape: Shape) -> Step:
    """The same product by oneDNN, which is the faster library on some processors."""
    x = make_batch(shape)
    W, b = torch.randn(shape.d_latent, shape.d_model), torch.zeros(shape.d_latent)

    def step() -> float:
        return float(torch.ops.mkldnn._linear_pointwise(x, W, b, "none", [], "")[0, 0])

    return step


def dense(shape: Shape) -> Step:
    """Plain dense PyTorch: the forty lines anyone would write first."""
    x = make_batch(shape)
    W_dec = torch.nn.Parameter(F.normalize(torch.randn(shape.d_latent, shape.d_model), dim=1))
    W_enc = torch.nn.Parameter(W_dec.detach().clone())
    b_enc, b_dec = (torch.nn.Parameter(torch.zeros(n)) for n in (shape.d_latent, shape.d_model))
    parameters = [W_enc, W_dec, b_enc, b_dec]
    optimiser = torch.optim.Adam(parameters, lr=1e-3)

    def step() -> float:
        z = torch.relu(F.linear(x - b_dec, W_enc, b_enc))
        values, indices = z.topk(shape.k)
        x_hat = torch.zeros_like(z).scatter(1, indices, values) @ W_dec + b_dec
        loss = (x_hat - x).square().sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        with torch.no_grad():
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))
        return float(loss.detach())

    return step


def granary(shape: Shape, compute_dtype: str = "float32", kernels: str = "torch", kind: str = "topk") -> Step:
    """This project, whole recipe: AuxK active on F / 64 dead latents, projection, clip, exact Adam."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from gpu_stages.trainee import SITES, make_trainee

    x = make_batch(replace(shape, d_model=shape.d_model * SITES.get(kind, 1)))
    trainee = make_trainee(shape, "cpu", kind=kind, kernels=kernels, compute_dtype=compute_dtype, lr=1e-3)

    def step() -> float:
        return float(trainee.step(x))

    return step


def granary_bfloat16(shape: Shape) -> Step:
    """This project with compute_dtype=bfloat16."""
    return granary(shape, compute_dtype="bfloat16")


def sae_lens(shape: Shape) -> Step:
    """SAELens: SAETrainer.step with a TopKTrainingSAE at its defaults."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    x = make_batch(shape)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=shape.d_model, d_sae=shape.d_latent, k=shape.k))
    config = SAETrainerConfig(
        n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False, total_training_samples=10**9, device="cpu",
        autocast=False, lr=3e-4, lr_end=3e-5, lr_scheduler_name="constant", lr_warm_up_steps=0, adam_beta1=0.9,
        adam_beta2=0.999, lr_decay_steps=0, n_restart_cycles=1, train_batch_size_samples=shape.batch,
        dead_feature_window=1000, feature_sampling_window=2000, logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    trainer = SAETrainer(config, sae, iter([]))

    def step() -> float:
        return float(trainer.step(x).loss.detach())

    return step


def sparsify(shape: Shape) -> Step:
    """EleutherAI sparsify: SparseCoder and the step of its Trainer with optimizer=adam (float32)."""
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # it would look for a GPU
    from sparsify import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    x = make_batch(shape)
    coder = SparseCoder(shape.d_model, SparseCoderConfig(num_latents=shape.d_latent, k=shape.k))
    optimiser = torch.optim.Adam(coder.parameters(), lr=1e-3)
    since_fired = torch.zeros(shape.d_latent, dtype=torch.long)
    coder.set_decoder_norm_to_unit_norm()

    def step() -> float:
        out = coder(x, dead_mask=since_fired > 10_000_000)
        (out.fvu + out.auxk_loss / 32).backward()
        torch.nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        coder.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        optimiser.zero_grad()
        coder.set_decoder_norm_to_unit_norm()
        since_fired.add_(shape.batch)
        since_fired[out.latent_indices.flatten()] = 0
        return float(out.fvu.detach())

    return step


def dictionary_learning(shape: Shape) -> Step:
    """dictionary_learning: TopKTrainer.update."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    x = make_batch(shape)
    trainer = TopKTrainer(
        steps=10**6, activation_dim=shape.d_model, dict_size=shape.d_latent, k=shape.k, layer=0, lm_name="none",
        device="cpu",
    )  # fmt: skip
    count = iter(range(10**9))

    def step() -> float:
        return float(trainer.update(next(count), x))

    return step


PROVIDERS: dict[str, Callable[[Shape], Step]] = {
    "gemm": gemm,
    "gemm-onednn": gemm_onednn,
    "dense": dense,
    "granary": granary,
    "granary-bfloat16": granary_bfloat16,
    "sae-lens": sae_lens,
    "sparsify": sparsify,
    "dictionary-learning": dictionary_learning,
}
PEERS = ("sae-lens", "sparsify", "dictionary-learning")
PACKAGES = {"sae-lens": "sae-lens", "sparsify": "eai-sparsify", "dictionary-learning": "dictionary-learning"}
