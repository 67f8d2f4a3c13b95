"""The names of a run's files, and reading its metrics."""

from pathlib import Path

from shared.basics.metrics_file import read_metrics
from shared.basics.run_folder import RunFolder


def test_every_path_is_a_name_of_its_own_in_the_folder() -> None:
    names = [name for name, value in vars(RunFolder).items() if isinstance(value, property)]
    paths = {name: getattr(RunFolder(Path("runs/demo")), name) for name in names if name != "has_dictionary"}
    assert {path.parent for path in paths.values()} == {Path("runs/demo")}
    assert len({path.name for path in paths.values()}) == len(paths)


def test_a_dictionary_is_both_of_its_files(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert not folder.has_dictionary
    folder.config.touch()
    assert not folder.has_dictionary
    folder.weights.touch()
    assert folder.has_dictionary


def test_metrics_without_a_line_that_a_kill_cut_short(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    RunFolder(tmp_path).metrics.write_text('{"step": 1}\n{"step": 2, "fvu": 0.5}\n{"step": 3, "fv')
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2, "fvu": 0.5}]
