"""What graphs are made of, read from folders: this project's and circuit-tracer's."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.basics.errors import GranaryError
from shared.lm import model_identity
from shared.sae import Dictionary
from shared.sae.rows_file import RowsFile
from shared.sae.sets import convert_set
from stage_trace.trace import trace
from tests.tracing import bundled_transcoder, make_clt

TEXT = "def f(x):"


def saved(kind: str, folder: Path) -> list[Dictionary]:
    """A set, plain or with skips, or a CLT, in this project's format."""
    provenance = {"model": model_identity("bundled")}
    if kind in ("clt", "tied"):
        tying = "none" if kind == "clt" else "per_source"
        made: list[Dictionary] = [make_clt(4, width=128, latents=32, tying=tying)]
        made[0].save_pretrained(folder, provenance)
        return made
    made = [bundled_transcoder(layer, skip=kind == "skip", threshold=0.8) for layer in range(2)]
    for layer, one in enumerate(made):
        one.save_pretrained(folder / f"layer_{layer}", provenance)
    return made


@pytest.mark.parametrize("kind", ["plain", "skip", "clt", "tied"])
def test_the_same_graph_from_memory_from_files_and_from_circuit_tracers(tmp_path: Path, kind: str) -> None:
    made = saved(kind, tmp_path / "ours")
    convert_set(tmp_path / "ours", tmp_path / "theirs", "circuit_tracer")
    held = trace("bundled", made, TEXT)
    read = trace("bundled", tmp_path / "ours", TEXT)
    foreign = trace("bundled", tmp_path / "theirs", TEXT)
    assert held.columns.num_features > 10
    assert torch.equal(read.rows_RS, held.rows_RS)
    assert [node.id for node in foreign.nodes] == [node.id for node in held.nodes]
    worst = (foreign.rows_RS - held.rows_RS).abs().amax(1) / held.rows_RS.abs().amax(1)
    # Biases of a folded dictionary are part of its encoder's, so that a bias column may differ.
    features = (foreign.rows_RS - held.rows_RS)[:, : held.columns.num_features].abs().amax(1)
    assert float((features / held.rows_RS.abs().amax(1)).max()) < 1e-4
    assert float(worst.max()) < 1e-3
    one = next(node for node in read.sources if node.activation is not None)
    before, after = held.intervene({one.id: 0.0}), foreign.intervene({one.id: 0.0})
    torch.testing.assert_close(after.change_R, before.change_R, rtol=1e-2, atol=1e-3)


def test_a_foreign_folder_is_data_that_is_checked(tmp_path: Path) -> None:
    saved("plain", tmp_path / "ours")
    convert_set(tmp_path / "ours", tmp_path / "theirs", "circuit_tracer")
    config, layer = tmp_path / "theirs" / "config.yaml", tmp_path / "theirs" / "layer_1.safetensors"
    text, tensors = config.read_text(), load_file(layer)
    for wrong, told in (
        (text.replace("transcoder_set", "other"), "model_kind='other' is none of"),
        (text.replace("mlp.hook_in", "hook_q"), "feature_input_hook='hook_q' is no place"),
        ("- a list", "model_kind=None"),
    ):
        config.write_text(wrong)
        with pytest.raises(GranaryError, match=told):
            trace("bundled", tmp_path / "theirs", TEXT)
    config.write_text(text)
    for change, told in (
        ({"k": torch.tensor(3)}, "holds k"),
        ({"activation_function.threshold": torch.full((96,), -1.0)}, "thresholds below 0"),
        ({"W_dec": tensors["W_dec"][:5].clone()}, "do not fit"),
    ):
        save_file(tensors | change, layer)
        with pytest.raises(GranaryError, match=told):
            trace("bundled", tmp_path / "theirs", TEXT)
    layer.rename(layer.with_name("layer_3.safetensors"))
    with pytest.raises(GranaryError, match="all from 0 on"):
        trace("bundled", tmp_path / "theirs", TEXT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_read_from_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    """Any order, twice the same, some columns; a tensor of three axes is rows of the last two."""
    whole = torch.randn(7, 2, 5).to(dtype)
    save_file({"W": whole, "b": torch.zeros(3)}, tmp_path / "it.safetensors")
    file = RowsFile(tmp_path / "it.safetensors")
    numbers = torch.tensor([6, 0, 6])
    assert torch.equal(file.rows("W", numbers), whole.flatten(1)[numbers])
    assert torch.equal(file.rows("W", numbers, slice(5, 10)), whole[numbers, 1])
    assert len(file.rows("W", numbers[:0])) == 0
    assert "b" not in file
    with pytest.raises(IndexError):
        file.rows("W", torch.tensor([7]))
    with (tmp_path / "it.safetensors").open("r+b") as held:
        held.truncate((tmp_path / "it.safetensors").stat().st_size - 20)
    with pytest.raises(GranaryError, match="ends in the middle of W"):
        file.rows("W", numbers)
    (tmp_path / "it.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(GranaryError, match="no safetensors file"):
        RowsFile(tmp_path / "it.safetensors")
