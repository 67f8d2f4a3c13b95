"""The code map is that of the code."""

import re

from shared.launch.commands import COMMANDS
from tests.cli import REPOSITORY
from tests.unit.test_house import FLOORS

PAGE = (REPOSITORY / "docs" / "architecture.md").read_text()
# Told of as a whole.
WHOLE = ("conf", "shared/kernels", "shared/bundled")


def test_every_package_has_a_line_and_every_line_a_folder() -> None:
    told = set(re.findall(r"^\| `([\w/]+)/` \|", PAGE, re.MULTILINE))
    found = {
        str(path.parent.relative_to(REPOSITORY))
        for room in ("granary", "stage_*", "shared")
        for top in REPOSITORY.glob(room)
        for path in top.rglob("__init__.py")
    } - {"shared"}
    found = {name for name in found if not any(name.startswith(f"{whole}/") for whole in WHOLE)}
    assert {name for name in told if name.startswith(("granary", "stage_", "shared"))} == found
    assert all((REPOSITORY / name).is_dir() for name in told)


def test_the_floors_are_those_that_are_held() -> None:
    told = [set(re.findall(r"`([\w.]+)`", row)) for row in re.findall(r"^\| \d \| (.*) \|$", PAGE, re.MULTILINE)][::-1]
    there = [{room for room in rooms if (REPOSITORY / room.replace(".", "/")).is_dir()} for rooms in FLOORS]
    assert told == there


def test_every_command_is_told_with_what_it_stands_for() -> None:
    told = dict(re.findall(r"^\| `granary (\w+)` \| `([^`]+)`", PAGE, re.MULTILINE))
    assert set(told) == set(COMMANDS)
    for name, command in COMMANDS.items():
        if name != "sweep":
            assert told[name] == " ".join(["python", "-m", command.module, *command.before])
