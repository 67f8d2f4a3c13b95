"""``stream.kinds``: which tokens are left, their statistics, what is refused; and the scores of each kind."""

from pathlib import Path

import numpy as np
import pytest
import torch

from shared.basics.config import Split, TokenKind
from shared.basics.errors import GranaryError
from shared.store import Store
from shared.store.format.image_table import ASSISTANT, IMAGE, MARKS_KIND, TEXT
from stage_eval.measure.data import load_data
from stage_eval.measure.kinds import KINDS, kind_figures
from stage_eval.measure.sums import ReconstructionSums
from stage_train.data.kinds import kind_statistics, restrict_kinds
from stage_train.data.stores import PinnedStore
from stage_train.data.stream import TrainingData
from stage_train.state.identity import identity
from tests.pictured_store import pictured_store

SITE = "layers.2.resid_post"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return pictured_store(tmp_path_factory.mktemp("kinds") / "store")


def pinned(store: Store) -> PinnedStore:
    return PinnedStore(store, 1.0, tuple(s for s in store.committed() if s not in store.heldout_shards))


def chosen(store: Store, contexts: np.ndarray, kind: TokenKind) -> np.ndarray:
    """The slow reading: one position at a time."""
    kinds, mask = store.pictures.kind(contexts), store.mask(contexts)
    found = np.zeros(kinds.shape, bool)
    for place, value in np.ndenumerate(kinds):
        is_of = {
            TokenKind.text: value & MARKS_KIND == TEXT,
            TokenKind.image: value & MARKS_KIND == IMAGE,
            TokenKind.assistant: value & ASSISTANT > 0,
        }
        found[place] = mask[place] and is_of[kind]
    return found


def rows(store: Store, contexts: np.ndarray, chosen_CT: np.ndarray) -> torch.Tensor:
    """The activations of the chosen positions, [N, D]."""
    read = (store.read_context(SITE, int(context)) for context in contexts)
    return torch.cat([x_TD[torch.from_numpy(row)] for x_TD, row in zip(read, chosen_CT, strict=True)])


@pytest.mark.parametrize("kind", TokenKind)
def test_what_is_left_and_its_statistics(store: Store, kind: TokenKind) -> None:
    part = pinned(store)
    data = TrainingData([part.slice])
    before = data.num_tokens
    restrict_kinds(data, [part], None)
    assert data.num_tokens == before
    restrict_kinds(data, [part], [kind])
    wanted_CT = chosen(store, part.slice.contexts, kind)
    assert 0 < data.num_tokens == wanted_CT.sum() < before
    assert np.array_equal(data.mask_of(np.arange(data.num_contexts)), wanted_CT)
    x_ND = rows(store, part.slice.contexts, wanted_CT).double().numpy()
    found, norm_N = kind_statistics(part, [kind], SITE), np.linalg.norm(x_ND, axis=1)
    assert found.count == len(x_ND)
    np.testing.assert_allclose(found.mean, x_ND.mean(0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.var, x_ND.var(0), rtol=1e-9)
    expected = (norm_N.mean(), np.sqrt((norm_N**2).mean()), np.median(norm_N), norm_N.max())
    assert (found.mean_norm, found.rms_norm, found.median_norm, found.max_norm) == pytest.approx(expected)


def test_kinds_together_are_their_union(store: Store) -> None:
    part = pinned(store)
    data = TrainingData([part.slice])
    restrict_kinds(data, [part], [TokenKind.image, TokenKind.assistant])
    image, assistant = (chosen(store, part.slice.contexts, kind) for kind in (TokenKind.image, TokenKind.assistant))
    assert np.array_equal(data.mask_of(np.arange(data.num_contexts)), image | assistant)


def test_what_can_not_be_chosen_is_refused(store: Store, tmp_path: Path, planted_store: object) -> None:
    part = pinned(store)
    with pytest.raises(GranaryError, match="name one or more, each once"):
        restrict_kinds(TrainingData([part.slice]), [part], [])
    unmarked = pinned(pictured_store(tmp_path / "unmarked", assistant=False))
    with pytest.raises(GranaryError, match="does not mark what the assistant said"):
        restrict_kinds(TrainingData([unmarked.slice]), [unmarked], [TokenKind.assistant])
    text = pinned(planted_store(tmp_path / "text"))  # type: ignore[operator]
    with pytest.raises(GranaryError, match="is of text alone"):
        restrict_kinds(TrainingData([text.slice]), [text], [TokenKind.image])


def test_a_run_without_kinds_keeps_its_identity() -> None:
    assert identity({"stream": {"kinds": None, "lanes": 4}}) == {"stream.lanes": 4}
    assert identity({"stream": {"kinds": ["image"]}}) == {"stream.kinds": ["image"]}


def test_scores_of_each_kind(store: Store) -> None:
    data = load_data(store, Split.heldout, None)
    sums = ReconstructionSums(
        contexts=len(data.contexts), d_latent=5, positions=data.position_groups.num_bins,
        frequencies=data.frequency_groups.num_bins, shift_D=torch.full((12,), 0.3), kinds=KINDS,
    )  # fmt: skip
    generator, x_hats = torch.Generator().manual_seed(0), []
    nothing = torch.zeros(0)
    for context, number in enumerate(data.contexts.tolist()):
        mask_1T = data.mask_CT[context : context + 1]
        x_ND = store.read_context(SITE, number)[mask_1T[0]]
        x_hats.append(x_ND + torch.randn(x_ND.shape, generator=generator))
        values = nothing.new_zeros(len(x_ND), 1)
        sums.add(x_ND, x_hats[-1], values, values.long() - 1, data.rows(context, mask_1T))
    found = kind_figures(sums)
    assert found is not None
    assert list(found) == ["text", "image", "assistant"]
    mask_CT = data.mask_CT.numpy()
    x_ND = rows(store, data.contexts, mask_CT)
    x_hat_ND = torch.cat(x_hats)
    for kind in TokenKind:
        is_of_N = torch.from_numpy(chosen(store, data.contexts, kind)[mask_CT])
        x, x_hat = x_ND[is_of_N].double(), x_hat_ND[is_of_N].double()
        figures = found[kind.value]
        assert figures.tokens == len(x)
        assert figures.fvu == pytest.approx(float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()))
        assert figures.mean_norm == pytest.approx(float(x.norm(dim=1).mean()))
    assert load_data(store, Split.heldout, None, [TokenKind.image]).num_tokens == found["image"].tokens
