"""What ``trace`` gives: a graph with all that can be done with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stage_trace.certificate import Certificate, certify
from stage_trace.files import save
from stage_trace.graph import Graph
from stage_trace.intervene import Change, Mode, Outcome, intervene, predict
from stage_trace.known import Known
from stage_trace.spliced import Spliced, splice_all


@dataclass(frozen=True)
class AttributionGraph(Graph):
    """``nodes``, ``edges``, ``scores`` and ``prune`` of a graph, interventions on its model, and its files."""

    def intervene(self, values: Mapping[str, float] | Sequence[Change], mode: Mode | str = Mode.open) -> Outcome:
        """Set features, by their nodes' ids, and run the model on: see ``stage_trace.intervene``."""
        return intervene(self, values, mode)

    def predict(self, values: Mapping[str, float], *, direct: bool = False) -> Outcome:
        """What the edges say of the same, over paths of every length or over single edges."""
        return predict(self, values, direct=direct)

    def certify(self, most: int = 10, ranked: int = 100) -> Certificate:
        """Ablate the `most` influential features, predicted against actual, and the `ranked` first with all free."""
        return certify(self, most, ranked)

    def spliced(self) -> Spliced:
        """What the model says with all dictionaries in their places, against what it says itself."""
        return splice_all(self.need_session())

    def save(
        self,
        folder: str | Path,
        *,
        certificate: Certificate | None = None,
        spliced: Spliced | None = None,
        latents: Sequence[str | Path] | None = None,
    ) -> list[Path]:
        """Write ``graph.json``, its index and ``graph.html``; returns where they are.

        The page shows examples from `latents`, folders of ``granary inspect``; None: those beside the dictionaries.
        """
        sources = [] if self.session is None else list(dict.fromkeys(one for one, _ in self.session.sources.values()))
        known = Known.find(sources, None if latents is None else list(map(str, latents)))
        return save(self, Path(folder), certificate, known, spliced)
