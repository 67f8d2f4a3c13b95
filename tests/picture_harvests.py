"""Harvests of rows with images: a small model of a family, the corpus, and the stages' command lines."""

from pathlib import Path

from transformers import PreTrainedModel

from tests import picture_corpus
from tests.cli import ForkServer
from tests.harvesting import Harvests
from tests.picture_models import picture_model

SITES = ("layers.2.resid_pre", "layers.2.mlp_out")
TIMES = 4


class Pictures(Harvests):
    """A model of a family and rows for it, below one folder; `text` changes its decoder's configuration."""

    def __init__(self, family: str, root: Path, server: ForkServer, **text: int) -> None:
        super().__init__(root, server)
        self.whole: PreTrainedModel = picture_model(family, root / family, **text)
        self.model = root / family
        self.corpus = picture_corpus.write(root / "rows.parquet", TIMES)

    def keys(self, store: str) -> dict[str, object]:
        return {
            "model": self.model, "run_dir": self.root / "run", "store.url": self.root / store, "corpus": "parquet",
            "corpus.files": self.corpus, "corpus.column": "messages", "corpus.images": "images",
            "packing": "separate", "packing.seq_len": 320, "hooks.layers": 2, "hooks.sites": "[resid_pre,mlp_out]",
            "store.shard_contexts": 6, "store.dtype": "float32", "device.threads": 1,
        }  # fmt: skip
