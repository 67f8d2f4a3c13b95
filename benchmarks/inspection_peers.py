"""What peers take to look into the latents of a TopK SAE. Runs in the environment where the peers are installed.

    .venv-peers/bin/python benchmarks/inspection_peers.py saedashboard|delphi JOB.json

JOB.json: activations (``.npy``, float32, [rows, T, D]), tokens (``.npy``, [rows, T]), unembedding (``.npy``, [D, V]),
sae (a folder in the peer's own format), latents (how many SAEDashboard is asked for), out, threads. The language model
is replaced by the stored activations, so that its forward costs a peer nothing. Prints one JSON object: seconds,
peak bytes, tokens that were encoded, tokens that there are. Imports torch, numpy and the peer alone.
"""

import importlib
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

PLACE = "blocks.2.hook_resid_post"
ROWS = 32  # contexts of a batch, delphi's default


class Stored(torch.nn.Module):
    """Gives the stored activations of batch after batch of rows, from the first again after the last."""

    def __init__(self, x_RTD: torch.Tensor, unembedding_DV: torch.Tensor) -> None:
        super().__init__()
        self.x_RTD, self.W_U, self.at = x_RTD, unembedding_DV, 0
        self.layer = torch.nn.Identity()
        self.device = torch.device("cpu")
        self.hook_dict: dict[str, Any] = {}

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Those of the next rows, as many as there are tokens'."""
        start, self.at = self.at, (self.at + len(tokens_BT)) % len(self.x_RTD)
        found: torch.Tensor = self.layer(self.x_RTD[start : start + len(tokens_BT)])
        return found

    def run_with_hooks(self, tokens_BT: torch.Tensor, fwd_hooks: list[tuple[str, Any]], **_: Any) -> torch.Tensor:
        """As TransformerLens does it."""
        x_BTD = self.forward(tokens_BT)
        for name, hook in fwd_hooks:
            hook(x_BTD, self.hook_dict[name])
        return x_BTD


class Counting:
    """Counts the tokens that a function of activations is given."""

    def __init__(self, encode: Callable[[torch.Tensor], Any]) -> None:
        self.encode, self.tokens = encode, 0

    def __call__(self, x: torch.Tensor) -> Any:
        self.tokens += x.shape[:-1].numel()
        return self.encode(x)


def saedashboard(job: dict[str, Any], model: Stored, tokens_RT: torch.Tensor) -> int:
    """``SaeVisRunner.run`` for some latents, in batches of 128 as its Neuronpedia runner takes them."""
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_dashboard.sae_vis_runner import SaeVisRunner
    from sae_lens import SAE
    from transformer_lens.hook_points import HookPoint

    model.hook_dict[PLACE] = HookPoint()
    sae = SAE.load_from_disk(job["sae"])
    counting = Counting(sae.encode)
    sae.encode = counting  # type: ignore[method-assign]
    sae.fold_W_dec_norm = lambda: None  # type: ignore[method-assign]  # rows have unit norm; it refuses TopK
    config = SaeVisConfig(hook_point=PLACE, features=list(range(job["latents"])), minibatch_size_features=128)
    SaeVisRunner(config).run(encoder=sae, model=model, tokens=tokens_RT)  # type: ignore[arg-type]
    return counting.tokens


def delphi(job: dict[str, Any], model: Stored, tokens_RT: torch.Tensor) -> int:
    """``LatentCache.run`` and ``save_splits``, with its own encoder of sparsify's SAEs."""
    package = Path(importlib.util.find_spec("delphi").submodule_search_locations[0])  # type: ignore
    for name in ("delphi.latents", "delphi.sparse_coders"):  # their __init__ ask for packages that the cache needs not
        module = ModuleType(name)
        module.__path__ = [str(package / name.partition(".")[2])]
        sys.modules[name] = module
    from delphi.latents.cache import LatentCache
    from delphi.sparse_coders.load_sparsify import sae_dense_latents
    from sparsify import SparseCoder

    sae = SparseCoder.load_from_disk(job["sae"], device="cpu")
    counting = Counting(lambda x: sae_dense_latents(x, sae))
    Path(job["out"]).mkdir()
    cache = LatentCache(model, {"layer": counting}, batch_size=ROWS, log_path=Path(job["out"]))  # type: ignore[arg-type]
    cache.run(tokens_RT.numel(), tokens_RT)
    cache.save_splits(5, Path(job["out"]))
    return counting.tokens


def main() -> None:
    """Run one peer's."""
    job = json.loads(Path(sys.argv[2]).read_text())
    torch.set_num_threads(job["threads"])
    x_RTD, unembedding_DV = (torch.from_numpy(np.load(job[name])) for name in ("activations", "unembedding"))
    tokens_RT = torch.from_numpy(np.load(job["tokens"])).long()
    model = Stored(x_RTD, unembedding_DV)
    start, busy = time.perf_counter(), time.process_time()
    with torch.no_grad():
        encoded = {"saedashboard": saedashboard, "delphi": delphi}[sys.argv[1]](job, model, tokens_RT)
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - start,
                "busy": time.process_time() - busy,
                "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
                "encoded": encoded,
                "tokens": tokens_RT.numel(),
            }
        )
    )


if __name__ == "__main__":
    main()
