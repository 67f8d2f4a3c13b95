"""Measured block sizes: kept per GPU model, used by the launchers, never in the way where there are none."""

import pytest
import torch

from shared.kernels import decode, dot_picks, tuning
from shared.kernels.decode import triton as decode_triton


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GRANARY_TUNING", str(tmp_path / "cache"))
    tuning._table.cache_clear()
    yield
    tuning._table.cache_clear()


def test_without_a_file_the_default_holds():
    assert tuning.tuned("decode", 64, {"BLOCK_D": 64}) == {"BLOCK_D": 64}


def test_saved_choices_are_found_on_that_gpu_only(monkeypatch):
    path = tuning.save("NVIDIA H200", {tuning.key("decode", 64): {"BLOCK_D": 32}})
    tuning.save("NVIDIA H200", {tuning.key("row_grad", 64): {"BLOCK_P": 4}})  # adds, does not replace
    assert path.name == "kernels-NVIDIA-H200.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert tuning.tuned("decode", 64, {"BLOCK_D": 64, "num_warps": 4}) == {"BLOCK_D": 32, "num_warps": 4}
    assert tuning.tuned("row_grad", 64, {"BLOCK_P": 8}) == {"BLOCK_P": 4}
    assert tuning.tuned("decode", 100, {"BLOCK_D": 128}) == {"BLOCK_D": 128}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another")
    assert tuning.tuned("decode", 64, {"BLOCK_D": 64}) == {"BLOCK_D": 64}


def test_a_trial_ends_with_its_context(kernels):
    if kernels != "triton":
        pytest.skip("only triton's launchers ask")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values, indices, W = torch.ones(2, 3), torch.tensor([[0, 1, 2], [3, 4, -1]]), torch.eye(5, 40)
    values, indices, W = values.to(device), indices.to(device), W.to(device)
    expected = decode(values, indices, W, kernels="reference")
    with tuning.trial({tuning.key("decode", 40, indices.numel()): {"BLOCK_D": 16}}):
        assert decode_triton.decode_config(40, indices.numel())["BLOCK_D"] == 16
        assert torch.equal(decode(values, indices, W, kernels="triton"), expected)
    assert decode_triton.decode_config(40)["BLOCK_D"] == 64


def test_dot_picks_in_parts_of_the_columns_equals_the_whole(kernels):
    if kernels != "triton":
        pytest.skip("only triton's launchers ask")
    rng = torch.Generator().manual_seed(0)
    indices = torch.tensor([[0, 1, 2], [3, 3, -1]])
    grad, W = (torch.randint(-3, 4, (rows, 70), generator=rng).float() for rows in (2, 5))
    expected = dot_picks(grad, indices, W, kernels="reference")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for block, part in ((16, 16), (16, 48), (32, 32)):  # the last part is ragged
        choice = {"BLOCK_D": block, "PART_D": part}
        with tuning.trial({tuning.key("dot_picks", 70, indices.numel()): choice}):
            result = dot_picks(grad.to(device), indices.to(device), W.to(device), kernels="triton")
        assert torch.equal(result.cpu(), expected)


def test_a_choice_holds_for_batches_of_its_size():
    tuning.save("none", {})
    small, large = (tuning.key("decode", 64, num_pairs) for num_pairs in (1 << 19, 1 << 22))
    assert small == tuning.key("decode", 64, (1 << 20) - 1)
    with tuning.trial({small: {"BLOCK_D": 32}}):
        assert tuning.tuned("decode", 64, {"BLOCK_D": 64}, num_pairs=1 << 19) == {"BLOCK_D": 32}
        assert tuning.tuned("decode", 64, {"BLOCK_D": 64}, num_pairs=1 << 22) == {"BLOCK_D": 64}
    assert small != large


def test_a_user_without_a_home_needs_none(monkeypatch):
    def no_home(*_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("GRANARY_TUNING")
    monkeypatch.setattr(tuning.Path, "home", no_home)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert tuning.tuned("decode", 64, {"BLOCK_D": 64}) == {"BLOCK_D": 64}


def test_a_torn_write_leaves_the_file_as_it_was(monkeypatch):
    path = tuning.save("NVIDIA H200", {tuning.key("decode", 64): {"BLOCK_D": 32}})
    before = path.read_text()

    def torn(self, text, encoding):
        with self.open("w") as file:
            file.write(text[: len(text) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(tuning.Path, "write_text", torn)
    with pytest.raises(OSError, match="no space"):
        tuning.save("NVIDIA H200", {tuning.key("row_grad", 64): {"BLOCK_P": 4}})
    assert path.read_text() == before


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a": 1}', '{"a": {"rows": "x"}}', "[" * 100_000, "\ud800"])
def test_a_damaged_file_measured_nothing(monkeypatch, text):
    path = tuning.tuning_file("Some GPU")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    tuning._table.cache_clear()
    assert tuning.tuned("row_grad", 64, {"rows": 4}) == {"rows": 4}
    tuning.save("Some GPU", {tuning.key("row_grad", 64): {"rows": 8}})
    assert tuning.tuned("row_grad", 64, {"rows": 4}) == {"rows": 8}
