"""Train one peer's TopK SAE or transcoder on dumped activations and score it. Runs in the peers' environment.

    .venv-peers/bin/python benchmarks/quality_peers.py JOB.json

JOB.json: kind (sae, transcoder, skip_transcoder), provider, lr (null: the peer's own recipe), warmup, decay, seed,
threads, k, d_latent, batch_size, out, train, and scored (the parts of ``score_all``); train and each part are what is
read and what must be produced, ``.npy``, float32, [tokens, d_model], in training order, one file twice for an SAE.
Imports torch, numpy, dill and the peer alone. A run that was killed goes on, with the same command, from what it saved
last beside JOB.json, which it does every `SAVE_SECONDS`, or the job's ``save_seconds``.

How long a latent must be silent for AuxK to take it for dead is the peer's own: 10 M tokens, or 1,000 steps of SAELens,
so that AuxK never begins in shorter runs. The providers of `EARLY` take it for dead after a twentieth of the run.

At lr null the peer's optimiser, rate and schedule are its own, with the warm-up cut to the share `warmup` of the run
where it would not end; at a given lr every peer uses Adam, warmed up over the share `warmup` and decayed linearly,
which all of them offer, over the share `decay`. Both sides are scaled to mean norm sqrt(d_model) for all. Shape
letters: N tokens, D d_model, F latents.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import dill
import numpy as np
import torch

SAVE_SECONDS = 300.0
dill.settings["byref"] = True  # classes and functions of this file by name

Sides = tuple[torch.Tensor, torch.Tensor]
"""What is read and what must be produced, [N, D] each."""
Reconstruct = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""``Contender.reconstruct``."""


class Contender(Protocol):
    """A peer in training."""

    def step(self, x_ND: torch.Tensor, y_ND: torch.Tensor, number: int) -> None:
        """Learn from one batch to produce y from x, which is y for an SAE."""

    def finish(self) -> None:
        """After the last step."""

    def reconstruct(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is produced, [N, D], and which latents fired, bool [F]."""


def rate(number: int, steps: int, warmup: int, decay: int) -> float:
    """Share of the peak rate at step `number`, counted from 0."""
    return min(1.0, (number + 1) / max(1, warmup), (steps - number) / (decay + 1))


class SAELens:
    """``SAETrainer.step`` with a TopKTrainingSAE."""

    def __init__(self, d: int, job: dict[str, Any], steps: int) -> None:
        from sae_lens.config import LoggingConfig, SAETrainerConfig
        from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.training.sae_trainer import SAETrainer

        lr, batch = job["lr"], job["batch_size"]
        self.sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d, d_sae=job["d_latent"], k=job["k"]))
        config = SAETrainerConfig(
            n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False, device="cpu", autocast=False,
            total_training_samples=steps * batch, train_batch_size_samples=batch,
            lr=lr or 3e-4, lr_end=(lr or 3e-4) / 10, lr_scheduler_name="constant",  # lr_end: for cosine alone
            lr_warm_up_steps=0 if lr is None else round(job["warmup"] * steps),
            lr_decay_steps=0 if lr is None else round(job["decay"] * steps),
            n_restart_cycles=1, adam_beta1=0.9, adam_beta2=0.999,
            dead_feature_window=job.get("dead_after", 1000 * batch) // batch,
            feature_sampling_window=2000, logger=LoggingConfig(log_to_wandb=False),
        )  # fmt: skip
        self.trainer = SAETrainer(config, self.sae, iter([]))

    def step(self, x_ND: torch.Tensor, y_ND: torch.Tensor, number: int) -> None:
        self.trainer.step(x_ND)
        self.trainer.n_training_steps += 1

    def finish(self) -> None:
        pass

    def reconstruct(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents = self.sae.encode(x_ND)
        latents = latents.to_dense() if latents.is_sparse else latents
        return self.sae.decode(latents), (latents > 0).any(0)


class DictionaryLearning:
    """``TopKTrainer.update``."""

    def __init__(self, d: int, job: dict[str, Any], steps: int) -> None:
        from dictionary_learning.trainers.top_k import TopKTrainer

        self.trainer = TopKTrainer(
            steps=steps, activation_dim=d, dict_size=job["d_latent"], k=job["k"], layer=0, lm_name="none",
            lr=job["lr"], warmup_steps=min(1000, round(job["warmup"] * steps)), seed=job["seed"], device="cpu",
            decay_start=None if job["lr"] is None else steps - round(job["decay"] * steps),
        )  # fmt: skip
        self.trainer.dead_feature_threshold = job.get("dead_after", self.trainer.dead_feature_threshold)

    def step(self, x_ND: torch.Tensor, y_ND: torch.Tensor, number: int) -> None:
        self.trainer.update(number, x_ND)

    def finish(self) -> None:
        pass

    def reconstruct(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents = self.trainer.ae.encode(x_ND, use_threshold=False)
        return self.trainer.ae.decode(latents), (latents > 0).any(0)


class Sparsify:
    """SparseCoder and the step of sparsify's Trainer, whose own loop needs the language model."""

    def __init__(self, d: int, job: dict[str, Any], steps: int) -> None:
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # it would look for a GPU wherever triton is installed
        from sparsify import SparseCoderConfig
        from sparsify.sparse_coder import SparseCoder

        num_latents, self.transcodes = job["d_latent"], job["kind"] != "sae"
        config = SparseCoderConfig(
            num_latents=num_latents,
            k=job["k"],
            transcode=self.transcodes,
            skip_connection=job["kind"] == "skip_transcoder",
        )
        self.coder = SparseCoder(d, config, dtype=torch.float32)
        self.since_fired_F = torch.zeros(num_latents, dtype=torch.long)
        self.steps, self.lr, self.dead_after = steps, job["lr"], job.get("dead_after", 10_000_000)
        self.warmup, self.decay = round(job["warmup"] * steps), round(job["decay"] * steps)
        self.optimiser: Any
        if self.lr is None:  # its default: schedule-free signum, no AuxK
            from schedulefree import ScheduleFreeWrapper
            from sparsify.sign_sgd import SignSGD

            lr = 5e-3 / (num_latents / 2**14) ** 0.5
            self.optimiser = ScheduleFreeWrapper(SignSGD(self.coder.parameters(), lr=lr), momentum=0.95)
            self.optimiser.train()
        else:
            self.optimiser = torch.optim.Adam(self.coder.parameters(), lr=self.lr)

    def step(self, x_ND: torch.Tensor, y_ND: torch.Tensor, number: int) -> None:
        if number == 0:  # where its Trainer begins
            self.coder.b_dec.data = y_ND.mean(0)
            if self.transcodes:
                self.coder.encoder.bias.data = -x_ND.mean(0) @ self.coder.encoder.weight.data.T
        if not self.transcodes:  # whose decoder its Trainer leaves free
            self.coder.set_decoder_norm_to_unit_norm()
        out = self.coder(x_ND, y_ND, dead_mask=self.since_fired_F > self.dead_after if self.lr else None)
        (out.fvu + out.auxk_loss / 32).backward()
        if not self.transcodes:
            self.coder.remove_gradient_parallel_to_decoder_directions()
        if self.lr is not None:
            self.optimiser.param_groups[0]["lr"] = self.lr * rate(number, self.steps, self.warmup, self.decay)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.since_fired_F += len(x_ND)
        self.since_fired_F[out.latent_indices.flatten()] = 0

    def finish(self) -> None:
        if self.lr is None:
            self.optimiser.eval()
        if not self.transcodes:
            self.coder.set_decoder_norm_to_unit_norm()

    def reconstruct(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.coder(x_ND)
        fired_F = torch.zeros(self.coder.num_latents, dtype=torch.bool)
        fired_F[out.latent_indices[out.latent_acts > 0]] = True
        return out.sae_out, fired_F


CONTENDERS: dict[str, Callable[[int, dict[str, Any], int], Contender]] = {
    "sparsify": Sparsify,
    "dictionary-learning": DictionaryLearning,
    "sae-lens": SAELens,
}
EARLY = {f"{provider}-auxk-early": provider for provider in CONTENDERS}
"""The same, with AuxK from a twentieth of the run on, where ours begins by default."""
TRANSCODER_TRAINERS = ("sparsify",)
"""The others train SAEs alone."""


@torch.no_grad()
def score(reconstruct: Reconstruct, sides: Sides, chunk: int) -> dict[str, float]:
    """FVU about the mean, and the share of latents that do not fire; sums in float64."""
    error, fired_F = 0.0, None
    for x_ND, y_ND in zip(*(side_ND.split(chunk) for side_ND in sides), strict=True):
        y_hat_ND, now_F = reconstruct(x_ND)
        error += float((y_ND.double() - y_hat_ND.double()).square().sum())
        fired_F = now_F if fired_F is None else fired_F | now_F
    wanted_ND = sides[1].double()
    variance = float((wanted_ND - wanted_ND.mean(0)).square().sum())
    assert fired_F is not None
    return {"fvu": error / variance, "dead": 1 - float(fired_F.float().mean())}


def score_all(reconstruct: Reconstruct, scored: dict[str, Sides], chunk: int) -> dict[str, float]:
    """``score`` of the test tokens, and the FVU of the validation tokens to choose by. If there is a census, which is
    many training tokens: the share of latents that fire on none of those, ``dead_in_census``."""
    found = {part: score(reconstruct, sides, chunk) for part, sides in scored.items()}
    dead = {"dead_in_census": found["census"]["dead"]} if "census" in found else {}
    return {**found["test"], "validation_fvu": found["validation"]["fvu"], **dead}


@dataclass
class Progress:
    """A run as far as it has come."""

    job: dict[str, Any]
    contender: Contender
    generator: torch.Tensor
    """State of torch's generator."""
    steps: int = 0
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Whole or not at all; by dill, since a peer's schedule may be a lambda."""
        self.generator = torch.get_rng_state()
        part = path.with_suffix(".part")
        torch.save(self, part, pickle_module=dill)
        part.replace(path)


def progress_of(job: dict[str, Any], path: Path, d: int, steps: int) -> Progress:
    """What an earlier process saved of this job, or its beginning."""
    if path.exists():
        found: Progress = torch.load(path, pickle_module=dill, weights_only=False)
        if found.job == job:
            torch.set_rng_state(found.generator)
            return found
    settings = dict(job)
    if job["provider"] in EARLY:
        settings |= {"provider": EARLY[job["provider"]], "dead_after": steps * job["batch_size"] // 20}
    return Progress(job, CONTENDERS[settings["provider"]](d, settings, steps), torch.get_rng_state())


def main() -> None:
    path = Path(sys.argv[1])
    job, saved = json.loads(path.read_text()), path.with_suffix(".saved")
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    train = [np.load(path, mmap_mode="r") for path in job["train"]]
    batch, d = job["batch_size"], train[0].shape[1]
    scales = [d**0.5 / float(np.linalg.norm(side[: 50 * batch], axis=1).mean()) for side in train]
    steps = len(train[0]) // batch
    progress = progress_of(job, saved, d, steps)
    contender, every = progress.contender, job.get("save_seconds", SAVE_SECONDS)
    save_at = time.perf_counter() + every
    start = time.perf_counter() - progress.seconds
    for number in range(progress.steps, steps):
        rows = slice(number * batch, (number + 1) * batch)
        x_ND, y_ND = (torch.from_numpy(side[rows] * scale) for side, scale in zip(train, scales, strict=True))
        contender.step(x_ND, y_ND, number)
        now = time.perf_counter()
        progress.steps, progress.seconds = number + 1, now - start
        if now > save_at:
            progress.save(saved)
            save_at = time.perf_counter() + every
    contender.finish()
    scored = {
        part: tuple(torch.from_numpy(np.load(path) * scale) for path, scale in zip(paths, scales, strict=True))
        for part, paths in job["scored"].items()
    }
    result = score_all(contender.reconstruct, scored, batch)
    Path(job["out"]).write_text(json.dumps({**result, "seconds": progress.seconds}))
    saved.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
