"""What feeds a latent and what it feeds, from a folder of global weights that lies with the run."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shared.basics.errors import GranaryError
from shared.basics.run_folder import RunFolder
from shared.latents import Latents
from shared.latents.global_weights import Connection, GlobalWeights, WeightsLayer
from shared.latents.layout import META

SHOWN = 8


class Pages(Protocol):
    """What is asked of a run's documents."""

    latents: Latents
    feeds: "Feeds | None"

    def named(self, latents: Sequence[int]) -> dict[str, tuple[str | None, list[str]]]:
        """Name and strongest tokens of these latents, by latent."""


@dataclass(frozen=True)
class Feeds:
    """The connections of one dictionary's latents, and which of the runs beside it hold their other ends."""

    weights: GlobalWeights
    own: Sequence[WeightsLayer]
    """Layers that this dictionary reads."""
    served: dict[str, tuple[str, Pages]]
    """By the hash of a dictionary's weights: where its pages are, seen from this run's, and its documents."""

    def of(self, index: int) -> dict[str, Any] | None:
        """Both directions of latent `index` of the dictionary; None for one that the folder does not know."""
        layer = next((one for one in self.own if 0 <= index - one.first < one.num_latents), None)
        if layer is None:
            return None
        ends = (self.weights.sources, self.weights.targets)
        sources, targets = ([self._told(one) for one in end(layer.layer, index - layer.first)[:SHOWN]] for end in ends)
        return {"tokens": self.weights.meta.tokens, "sources": sources, "targets": targets}

    def _told(self, one: Connection) -> list[Any]:
        """[layer, latent, figure, where its page is or None, name or None, tokens that it fires on]."""
        layer = self.weights.layers[one.layer]
        path, documents = self.served.get(layer.sha256 or "", ("", None))
        index = layer.first + one.latent
        if documents is None or index >= documents.latents.num_latents:
            return [one.layer, one.latent, float(f"{one.twera:.4g}"), None, None, []]
        named = documents.named([index])[str(index)]
        return [one.layer, one.latent, float(f"{one.twera:.4g}"), f"{path}#/latent/{index}", *named]


def connect(runs: Sequence[Pages], tell: Callable[[str], object]) -> None:
    """Give each of these runs, served in this order, the global weights that lie with it, and tell of damaged ones."""
    for number, documents in enumerate(runs):
        mine = sha256_of(documents.latents)
        for folder in folders_of(documents.latents):
            try:
                weights = GlobalWeights.open(folder)
            except GranaryError as error:
                tell(f"without what feeds a latent: {error}")
                continue
            own = [one for one in weights.layers.values() if one.sha256 is not None and one.sha256 == mine]
            if own:
                back = "../../" if number else ""
                paths = ("" if n == number else back + (f"with/{n}/" if n else "") for n in range(len(runs)))
                served = {sha256_of(one.latents): (path, one) for path, one in zip(paths, runs, strict=True)}
                documents.feeds = Feeds(weights, own, served)
                break


def sha256_of(latents: Latents) -> str:
    """Return that of the weights that a latents folder was made from."""
    return str(latents.meta.dictionary.get("sha256"))


def folders_of(latents: Latents) -> Iterable[Path]:
    """Folders of global weights in the run, in its parts, and beside it; a run at a URL has none."""
    if "://" in latents.url:
        return []
    run = Path(latents.url).resolve().parent
    places = [run, *sorted(run.iterdir()), run.parent]
    folders = (RunFolder(place).global_weights for place in places)
    return [folder for folder in folders if (folder / META).is_file()]
