"""A store of made-up Python source, in the bundled model's tokens, whose activations say what Python's tokenizer says.

Shapes: S contexts, T positions, D width. Dimension i of a token is 1 where it has label i of `BITS`, else 0, with a
little noise.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from shared.latents.vocabulary import Vocabulary
from shared.lm.token_bytes import token_bytes
from shared.lm.tokenizer import load_tokenizer, special_ids
from shared.sae.config import SAEConfig
from shared.sae.sites import Sites
from shared.sae.variants import SAE
from shared.store import Store
from shared.text.documents import documents
from stage_eval.supervised.labels import BITS, Labeller, has
from stage_harvest.config import BosPlacement, LongDocuments, PackingMode
from stage_harvest.tokens.packing import Packer
from tests.synthetic import synthetic_plan

HOOK = "layers.2.resid_post"
T, D = 128, len(BITS)
WORDS = ("cat", "dog", "stone", "river", "Light", "North", "paper", "window", "Seven", "garden")


def source(number: int) -> str:
    """A module of its own, with something of every label."""
    rng = np.random.default_rng(number)

    def name(count: int = 2) -> str:
        return "_".join(rng.choice(WORDS, count).tolist()).lower()

    def prose() -> str:
        return " ".join(rng.choice(WORDS, 5).tolist())

    lines = [f'"""{prose()}."""', f"import {name()}, {name()}", f"from {name(1)}.{name(1)} import {name()}", ""]
    for _ in range(2):
        lines += [
            f"@{name(1)}",
            f"class {name().title()}:",
            f'    """{prose()}."""',
            f"    def __init__(self, {name(1)}={rng.integers(100)}, {name(1)}=None):  # {prose()}",
            f"        self.{name()} = {name()}({rng.integers(1000)}, '{prose()}')",
            f"        if self.{name()} is None and {name()}.{name()}(True):",
            f"            raise {name(1).title()}Error('{name()}')",
            f"        {name()}.__{name(1)}__ = {name()}",
            f"        return self.{name()}({name()}[{rng.integers(9)}].{name()}.{name(1)}())",
            "",
        ]
    return "\n".join(lines)


def packed(sources: list[str]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Contexts of these documents, split where they do not fit."""
    tokenizer = load_tokenizer("bundled")
    packer = Packer(
        mode=PackingMode.isolated, seq_len=T, special=special_ids(tokenizer), bos=BosPlacement.context,
        long_documents=LongDocuments.split, drop_last=False, mask_special=True, mask_first=0,
    )  # fmt: skip
    return packer.pack([np.array(tokenizer.encode(text, add_special_tokens=False), np.int32) for text in sources])


def python_store(folder: Path, sources: list[str]) -> Store:
    """The store, without held-out contexts."""
    contexts = list(packed(sources))
    packing = {"mode": "isolated", "long_documents": "split", "bos": "context"}
    plan = synthetic_plan(
        len(contexts), T, D, hooks={HOOK: D}, dtype="float32", heldout_fraction=0.0,
        provenance={"model": {"id": "bundled", "dtype": "float32"}, "packing": packing},
    )  # fmt: skip
    store = Store.create(folder, plan, *(np.stack(column) for column in zip(*contexts, strict=True)))
    tokenizer = load_tokenizer("bundled")
    vocabulary = Vocabulary.of(token_bytes(tokenizer), special_ids(tokenizer).all)
    labeller, bits_P = Labeller(vocabulary), np.zeros(len(contexts) * T, np.int64)
    for document in documents(store, np.arange(len(contexts)), vocabulary):
        bits_P[document.places] = labeller.bits(document)
    x_PD = np.stack([has(bits_P, name) for name in BITS], axis=1).astype(np.float32)
    x_STD = torch.from_numpy(x_PD).view(len(contexts), T, D)
    x_STD += 0.01 * torch.randn(x_STD.shape, generator=torch.Generator().manual_seed(0))
    for shard in store.pending():
        span = store.shard_contexts(shard)
        store.write_shard(shard, {HOOK: x_STD[span.start : span.stop].contiguous()})
    store.finalize()
    return store


def label_sae(folder: Path, *, first: int = 0) -> None:
    """Latent `first` + i, modulo D, fires on what has label i, and writes that label's dimension."""
    config = SAEConfig(
        d_model=D, d_latent=D, activation="relu", k=None, normalisation="none", pre_bias=False, sites=Sites.of(HOOK)
    )
    sae = SAE(config)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(D).roll(first, 0))
        sae.W_dec.copy_(sae.W_enc)
        sae.b_enc.fill_(-0.1)
    sae.save_pretrained(folder)
