"""The peers' part of ``race.py``, and its ruler. Runs in the peers' environment.

    .venv-peers/bin/python benchmarks/race_jobs.py sparsify|sae-lens|score JOB.json

Each reads one JSON job. ``sparsify`` and ``sae-lens`` go from a JSON-lines file of texts to trained dictionaries in
``out``, by their own trainers as their documentation shows them, at their defaults but for what the race fixes: model,
text, context length, tokens, batch, width, k, layers. ``score`` computes the FVU of every dictionary that was trained,
by whomever, on the same held-out text. Shape letters: N tokens, D d_model.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch


def sparsify(job: dict[str, Any]) -> None:
    """All layers of the job in one run of sparsify's ``Trainer``, which is how it trains several."""
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # it would look for a GPU wherever triton is installed
    from datasets import load_dataset
    from sparsify import SparseCoderConfig, TrainConfig, Trainer
    from sparsify.data import chunk_and_tokenize
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(job["model"], dtype=torch.float32)
    texts = load_dataset("json", data_files=job["texts"], split="train")
    tokens = chunk_and_tokenize(texts, AutoTokenizer.from_pretrained(job["model"]), max_seq_len=job["context"])
    tokens = tokens.shuffle(42).select(range(job["tokens"] // job["context"]))
    config = TrainConfig(
        SparseCoderConfig(num_latents=job["d_latent"], k=job["k"]),
        batch_size=job["batch"] // job["context"],
        hookpoints=[f"layers.{layer}" for layer in job["layers"]],
        log_to_wandb=False,
        save_dir=job["out"],
        run_name="run",
    )
    Trainer(config, tokens, model).fit()


def sae_lens(job: dict[str, Any]) -> None:
    """One run of SAELens' training runner for each layer of the job, which is how it trains several."""
    from datasets import load_dataset
    from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAEConfig

    for layer in job["layers"]:
        config = LanguageModelSAERunnerConfig(
            sae=TopKTrainingSAEConfig(d_in=job["d_model"], d_sae=job["d_latent"], k=job["k"]),
            model_name=job["model"],
            model_class_name="AutoModelForCausalLM",
            hook_name=f"model.layers.{layer}",
            is_dataset_tokenized=False,
            context_size=job["context"],
            training_tokens=job["tokens"],
            train_batch_size_tokens=job["batch"],
            store_batch_size_prompts=job["batch"] // job["context"],
            checkpoint_path=None,
            output_path=f"{job['out']}/layers.{layer}",
            logger=LoggingConfig(log_to_wandb=False),
        )
        texts = load_dataset("json", data_files=job["texts"], split="train")
        LanguageModelSAETrainingRunner(config, override_dataset=texts).run()


@torch.no_grad()
def score(job: dict[str, Any]) -> None:
    """Write the FVU of each of ``dictionaries`` (folder, layer): held-out contexts, all positions but the first.

    FVU is the sum of squared errors over that of the distances to the mean activation; sums in float64.
    """
    from transformers import AutoModel, AutoTokenizer

    from shared.sae.loading import load

    model = AutoModel.from_pretrained(job["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    lines = Path(job["heldout"]).read_text(encoding="utf-8").splitlines()
    ids = [i for line in lines for i in tokenizer(json.loads(line)["text"], add_special_tokens=False).input_ids]
    length = job["context"] - 1
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    contexts = [[first, *ids[at : at + length]] for at in range(0, len(ids) - length, length)]
    found = {}
    for layer in sorted({layer for _, layer in job["dictionaries"]}):
        rows: list[torch.Tensor] = []
        with model.layers[layer].register_forward_hook(
            lambda module, given, out, rows=rows: rows.append(out[0] if isinstance(out, tuple) else out)
        ):
            for at in range(0, len(contexts), 16):
                model(input_ids=torch.tensor(contexts[at : at + 16]))
        x_ND = torch.cat([part[:, 1:].flatten(0, 1) for part in rows])
        variance = float((x_ND.double() - x_ND.double().mean(0)).square().sum())
        for folder, its in job["dictionaries"]:
            if its != layer:
                continue
            dictionary = load(folder)
            error = sum(
                float((part_ND.double() - dictionary(part_ND).x_hat.double()).square().sum())
                for part_ND in x_ND.split(2048)
            )
            found[folder] = error / variance
    Path(job["out"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    what, path = sys.argv[1:]
    given = json.loads(Path(path).read_text(encoding="utf-8"))
    torch.set_num_threads(given["threads"])
    torch.manual_seed(0)
    {"sparsify": sparsify, "sae-lens": sae_lens, "score": score}[what](given)
