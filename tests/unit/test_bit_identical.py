"""The judge of "nothing has changed": it finds one flipped bit, and overlooks what it is told to and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.bit_identical import compare_case, is_told_alone, main, verdict
from tests.bits.compare import IGNORED, Ignored, Moved, compare_files, compare_json, compare_tensors
from tests.bits.matrix import CASES, chosen

CASE = next(case for case in CASES if case.name == "topk")
HARVEST = next(case for case in CASES if case.name == "bfloat16")


def write(path: Path, content: bytes | dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def test_a_flipped_bit_of_a_store_is_told_with_its_place(tmp_path: Path) -> None:
    for side, content in (("a", b"\0" * 100), ("b", b"\0" * 70 + b"\1" + b"\0" * 29)):
        write(tmp_path / side / "bfloat16/store/layers/2/resid_post/c/0/0/0", content)
        write(tmp_path / side / "bfloat16/store/zarr.json", {"attributes": {"versions": side, "seq_len": 128}})
    (found,) = compare_case(HARVEST, tmp_path / "a", tmp_path / "b")
    assert found.startswith("bfloat16/store/layers/2/resid_post/c/0/0/0: byte 70 differs")
    assert compare_case(HARVEST, tmp_path / "a", tmp_path / "a") == []


def test_a_file_of_one_side_alone_and_no_file_at_all_are_differences(tmp_path: Path) -> None:
    write(tmp_path / "a/bfloat16/store/tokens/c/0/0", b"1")
    assert compare_case(HARVEST, tmp_path / "a", tmp_path / "b") == [
        "bfloat16/store/tokens/c/0/0: written by base alone"
    ]
    assert "no file matches" in compare_case(HARVEST, tmp_path / "c", tmp_path / "d")[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_tensors_are_compared_by_bits(dtype: torch.dtype) -> None:
    a = torch.arange(12).to(dtype).view(3, 4)
    b = a.clone()
    b[1, 2] += 1
    assert compare_tensors({"W_enc": a}, {"W_enc": a.clone()}) == []
    assert compare_tensors({"W_enc": a}, {"W_enc": b}) == ["W_enc differs in 1 of 12, max abs 1"]


def test_zero_has_a_sign_and_nan_equals_itself() -> None:
    nan, zero = torch.tensor(torch.nan), torch.zeros(2)
    assert compare_tensors({"t": nan}, {"t": nan.clone()}) == []
    assert compare_tensors({"t": zero}, {"t": -zero}) == ["t differs in 2 of 2, max abs 0"]


def test_shape_dtype_and_names_count() -> None:
    a = torch.zeros(4)
    assert compare_tensors({"t": a}, {"t": a.view(2, 2)}) == ["t is float32 [4] in base, float32 [2, 2] in head"]
    assert compare_tensors({"t": a}, {"t": a.double()}) == ["t is float32 [4] in base, float64 [4] in head"]
    assert compare_tensors({"t": a}, {"u": a}) == ["t is in base alone", "u is in head alone"]


def test_a_listed_rename_and_no_other_is_followed() -> None:
    a, moved = torch.zeros(4), [Moved("*", "t", "group.t", "test"), Moved("*", None, "new", "test")]
    assert compare_tensors({"t": a}, {"group.t": a, "new": a}, moved) == []
    assert compare_tensors({"t": a}, {"group.t": a + 1}, moved) == ["group.t differs in 4 of 4, max abs 1"]
    old, new = {"sae": {"config": {"k": 3}}, "gone": 1}, {"sae": {"settings": {"k": 3}}, "added": {"x": 1}}
    moves = [Moved("*", "sae.config", "sae.settings", ""), Moved("*", "gone", None, ""), Moved("*", None, "added", "")]
    assert compare_json(old, new, [], moves) == []
    new["sae"]["settings"]["k"] = 4
    assert compare_json(old, new, [], moves) == ["sae.settings.k is 3 in base, 4 in head"]
    assert len(compare_json(old, new)) == 4


def test_json_differs_by_value_by_key_and_by_order() -> None:
    base = {"fvu": 0.1, "rows": [{"name": "a"}]}
    assert compare_json(base, {"fvu": 0.1, "rows": [{"name": "a"}]}) == []
    assert compare_json(base, {"fvu": 0.2, "rows": [{"name": "a"}]}) == ["fvu is 0.1 in base, 0.2 in head"]
    assert compare_json(base, {"fvu": 0.1, "rows": []}) == [
        'rows.0.name is "a" in base, absent in head',
        "rows is absent in base, [] in head",
    ]
    assert compare_json(base, {"rows": [{"name": "a"}], "fvu": 0.1}) == ["fvu has another place among the keys"]
    assert compare_json({"n": 1}, {"n": 1.0}) == ["n is 1 in base, 1.0 in head"]


def test_ignored_keys_are_ignored_in_their_file_alone(tmp_path: Path) -> None:
    ignored = [Ignored("*/eval.json", "environment", ""), Ignored("*/metrics.jsonl", "*.tokens_per_s", "")]
    a = write(tmp_path / "a", {"environment": {"torch": "1"}, "fvu": 1})
    b = write(tmp_path / "b", {"environment": {"torch": "2", "numpy": "3"}, "fvu": 1})
    assert compare_files("x/eval.json", a, b, ignored) == []
    assert len(compare_files("x/other.json", a, b, ignored)) == 2


def test_metrics_are_compared_line_by_line(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 1 / step, "tokens_per_s": 5.0} for step in (1, 2, 3)]
    a, b = (tmp_path / side / "metrics.jsonl" for side in "ab")
    write(a, "".join(json.dumps(line) + "\n" for line in lines).encode())
    write(b, "".join(json.dumps(line | {"tokens_per_s": 6.0}) + "\n" for line in lines).encode())
    assert compare_files("x/metrics.jsonl", a, b) == []
    write(b, "".join(json.dumps(line | {"loss": 0.5}) + "\n" for line in lines).encode())
    assert compare_files("x/metrics.jsonl", a, b)[0] == "x/metrics.jsonl: 0.loss is 1.0 in base, 0.5 in head"


def test_spaces_count_where_only_versions_differ(tmp_path: Path) -> None:
    a = write(tmp_path / "a", b'{"attributes": {"versions": {"torch": "1"}, "n": 1}}')
    b = write(tmp_path / "b", b'{"attributes": {"versions": {"torch": "22"}, "n": 1}}')
    c = write(tmp_path / "c", b'{"attributes": {"versions": {"torch": "22"},  "n": 1}}')
    assert compare_files("s/store/zarr.json", a, b) == []
    assert "spaces" in compare_files("s/store/zarr.json", a, c)[0]


def test_versions_inside_a_document_inside_a_record(tmp_path: Path) -> None:
    def record(version: str, seq_len: int) -> dict[str, Any]:
        text = json.dumps({"attributes": {"versions": {"torch": version}, "seq_len": seq_len}}, indent=2)
        return {"crc32c": hash(version) % 1000, "record": {"documents": {"zarr.json": text}}}

    a, b, c = (
        write(tmp_path / name, record(*values))
        for name, values in {"a": ("1", 8), "b": ("2", 8), "c": ("1", 9)}.items()
    )
    assert compare_files("s/store/extents/00000000.json", a, b) == []
    assert "attributes.seq_len is 8 in base, 9 in head" in compare_files("s/store/extents/00000000.json", a, c)[0]


def test_config_json_is_told_and_does_not_count(tmp_path: Path) -> None:
    for side, version, weight in (("a", 1, 0.0), ("b", 2, 0.0), ("c", 1, 1e-9)):
        folder = tmp_path / side / "topk/sae"
        write(folder / "config.json", {"version": version})
        save_file({"W_enc": torch.tensor([weight])}, folder / "sae.safetensors", {"granary": str(version)})
        write(folder / "metrics.jsonl", b"")
    (told,) = compare_case(CASE, tmp_path / "a", tmp_path / "b")
    assert is_told_alone(told)
    assert verdict([], [told]).startswith("identical; told alone: topk/sae/config.json: version is 1 in base")
    (found,) = compare_case(CASE, tmp_path / "a", tmp_path / "c")
    assert not is_told_alone(found)
    assert verdict([found], []) == "DIFFERS    topk/sae/sae.safetensors: W_enc differs in 1 of 1, max abs 1e-09"


def test_cases_bring_what_they_need() -> None:
    assert [case.name for case in chosen("eval-topk")] == ["bfloat16", "topk", "eval-topk"]
    assert chosen("*") == list(CASES)
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert all(entry.why for entry in IGNORED)


def test_a_wrong_command_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["HEAD", "--only", "nothing"]) == 2
    assert main(["no-such-commit"]) == 2
    (tmp_path / "file").touch()
    assert main(["HEAD", "--keep", str(tmp_path)]) == 2
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == ["error"] * 3
