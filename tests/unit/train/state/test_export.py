"""Exporting a checkpoint by command."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint.state_dict_saver as dcp
from torch import Tensor

from shared.sae import SAE, SAEConfig, load_provenance
from shared.sae.folder import to_document
from stage_train.state import export
from stage_train.state.checkpoint import POINTER, read_state
from stage_train.state.integrity import STATE
from stage_train.state.staging import HostCopies
from stage_train.state.tensor_files import TensorWriter, load_tensors
from tests.fuzzing import survive
from tests.training import training_state


def test_the_newest_checkpoint_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block by block: of no matrix more than five of its twelve rows are in memory."""
    blocks: list[Tensor] = []
    monkeypatch.setattr(export, "BLOCK_ELEMENTS", 5 * 6)
    monkeypatch.setattr(export, "load_tensors", lambda *given: blocks.extend(given[1].values()) or load_tensors(*given))
    sae = SAE(SAEConfig(d_model=6, d_latent=12, k=2))
    step = tmp_path / "checkpoints/step-00000007"
    step.mkdir(parents=True)
    state = training_state(sae=to_document(sae.config, {}, {}), provenance={"steps": 7})
    (step / STATE).write_text(json.dumps(state))
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    tensors = {f"sae.{name}": tensor for name, tensor in sae.state_dict().items()}
    dcp.save(tensors, storage_writer=TensorWriter(step, HostCopies()), no_dist=True)
    (step.parent / POINTER).write_text(step.name)
    export.main([str(tmp_path), str(tmp_path / "out")])
    assert max(getattr(block, "local", block).numel() for block in blocks) == 5 * 6
    loaded = SAE.from_pretrained(tmp_path / "out")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in sae.state_dict().items())
    assert load_provenance(tmp_path / "out") == {"steps": 7}


def test_no_checkpoint_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        export.main([str(tmp_path)])
    assert stopped.value.code == 2
    assert "error: there is no checkpoint in" in capsys.readouterr().err


def test_a_state_of_other_types_is_one_line(tmp_path: Path) -> None:
    whole = training_state(decays_from=5, guard={"losses": [1.0], "refused": 0})

    def use(document: Any) -> None:
        (tmp_path / STATE).write_text(json.dumps(document))
        read_state(tmp_path)

    assert survive(whole, use, most=1500) > 0
