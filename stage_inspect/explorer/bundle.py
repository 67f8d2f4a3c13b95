"""The pages' modules as one script, for a file that holds everything: no tool of another language is needed.

The modules keep to what this can read: ``import { a, b } from "./x.js";`` on one line, and ``export`` before a
function, an async function or a const. Each becomes a function that returns what it exports,
called once, in order of need.
"""

import re
from collections.abc import Mapping

IMPORT = re.compile(r'^import \{ ([\w, ]+) \} from "\./(\w+)\.js";$', re.MULTILINE)
EXPORT = re.compile(r"^export (?=(?:async function|function|const) (\w+))", re.MULTILINE)


def bundle(modules: Mapping[str, str], entry: str) -> str:
    """One script that does what importing module `entry` (a name without ``.js``) of `modules` would do.

    Raises ValueError for a module that is written in another way.
    """
    done: list[str] = []
    parts: list[str] = []

    def add(name: str, above: tuple[str, ...]) -> None:
        if name in done:
            return
        if name in above:
            raise ValueError(f"the modules {', '.join([*above, name])} import one another in a circle")
        source = modules[name]
        for _, other in IMPORT.findall(source):
            add(other, (*above, name))
        parts.append(wrapped(name, source))
        done.append(name)

    add(entry, ())
    return '"use strict";\n' + "\n".join(parts)


def wrapped(name: str, source: str) -> str:
    """A module as a function's result."""
    exported = EXPORT.findall(source)
    body = IMPORT.sub(lambda found: f"const {{ {found[1]} }} = module_{found[2]};", EXPORT.sub("", source))
    left = re.search(r"^(import|export)\b.*$", body, re.MULTILINE)
    if left is not None:
        raise ValueError(f"{name}.js: {left[0]!r} is not written as the bundle reads it")
    return f"const module_{name} = (() => {{\n{body}\nreturn {{ {', '.join(exported)} }};\n}})();"
