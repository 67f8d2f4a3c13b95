"""The house rules of imports and sizes, read from the source: who stands on whom, no circles, light configuration.

An import counts wherever it stands, also inside a function or under TYPE_CHECKING.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import pytest

from tests.cli import ForkServer

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("shared", "stage_*", "granary")  # benchmarks, examples and tests may import what they like
FILES = sorted(path for room in PRODUCT for folder in ROOT.glob(room) for path in folder.rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
MAX_LINES, MEDIAN_LINES = 450, 150

FLOORS = (
    ("shared.basics",),
    ("shared.parallel", "shared.launch", "shared.kernels", "shared.bundled"),
    ("shared.lm", "shared.store"),
    ("shared.sae",),
    ("shared.latents", "shared.intervene", "shared.text"),
    ("granary", "stage_harvest", "stage_train", "stage_eval", "stage_inspect", "stage_trace"),
)
NEVER = (
    ("shared.store", "shared.lm"),
    ("shared.sae.variants", "shared.sae.learn"),
    ("shared.sae.formats", "shared.sae.variants"),
)
KERNELS_USE = {"torch", "triton", *sys.stdlib_module_names}
HEAVY = ("torch", "transformers", "zarr")
LIGHT = ("shared.basics.config", "stage_train.sae_schema", "stage_train.many")  # beside what each __main__ imports


def imports_in(tree: ast.AST) -> Iterator[str]:
    """Absolute names of the modules that a piece of source imports; of ours the module itself, not a name in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides who stands on whom"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else str(node.module)


def is_in(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


def floor_of(module: str) -> int | None:
    found = [floor for floor, rooms in enumerate(FLOORS) if any(is_in(module, room) for room in rooms)]
    return found[0] if found else None


def broken_rules(graph: dict[str, set[str]]) -> Iterator[str]:
    """One line for each import that may not be."""
    for module, other in sorted((module, other) for module, imported in graph.items() for other in imported):
        floor, below = floor_of(module), floor_of(other)
        if floor is not None and below is not None and floor < below:
            yield f"{module} -> {other}: from a lower floor to a higher one"
        if any(is_in(module, one) and is_in(other, two) for one, two in NEVER):
            yield f"{module} -> {other}: never"
        stage, second = module.split(".")[0], other.split(".")[0]
        if stage != second and stage.startswith("stage_") and second.startswith("stage_"):
            yield f"{module} -> {other}: from stage to stage"
        if is_in(module, "shared.kernels") and not is_in(other, "shared.kernels") and second not in KERNELS_USE:
            yield f"{module} -> {other}: kernels import torch and triton only"


def circles(graph: dict[str, set[str]]) -> Iterator[str]:
    """The modules of each import circle on one line."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        pending = [start]
        while pending:
            for other in graph.get(pending.pop(), set()) - seen:
                seen.add(other)
                pending.append(other)
        return seen

    reachable = {module: reach(module) for module in graph}
    rings = {frozenset(o for o in reachable[m] if o in graph and m in reachable[o]) for m in graph if m in reachable[m]}
    yield from ("circle: " + ", ".join(sorted(ring)) for ring in rings)


def first_imports(stage: Path) -> list[str]:
    """The modules that ``python -m stage`` imports before it calls anything."""
    body = ast.parse((stage / "__main__.py").read_text()).body
    return [module for node in body if isinstance(node, ast.Import | ast.ImportFrom) for module in imports_in(node)]


def heavy_among(modules: Sequence[str], heavy: Sequence[str] = HEAVY) -> list[str]:
    """What of `heavy` a fresh process has loaded when it has imported `modules`."""
    script = f"import json, sys, {', '.join(modules)}; print(json.dumps([n for n in {heavy} if n in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return list(json.loads(done.stdout))


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return {module: set(imports_in(ast.parse(path.read_text(encoding="utf-8")))) for module, path in MODULES.items()}


def test_imports_keep_to_the_rules(graph: dict[str, set[str]]) -> None:
    found = {*broken_rules(graph), *circles(graph)}
    entries = {stage.name: first_imports(stage) for stage in ROOT.glob("stage_*")} | {name: [name] for name in LIGHT}
    for entry, modules in entries.items():
        found |= {f"{entry} loads {name} before its configuration is checked" for name in heavy_among(modules)}
    assert not found, "these imports break a rule:\n" + "\n".join(sorted(found))


@pytest.mark.parametrize(
    ("module", "imported", "told"),
    [
        ("shared.basics.files", "shared.parallel", "from a lower floor to a higher one"),
        ("shared.launch.stage", "shared.store", "from a lower floor to a higher one"),
        ("shared.store.store", "shared.sae.config", "from a lower floor to a higher one"),
        ("shared.sae.config", "stage_train.config", "from a lower floor to a higher one"),
        ("shared.intervene.edits", "granary", "from a lower floor to a higher one"),
        ("shared.store.format.layout", "shared.lm.hookpoint", "never"),
        ("shared.sae.variants.sae", "shared.sae.learn.losses", "never"),
        ("shared.sae.formats.raw", "shared.sae.variants.sae", "never"),
        ("stage_eval.evaluate", "stage_train.config", "from stage to stage"),
        ("shared.kernels.linear", "shared.basics.errors", "kernels import torch and triton only"),
        ("shared.kernels.linear", "numpy", "kernels import torch and triton only"),
    ],
)
def test_an_import_that_may_not_be_is_noticed(
    graph: dict[str, set[str]], module: str, imported: str, told: str
) -> None:
    assert f"{module} -> {imported}: {told}" in broken_rules({**graph, module: graph[module] | {imported}})


def test_a_circle_is_noticed_wherever_its_imports_stand() -> None:
    lazily = ast.parse("def later():\n    import shared.store.store")
    for_types = ast.parse("if TYPE_CHECKING:\n    from shared.store import io, Store")
    assert set(imports_in(lazily)) == {"shared.store.store"}
    assert set(imports_in(for_types)) == {"shared.store.io", "shared.store"}
    found = set(circles({"a": {"b", "torch"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": {"d"}, "f": {"a"}}))
    assert found == {"circle: a, b, c", "circle: d, e"}


def test_a_heavy_import_is_noticed() -> None:
    assert heavy_among(["shared.basics.yaml_file"], ("yaml", "torch")) == ["yaml"]


def test_files_are_small() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {str(path): count for path, count in lines.items() if count > MAX_LINES} == {}
    assert median(lines.values()) <= MEDIAN_LINES


def test_benchmarks_and_examples_import_what_is_there(stages: ForkServer, tmp_path: Path) -> None:
    """Also where an import stands in a function, which nobody may have called since a name went elsewhere."""
    folders = [ROOT / "benchmarks", ROOT / "examples"]
    scripts = [path for folder in folders for path in folder.rglob("*.py")]
    siblings = {".".join(path.relative_to(folders[0]).with_suffix("").parts) for path in folders[0].rglob("*.py")}
    names = {
        (node.module, alias.name)
        for script in scripts
        for node in ast.walk(ast.parse(script.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module in MODULES or node.module in siblings)
        for alias in node.names
    }
    assert len(names) > 50
    script = tmp_path / "missing.py"
    script.write_text(
        "import importlib, importlib.util, json, sys\n"
        f"sys.path.append({str(folders[0])!r})\n"
        "for module, name in json.loads(sys.argv[1]):\n"
        "    found = hasattr(importlib.import_module(module), name)\n"
        "    if not found and importlib.util.find_spec(f'{module}.{name}') is None: print(f'{module}.{name}')"
    )
    done = stages.run(str(script), json.dumps(sorted([*names, ("shared.sae", "Nothing")])))
    assert done.code == 0, done.stderr
    assert done.stdout.split() == ["shared.sae.Nothing"]
