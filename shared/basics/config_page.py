"""The page of all keys: ``python -m shared.basics.config_page stage_harvest stage_train stage_eval > docs/config.md``.

Types, meanings and marks are those beside the fields of each stage's schema, defaults and choices those of ``conf/``.
"""

import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import Field, fields, is_dataclass
from enum import Enum
from importlib import resources
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from shared.basics.config import Marks
from shared.basics.field_docs import annotations, docs

INTRODUCTION = """# Configuration

Every key of all stages: its type, its default, what it means. This page is generated (`make docs-config`) from
the schemas in `stage_*/config.py` and the values in `conf/`.

A key is given as `key=value`, an option of a group as `group=option`; `-m` with `key=a,b` makes a sweep. Where the type
is a count, 50M, 5e7 and 50_000_000 are the same. In training, a key whose run is *same* decides the result: a run
that is continued must be given the value it began with. One that is *free* may change from part to part.
"""
CONF = Path(str(resources.files("conf")))


def page(stages: Sequence[str]) -> str:
    """The whole page, in Markdown."""
    sections = [INTRODUCTION]
    with initialize_config_module("conf", version_base="1.3"):
        for stage in stages:
            importlib.import_module(f"{stage}.config").register()
            sections += section(stage)
    return "\n".join(sections).rstrip() + "\n"


def section(stage: str) -> Iterator[str]:
    """One stage: keys that are in no group, then group by group."""
    name = stage.removeprefix("stage_")
    schema, chosen = schema_of(f"{name}_schema"), group_names(name)
    defaults = OmegaConf.to_container(compose(name), resolve=False, enum_to_str=True)
    assert isinstance(defaults, dict)
    marked = any("marks" in one.metadata and not one.metadata["marks"].identity for one in fields(schema))
    yield f"## python -m {stage}\n"
    groups = [one for one in fields(schema) if isinstance(one.type, type) and is_dataclass(one.type)]
    yield table(schema, "", defaults, Marks() if marked else None, [one.name for one in groups])
    for one in groups:
        assert isinstance(one.type, type)
        yield f"### {one.name}\n\n{single_quoted((one.type.__doc__ or '').strip())}\n"
        marks = one.metadata.get("marks", Marks()) if marked else None
        yield table(one.type, f"{one.name}.", defaults[one.name], marks, [])
        if one.name in chosen:
            yield from options(one.name, one.type, name)
    for group in sorted(set(chosen) - {one.name for one in groups}):
        choices = list(options(group, None, name))
        if any(choices):
            yield from [f"### {group}\n", *choices]


def table(schema: type, prefix: str, defaults: Any, group: Marks | None, left_out: Sequence[str]) -> str:
    """The keys of one schema; the column about a run's identity where `group` gives the marks of the whole."""
    head = ["key", "type", "default", *([] if group is None else ["run"]), "meaning"]
    lines = [row(head), row(["---"] * len(head))]
    for one in fields(schema):
        if one.name in left_out:
            continue
        kind, default, meaning = described(schema, one, defaults[one.name])
        cells = [f"`{prefix}{one.name}`", f"`{kind}`", f"`{default}`" if default else "must be given"]
        if group is not None:
            cells.append("same" if one.metadata.get("marks", Marks()).within(group).identity else "free")
        lines.append(row([*cells, meaning]))
    return "\n".join(lines) + "\n"


def options(group: str, schema: type | None, stage: str) -> Iterator[str]:
    """The choices of a group that are for this stage: each file of ``conf/<group>`` with its comment and what it sets.

    What an option has beyond `schema`, which all of them fill, is listed key by key.
    """
    paths = sorted((CONF / group).glob("*.yaml"))
    for path in paths:
        comments, values = read(path)
        stages = [line.removeprefix("stages:").split() for line in comments if line.startswith("stages:")]
        if stages and stage not in stages[0]:
            continue
        comment = " ".join(line for line in comments if not line.startswith(("@package", "stages:")))
        bases = [entry for entry in values.pop("defaults", []) if entry != "_self_"]
        own = [schema_of(entry, group) for entry in bases if entry.endswith("_schema")]
        if comment.startswith(f"{group}="):
            comment = f"`{comment}`"
        texts = [*((kind.__doc__ or "").strip() for kind in own), comment]
        if schema is not None and not any(entry.endswith("schema") for entry in bases) and values:
            texts.append(f"As `{bases[0]}`, with " + ", ".join(f"`{k}={shown(v)}`" for k, v in values.items()) + ".")
        text = " ".join(filter(None, texts))
        if text or len(paths) > 1:
            yield f"- `{group}={path.stem}`" + (f": {single_quoted(text)}" if text else "")
        known = set() if schema is None else {one.name for one in fields(schema)}
        for special, one in ((kind, one) for kind in own for one in fields(kind) if one.name not in known):
            type_text, default, meaning = described(special, one, values[one.name])
            default = f"default `{default}`" if default else "must be given"
            yield f"  - `{group}.{one.name}` (`{type_text}`, {default}): {meaning}"
    yield ""


def described(schema: type, one: Field[Any], value: Any) -> tuple[str, str, str]:
    """Type, default ("" where a value must be given) and meaning of a key, as text."""
    kind = annotations(schema)[one.name]
    if one.metadata.get("marks", Marks()).count:
        kind = "count" + kind.removeprefix("int")
    enum, meaning = enum_of(one.type), docs(schema)[one.name]
    if enum is not None:
        kind = kind.replace(enum.__name__, ", ".join(member.name for member in enum))
        texts = [f"{name}: {text}" for name, text in docs(enum).items() if text]
        meaning = " ".join([meaning or (enum.__doc__ or "").strip(), *texts])
    return kind.replace("None", "null"), shown(value), single_quoted(meaning)


def read(path: Path) -> tuple[list[str], dict[str, Any]]:
    """The comment lines at the top of a file of ``conf/``, and its values."""
    lines = path.read_text(encoding="utf-8").splitlines()
    first = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    values = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    return [line.removeprefix("#").strip() for line in lines[:first]], {str(k): v for k, v in dict(values).items()}  # type: ignore[arg-type]


def group_names(stage: str) -> list[str]:
    """Groups in the defaults list of a stage."""
    entries = OmegaConf.load(CONF / f"{stage}.yaml").defaults
    return [str(key) for entry in entries if isinstance(entry, DictConfig) for key in entry if " " not in str(key)]


def schema_of(name: str, group: str | None = None) -> type:
    """A schema that a stage has registered."""
    path = f"{name}.yaml" if group is None else f"{group}/{name}.yaml"
    found = OmegaConf.get_type(ConfigStore.instance().load(path).node)
    assert found is not None
    return found


def enum_of(kind: Any) -> type[Enum] | None:
    """The enum in a field's type, if there is one."""
    candidates = [kind, *getattr(kind, "__args__", ())]
    return next((one for one in candidates if isinstance(one, type) and issubclass(one, Enum)), None)


def row(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def shown(value: Any) -> str:
    """A value as the command line takes it; "" for one that must be given."""
    if value == "???":
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def single_quoted(text: str) -> str:
    """Code as Markdown marks it, from docstrings."""
    return text.replace("``", "`")


if __name__ == "__main__":
    sys.stdout.write(page(sys.argv[1:]))
