"""Attach and fit on the bundled model against harvest and train, on the same tokens by the same recipe."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import granary
from shared.basics.config import Split
from shared.bundled import MODEL_DIR
from shared.sae import SAE, SAEConfig
from shared.store import Store
from shared.store.choose import choose_contexts

pytestmark = pytest.mark.slow

HOOK = "layers.2.resid_post"
T, BATCH, TOKENS = 512, 1024, 400_000
HARVEST = (
    f"model=bundled corpus=stdlib hooks.layers=2 packing=joined packing.seq_len={T} store.dtype=float32 "
    "corpus.contexts=1000 run_dir=. device.threads=1"
)
RECIPE = [f"stream.batch_size={BATCH}", "logger.progress=false", "checkpoint.every=0", "device.threads=1"]


def run(folder: Path, stage: str, *words: str) -> None:
    done = subprocess.run([sys.executable, "-m", stage, *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def fvu(sae: SAE, x_ND: torch.Tensor) -> float:
    errors = (sae(x_ND).x_hat - x_ND).square().sum()
    return float(errors / (x_ND - x_ND.mean(0)).square().sum())


def test_fvu_within_two_percent_of_harvest_and_train(tmp_path: Path) -> None:
    run(tmp_path, "stage_harvest", *HARVEST.split())
    keys = ["run_dir=.", "sae.k=16", "sae.expansion=8", f"schedule.tokens={TOKENS}", "logger.curves=false"]
    run(tmp_path, "stage_train", *keys, *RECIPE)
    store = Store.open(str(tmp_path / "store"))
    committed = [shard for shard in sorted(store.committed()) if shard not in store.heldout_shards]
    contexts = [context for shard in committed for context in store.shard_contexts(shard)]
    tokens = [torch.from_numpy(store.tokens(contexts[at : at + 8])).long() for at in range(0, len(contexts), 8)]
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0)).tolist()
    model = granary.load_causal_lm(MODEL_DIR)
    with granary.attach(model, {HOOK: SAEConfig(k=16, expansion=8)}) as saes:
        granary.fit(saes, [tokens[at] for at in order], tokens=TOKENS, overrides=RECIPE)
        fitted = saes[HOOK]
    heldout = choose_contexts(store, Split.heldout, None).tolist()
    rows = [
        store.read_context(HOOK, context).float()[torch.from_numpy(mask)]
        for context, mask in zip(heldout, store.mask(heldout), strict=True)
    ]
    x_ND = torch.cat(rows)
    trained = fvu(SAE.from_pretrained(tmp_path / "sae"), x_ND)
    assert fvu(fitted, x_ND) == pytest.approx(trained, rel=0.02), (fvu(fitted, x_ND), trained)
    print(f"FVU on {len(x_ND):,} held-out tokens: fit {fvu(fitted, x_ND):.5f}, train {trained:.5f}")  # noqa: T201
