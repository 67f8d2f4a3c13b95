"""The reader that docs/store.md offers to people without Granary is run as it stands there."""

import re
from typing import Any

import pytest
import torch

from tests.conftest import REPOSITORY
from tests.synthetic import synthetic_plan, synthetic_store


@pytest.mark.parametrize("chunk_tokens", [16, 64])
def test_the_ten_lines_read_every_context_bit_for_bit(tmp_path, chunk_tokens):
    code = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs/store.md").read_text(), re.DOTALL)[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    assert "shared" not in code
    names: dict[str, Any] = {}
    exec(code, names)
    plan = synthetic_plan(chunk_tokens=chunk_tokens)
    store = synthetic_store(tmp_path, plan)
    for context in range(plan.num_contexts):
        found = names["read_context"](tmp_path / "layers/2/resid_post", context)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, store.read_context("layers.2.resid_post", context))
