"""Exporting a checkpoint by command."""

import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint.state_dict_saver as dcp

from shared.sae import SAE, SAEConfig, load_provenance
from shared.sae.folder import to_document
from stage_train.state.checkpoint import POINTER
from stage_train.state.export import main
from stage_train.state.integrity import STATE
from stage_train.state.staging import HostCopies
from stage_train.state.tensor_files import TensorWriter


def test_the_newest_checkpoint_is_exported(tmp_path: Path) -> None:
    sae = SAE(SAEConfig(d_model=6, d_latent=12, k=2))
    step = tmp_path / "checkpoints/step-00000007"
    step.mkdir(parents=True)
    (step / STATE).write_text(json.dumps({"sae": to_document(sae.config, {}, {}), "provenance": {"steps": 7}}))
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    tensors = {f"sae.{name}": tensor for name, tensor in sae.state_dict().items()}
    dcp.save(tensors, storage_writer=TensorWriter(step, HostCopies()), no_dist=True)
    (step.parent / POINTER).write_text(step.name)
    main([str(tmp_path), str(tmp_path / "out")])
    loaded = SAE.from_pretrained(tmp_path / "out")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in sae.state_dict().items())
    assert load_provenance(tmp_path / "out") == {"steps": 7}


def test_no_checkpoint_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path)])
    assert stopped.value.code == 2
    assert "error: there is no checkpoint in" in capsys.readouterr().err
