"""A store of Python text with planted activations, a dictionary whose latents are known, and the folder of them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from shared.sae.config import SAEConfig
from shared.sae.sites import Sites
from shared.sae.variants import SAE
from shared.store import Store
from shared.text import python
from stage_inspect.inspect import inspect
from tests.inspection import HOOK, inspect_config
from tests.synthetic import synthetic_plan

SOURCE = '''\
"""Module text."""
import os.path as p
from a.b import c

@wraps(x)
class Dog(Animal):
    """A dog."""

    def bark(self, times: int = 3, *, loud=True) -> None:
        # noise
        if times > 0x1F: raise ValueError("no" + f"{self.name!r}")
        return self.bark(times=[1.5, None])
'''


COPIES = 16


def planted(folder: Path) -> Store:
    """A store of documents of Python text by bytes; activations say which are digits, and which are of ``self``."""
    data = (SOURCE * COPIES).encode()
    T, D = 96, 8
    contexts = len(data) // T
    tokens = np.frombuffer(data, np.uint8)[: contexts * T].reshape(contexts, T).astype(np.int32) + 1
    packing = {"mode": "isolated", "long_documents": "split", "bos": "none"}
    plan = synthetic_plan(
        contexts, T, D, hooks={HOOK: D}, dtype="float32", heldout_fraction=0.3,
        provenance={"model": {"id": "planted"}, "packing": packing},
    )  # fmt: skip
    text = data.decode()
    spans = python.spans(text)
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(contexts * T, D)).astype(np.float32)) * 0.01
    for feature, name in ((0, "number"), (1, "self"), (2, "comment")):
        for start, stop in spans[name]:
            x[start : min(stop, len(x)), feature] += 1
    copy = np.arange(contexts * T).reshape(contexts, T) // len(SOURCE.encode())
    segments = (copy - copy[:, :1]).astype(np.int32)  # one document for each copy, most of them in several contexts
    store = Store.create(folder, plan, tokens, np.ones_like(tokens, bool), segments)
    for shard in store.pending():
        span = store.shard_contexts(shard)
        store.write_shard(shard, {HOOK: x.view(contexts, T, D)[span.start : span.stop].contiguous()})
    store.finalize()
    return store


def planted_study(folder: Path) -> Path:
    """The planted store, a dictionary whose latents 3, 4 and 5 are its features, and the latents folder."""
    planted(folder / "store")
    config = SAEConfig(d_model=8, d_latent=8, k=2, normalisation="none", pre_bias=False, sites=Sites.of(HOOK))
    sae = SAE(config)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(8).roll(3, 0))  # latent 3 is feature 0, 4 is 1, 5 is 2
        sae.W_dec.copy_(sae.W_enc)
    sae.save_pretrained(folder / "sae")
    vocabulary = [b"<s>", *(bytes([byte]) for byte in range(256))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stage_inspect.finish.finish.recorded_vocabulary", lambda *_: (vocabulary, (0,)))
        inspect(inspect_config(folder))
    return folder
