"""A small random LLaMA with the bundled tokenizer, a corpus, and the harvest's command line over them."""

import filecmp
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shared.bundled import MODEL_DIR
from shared.store import Store
from tests.cli import REPOSITORY, ForkServer, Result

D, T, LAYERS, VOCAB = 16, 32, 3, 4096
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}


def make_model(folder: Path, model: torch.nn.Module) -> Path:
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, folder / name)
    return folder


class Harvests:
    """The stage, over what `keys` say."""

    def __init__(self, root: Path, server: ForkServer) -> None:
        self.root, self.server = root, server

    def keys(self, store: str) -> dict[str, object]:
        """The configuration of a harvest into a store of that name."""
        raise NotImplementedError

    def arguments(self, store: str = "store", **changes: object) -> list[str]:
        """The command line; `__` in a keyword stands for a dot, None leaves a key out."""
        keys = self.keys(store) | {key.replace("__", "."): value for key, value in changes.items()}
        return [f"{key}={value}" for key, value in keys.items() if value is not None]

    def run(self, store: str = "store", **changes: object) -> Result:
        return self.server.run("stage_harvest", *self.arguments(store, **changes))

    def harvest(self, store: str = "store", **changes: object) -> Store:
        result = self.run(store, **changes)
        assert result.code == 0, result.stderr
        return Store.open(self.root / store)


class Harvester(Harvests):
    """A model, a corpus, and the stage."""

    def __init__(self, root: Path, server: ForkServer) -> None:
        super().__init__(root, server)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=D,
            intermediate_size=24,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.3,
        )
        self.model = make_model(root / "tiny", LlamaForCausalLM(config))
        rng = np.random.default_rng(0)
        words = ["def", "return", "class", "if", "else", "x", "y", "self", "value", "of", "the", "a", "list", "None"]
        self.documents = [" ".join(rng.choice(words, length)) for length in rng.integers(5, 60, 24)]
        self.corpus = root / "corpus.txt"
        self.corpus.write_text("\n---\n".join(self.documents))

    def keys(self, store: str) -> dict[str, object]:
        return {
            "model": self.model,
            "run_dir": self.root / "run",
            "store.url": self.root / store,
            "corpus": "text",
            "corpus.files": self.corpus,
            "corpus.separator": "---",
            "packing.seq_len": T,
            "hooks.layers": 1,
            "store.shard_contexts": 4,
            "store.dtype": "float32",
            "batch_contexts": 2,
            "device.threads": 1,
        }


def twice_the_text(root: Path, server: ForkServer) -> Harvester:
    """A harvester with twice the documents: enough for a store with a window."""
    made = Harvester(root, server)
    made.documents *= 2
    made.corpus.write_text("\n---\n".join(made.documents))
    return made


def same_files(left: Path, right: Path) -> int:
    """Number of files of two folders, which must hold the same bytes."""
    names = [
        sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()) for root in (left, right)
    ]
    assert names[0] == names[1]
    assert filecmp.cmpfiles(left, right, names[0], shallow=False) == (names[0], [], [])
    return len(names[0])
