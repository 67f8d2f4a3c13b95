"""Which tokens the supervised scores are computed on, from the store's tokens alone, so that every process knows them.

A document is in one of two halves by a hash of the seed and of its first tokens, so that neither one that lies in many
contexts nor one that stands in the corpus twice is in both: probes and latents are chosen on one half, and every figure
is of the other. Of each group of a task, and in each half, the tokens are drawn whose hash of seed and place is least.
N drawn tokens.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from shared.basics.errors import GranaryError
from shared.basics.hashes import U64, seeded
from shared.latents.vocabulary import Vocabulary
from shared.store import Store
from shared.text.beginnings import Beginnings
from shared.text.documents import Ints, Marks, documents
from shared.text.python import looks_like_python, parsed_length
from stage_eval.measure.data import EvaluationData
from stage_eval.supervised.labels import Labeller, strata

AT_ONCE = 64  # neighbouring contexts whose documents are labelled together
LEAST = 20  # tokens of each group that a task needs in each half
LEAST_DOCUMENTS = 2
PURPOSE = 19  # of the seed: the draw of tokens is no other choice's


@dataclass(frozen=True)
class Task:
    """The tokens of one task."""

    name: str
    groups: tuple[str, ...]
    group_N: Ints
    """Which group a drawn token stands for in this task; -1 for none."""

    def rows(self, half_N: Marks) -> Ints:
        """The task's tokens in one half, ascending."""
        return np.flatnonzero((self.group_N >= 0) & half_N)

    def of(self, *groups: str) -> Marks:
        """Which drawn tokens stand for one of these groups, [N]."""
        return np.isin(self.group_N, [self.groups.index(one) for one in groups])


@dataclass(frozen=True)
class Sample:
    """Drawn tokens in the order of the store."""

    context_N: Ints
    """Which of the evaluated contexts."""
    position_N: Ints
    token_N: Ints
    is_test_N: Marks
    document_N: Ints
    """Number of the document within its half."""
    documents: tuple[int, int]
    """Documents of both halves that a token was drawn from."""
    tasks: dict[str, Task]
    left_out: dict[str, str]
    """Tasks without tokens enough, and why."""

    def __len__(self) -> int:
        return len(self.token_N)


@dataclass
class _Drawn:
    """The tokens of a group and a half drawn so far, those of the least hashes."""

    key: U64 = field(default_factory=lambda: np.zeros(0, np.uint64))
    place: Ints = field(default_factory=lambda: np.zeros(0, np.int64))

    def add(self, key: U64, place: Ints, most: int) -> None:
        self.key, self.place = np.append(self.key, key), np.append(self.place, place)
        if len(self.key) > most:
            kept = np.argpartition(self.key, most)[:most]
            self.key, self.place = self.key[kept], self.place[kept]


@dataclass(frozen=True)
class _Part:
    """Trainable tokens of some neighbouring contexts."""

    place_N: Ints
    """In the whole store: context * T + position."""
    token_N: Ints
    document_N: Ints
    bits_N: Ints

    def at(self, rows: Marks) -> "_Part":
        return _Part(self.place_N[rows], self.token_N[rows], self.document_N[rows], self.bits_N[rows])


def draw(store: Store, data: EvaluationData, vocabulary: Vocabulary, seed: int, most: int) -> Sample:
    """Draw at most `most` tokens of each group of each task in each half.

    Raises GranaryError where the text is not Python, and where no task has tokens enough.
    """
    cuts = np.flatnonzero(np.diff(data.contexts) != 1) + 1
    runs = [
        run[start : start + AT_ONCE] for run in np.split(data.contexts, cuts) for start in range(0, len(run), AT_ONCE)
    ]
    if not looks_like_python(store, runs, vocabulary):
        raise GranaryError(
            f"supervised=true needs the labels that Python's own tokenizer gives, and the text of {store.url} is not"
            " Python: evaluate a store of corpus=stdlib or of other source, or leave supervised=false"
        )
    drawn: dict[tuple[str, str, int], _Drawn] = {}
    heads: dict[bytes, int] = {}
    kept: list[_Part] = []
    for part in _parts(store, data, runs, vocabulary, heads):
        half_N = np.array([side(seed, head) for head in heads])[part.document_N]
        key_N = seeded(seed, PURPOSE, part.place_N)
        for task, groups in strata(part.bits_N).items():
            for group, mark_N in groups.items():
                for half in (0, 1):
                    at = mark_N & (half_N == half)
                    drawn.setdefault((task, group, half), _Drawn()).add(key_N[at], part.place_N[at], most)
        kept.append(part.at(np.isin(part.place_N, np.concatenate([one.place for one in drawn.values()]))))
    found = _assembled(store, data, drawn, kept, np.array([side(seed, head) for head in heads]))
    if not found.tasks:
        raise GranaryError(
            f"supervised=true: none of its tasks has {LEAST} tokens of each kind from {LEAST_DOCUMENTS} documents in"
            f" both halves of the {len(heads)} documents in {len(data.contexts)} contexts: give contexts more, or"
            " split=all"
        )
    return found


def side(seed: int, head: bytes) -> int:
    """0: probes are fitted on this document; 1: they are scored on it."""
    return hashlib.sha256(seed.to_bytes(16, "little", signed=True) + head).digest()[0] & 1


def _parts(
    store: Store, data: EvaluationData, runs: Sequence[Ints], vocabulary: Vocabulary, heads: dict[bytes, int]
) -> Iterator[_Part]:
    """The trainable tokens of each run, with their labels; numbers every document that is met in `heads`."""
    labeller, beginnings, T = Labeller(vocabulary), Beginnings(store), store.seq_len
    counted_CT = (data.mask_CT & ~data.bos_CT).numpy()
    done = 0
    for run in runs:
        first, rows = int(run[0]) * T, slice(done, done + len(run))
        done += len(run)
        bits_P, document_P = np.zeros(len(run) * T, np.int64), np.full(len(run) * T, -1)
        for document in documents(store, run, vocabulary):
            here = (document.places >= first) & (document.places < first + len(bits_P))
            here &= document.starts[1:] <= parsed_length(document.text)  # elsewhere labels would be wrong
            at = document.places[here] - first
            bits_P[at] = labeller.bits(document)[here]
            document_P[at] = heads.setdefault(beginnings.head(document), len(heads))
        whole = _Part(np.arange(len(bits_P)) + first, data.tokens_CT[rows].numpy().ravel(), document_P, bits_P)
        yield whole.at(counted_CT[rows].ravel() & (document_P >= 0))


def _assembled(
    store: Store,
    data: EvaluationData,
    drawn: Mapping[tuple[str, str, int], _Drawn],
    parts: Sequence[_Part],
    half_of: Ints,
) -> Sample:
    """The drawn tokens as one table, and the tasks that have enough of them."""
    wanted = np.unique(np.concatenate([one.place for one in drawn.values()]))
    place = np.concatenate([part.place_N for part in parts])
    rows = np.searchsorted(place, wanted)  # places ascend, and every drawn token was kept
    token_N, document_N = (
        np.concatenate([getattr(part, name) for part in parts])[rows] for name in ("token_N", "document_N")
    )
    is_test_N = half_of[document_N] == 1
    numbers, documents = np.zeros(len(wanted), np.int64), []
    for half in (False, True):
        met, numbers[is_test_N == half] = np.unique(document_N[is_test_N == half], return_inverse=True)
        documents.append(len(met))
    tasks: dict[str, Task] = {}
    left_out: dict[str, str] = {}
    for name in dict.fromkeys(task for task, _, _ in drawn):
        groups = {
            group: [np.searchsorted(wanted, drawn[name, group, half].place) for half in (0, 1)]
            for task, group, half in drawn
            if task == name and half == 0
        }
        scarce = {group: why for group, at in groups.items() if (why := _too_few(at, numbers))}
        if name == "kinds" and len(groups) - len(scarce) > 1:
            left_out |= {f"kind {group}": why for group, why in scarce.items()}
            groups = {group: at for group, at in groups.items() if group not in scarce}
        elif scarce:
            left_out[name] = "; ".join(f"{group}: {why}" for group, why in scarce.items())
            continue
        group_N = np.full(len(wanted), -1)
        for number, at in enumerate(groups.values()):
            group_N[np.concatenate(at)] = number
        tasks[name] = Task(name, tuple(groups), group_N)
    context_N = np.searchsorted(data.contexts, wanted // store.seq_len)
    return Sample(
        context_N, wanted % store.seq_len, token_N, is_test_N, numbers, (documents[0], documents[1]), tasks, left_out
    )


def _too_few(at: Sequence[Ints], document_N: Ints) -> str | None:
    """Why a group can't be used; None where it can."""
    for half, rows in zip(("fit probes on", "score them on"), at, strict=True):
        documents = len(np.unique(document_N[rows]))
        if len(rows) < LEAST or documents < LEAST_DOCUMENTS:
            return f"{len(rows)} tokens of {documents} documents to {half}"
    return None
