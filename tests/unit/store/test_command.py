"""``python -m shared.store``: what it prints and what it returns."""

from pathlib import Path

import pytest
import torch

from shared.store import Store
from shared.store.__main__ import main, spans
from tests.synthetic import synthetic_plan, synthetic_store


@pytest.fixture
def url(tmp_path):
    synthetic_store(tmp_path / "store", synthetic_plan())
    return str(tmp_path / "store")


def test_info_says_what_it_holds(url, capsys):
    assert main(["info", url]) == 0
    text = capsys.readouterr().out
    for part in (
        "3 of 3 committed, 1 held out",
        "10 of 64 tokens each",
        "bfloat16",
        "layers.2.resid_post",
        "synthetic",
    ):
        assert part in text


def test_info_shows_the_statistics_of_the_training_shards(url, capsys):
    main(["info", url])
    line = next(line for line in capsys.readouterr().out.splitlines() if "│ layers.2.resid_post │" in line)
    store = Store.open(url)
    rows = []
    for shard in set(range(store.num_shards)) - set(store.heldout_shards):
        for context in store.shard_contexts(shard):
            activations = store.read_context("layers.2.resid_post", context).double()
            rows.append(activations[torch.from_numpy(store.mask([context])[0])])
    x = torch.cat(rows)
    norms = x.norm(dim=1)
    wanted = [x.mean(0).norm(), x.var(0, correction=0).sum(), norms.mean(), norms.median(), norms.max()]
    got = [float(cell) for cell in line.replace("│", " ").split()[1:6]]
    assert got == pytest.approx([float(value) for value in wanted], rel=0.03)  # the median is from a histogram


def test_ls_has_a_line_per_shard(url, capsys):
    Path(url, "manifest/00000001.json").unlink()
    assert main(["ls", url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("committed" in line for line in lines) == 2
    assert next(line for line in lines if "missing" in line).split()[1] == "1"
    assert sum("heldout" in line for line in lines) == 1


def test_verify_names_each_bad_and_missing_shard_and_fails(url, capsys):
    assert main(["verify", url]) == 0
    assert "0 damaged, 0 of 3 shards missing" in capsys.readouterr().out
    path = Path(url, "layers/2/resid_post/c/1/0/0")
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    Path(url, "manifest/00000002.json").unlink()
    assert main(["verify", url]) == 1
    text = capsys.readouterr().out
    assert "damaged shard 1: layers/2/resid_post/c/1/0/0 fails its checksum in chunk 0" in text
    assert "missing shards 2" in text


def test_drop_incomplete_takes_damaged_shards_back_only_when_told(url, capsys):
    path = Path(url, "layers/2/resid_post/c/1/0/0")
    path.write_bytes(b"short")
    assert main(["drop-incomplete", url]) == 0
    assert "nothing to drop" in capsys.readouterr().out
    assert main(["drop-incomplete", "--damaged", url]) == 0
    assert "dropped manifest/00000001.json" in capsys.readouterr().out
    assert not path.exists()
    assert main(["verify", url]) == 1
    synthetic_store(url, synthetic_plan())
    assert main(["verify", url]) == 0


@pytest.mark.parametrize("command", ["info", "ls", "verify", "drop-incomplete"])
def test_no_store_is_one_line_and_status_2(tmp_path, capsys, command):
    with pytest.raises(SystemExit) as caught:
        main([command, str(tmp_path / "none")])
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: no activation store at {tmp_path / 'none'}: make one with python -m stage_harvest, or check store.url"
    ]


def test_it_runs_as_a_module(stages, url):
    done = stages.run("shared.store", "verify", url)
    assert done.code == 0
    assert done.stderr == ""
    assert "0 damaged" in done.stdout


def test_numbers_are_written_for_people():
    assert spans([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
