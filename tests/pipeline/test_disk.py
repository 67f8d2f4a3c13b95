"""A disk that is full, read-only or broken, at every write of every command: one line, nothing half, nothing left."""

from collections.abc import Callable

import pytest

from tests.cli import ForkServer
from tests.disk import BROKEN, FULL, READ_ONLY, FailingDisk, spread
from tests.disk_commands import COMMANDS, Bench, Command, reading

PARTS = 4  # none may take 300 s, on a busy machine either
QUICK = [("train", FULL), ("saelens", BROKEN), ("inspect", READ_ONLY), ("notes", FULL)]


@pytest.fixture(scope="module")
def bench(stages: ForkServer, planted_store: Callable[..., object], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    if stages.library is None:
        pytest.skip("needs a C compiler")
    return Bench(stages, tmp_path_factory.mktemp("bench"), planted_store)


@pytest.fixture
def make(bench: Bench) -> Callable[[str], Command]:
    """The command of a name, run once on a disk that does not fail."""
    return lambda name: COMMANDS[name](bench, bench.folder())


@pytest.mark.parametrize(
    ("name", "error"),
    [pytest.param(name, error, marks=pytest.mark.slow if name == "notes" else ()) for name, error in QUICK],
)
def test_a_disk_that_fails(make: Callable[[str], Command], name: str, error: int) -> None:
    command = make(name)
    assert len(command.calls) > 5
    for call in spread(command.calls, 3)[1:2]:
        command.fail_and_run_again(call, error)


@pytest.mark.slow
@pytest.mark.parametrize("error", [FULL, READ_ONLY])
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("name", COMMANDS)
def test_every_write_of_every_command(make: Callable[[str], Command], name: str, part: int, error: int) -> None:
    command = make(name)
    for call in command.calls[part::PARTS]:
        command.fail_and_run_again(call, error)


@pytest.mark.slow
def test_commands_that_only_look_write_nothing(bench: Bench) -> None:
    for module, *arguments in reading(bench):
        disk = FailingDisk(bench.server.at(bench.root), bench.root, module, *arguments)
        assert disk.run().code == 0
        assert disk.calls() == []
