"""Next-token scores in chunks."""

import pytest
import torch
from torch import nn

from shared.lm import next_token
from shared.lm.next_token import score_next_tokens

N, D, V = 11, 5, 7


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_chunks_do_not_change_the_scores(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(next_token, "LOGIT_BYTES", rows * next_token.COPIES * 4 * V)
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(D, V, bias=False).requires_grad_(False)
    clean, other = torch.randn(2, N, D, generator=generator)
    labels = torch.randint(0, V, (N,), generator=generator)
    scores = score_next_tokens(head, [clean, other, clean], labels)
    p, q = (torch.log_softmax((head.weight.double() @ hidden.double().T).T, -1) for hidden in (clean, other))
    index = torch.arange(N)
    expected = torch.stack([-p[index, labels], -q[index, labels], -p[index, labels]])
    torch.testing.assert_close(scores.cross_entropy_QN, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scores.kl_QN[1], (p.exp() * (p - q)).sum(-1), rtol=1e-4, atol=1e-6)
    assert (scores.kl_QN[[0, 2]] == 0).all()
    assert torch.equal(scores.agrees_QN[1], (p.argmax(-1) == q.argmax(-1)).double())


def test_no_positions_give_no_scores() -> None:
    scores = score_next_tokens(nn.Linear(D, V), [torch.zeros(0, D)] * 2, torch.zeros(0, dtype=torch.int64))
    assert scores.cross_entropy_QN.shape == (2, 0)
