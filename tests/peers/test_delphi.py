"""delphi's own loader reads the cache that is exported, and finds every example of every latent with its own tokens.

Its module alone is loaded: what its package's ``__init__`` imports besides is not needed for it.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from stage_inspect.export.__main__ import main
from tests.latents import synthetic_latents

pytestmark = pytest.mark.peers
LATENTS = 40


@pytest.fixture(scope="module")
def loader() -> Any:
    package = importlib.util.find_spec("delphi")
    if package is None or not package.submodule_search_locations:
        pytest.skip("delphi is not installed: make setup-peers")
    bare = ModuleType("delphi.latents")
    bare.__path__ = [str(Path(package.submodule_search_locations[0]) / "latents")]
    sys.modules[bare.__name__] = bare
    try:
        from delphi.latents import loader
    except ImportError as error:
        pytest.skip(f"delphi's loader does not load: {error}")
    return loader


def test_its_loader_finds_every_example(loader: Any, tmp_path: Path) -> None:
    latents = synthetic_latents(tmp_path / "latents", LATENTS)
    main([latents.url, str(tmp_path / "out"), "--to", "delphi", "--source", "layers.2"])
    config = SimpleNamespace(non_activating_source="random")
    dataset = loader.LatentDataset(tmp_path / "out" / "latents", SimpleNamespace(), config, tokenizer=object())
    found = {data.latent.latent_index: data.activation_data for buffer in dataset.buffers for data in buffer}
    assert sorted(found) == [latent for latent in range(LATENTS) if latents.table["fired"][latent]]
    for latent, data in found.items():
        examples: dict[tuple[int, int], Any] = {}
        for one in latents.top(latent) + latents.sample(latent):
            examples.setdefault((one.context, one.position), one)  # one that is in both is one row
        rows = data.locations[:, 0].unique().tolist()
        assert len(rows) == len(examples)
        for row, one in zip(rows, examples.values(), strict=True):
            here = data.locations[:, 0] == row
            assert dataset.tokens[row, : len(one.tokens)].tolist() == one.tokens.tolist()
            assert data.locations[here, 1].tolist() == np.flatnonzero(one.values).tolist()
            wanted = torch.from_numpy(one.values[one.values != 0]).half()
            assert torch.equal(data.activations[here], wanted)
