"""The explorer as files: the same documents, whole, and a single page that allows nothing but itself."""

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.basics.errors import GranaryError
from stage_inspect.explorer import publish
from stage_inspect.explorer.bundle import bundle
from stage_inspect.explorer.documents import Documents
from stage_inspect.explorer.guard import POLICY
from stage_inspect.explorer.server import static_files
from tests.latents import HOSTILE, synthetic_latents


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Documents:
    return Documents(synthetic_latents(tmp_path_factory.mktemp("published") / "latents", 70), "made up")


def unpack(content: bytes) -> Any:
    return json.loads(gzip.decompress(content))


def test_a_folder_holds_every_document(documents: Documents, tmp_path: Path) -> None:
    folder = tmp_path / "site"
    assert publish.write_folder(documents, folder) == 70
    meta = json.loads((folder / "data" / "meta.json").read_text())
    assert (meta["chunk"], meta["live"], meta["writable"]) == (publish.CHUNK, None, False)
    for latent in (0, 3, 69):
        chunk = unpack((folder / "data" / "latents" / f"{latent // publish.CHUNK}.json.gz").read_bytes())
        assert chunk[str(latent)] == json.loads(json.dumps(documents.latent(latent)))
    for column in meta["columns"]:
        packed = (folder / "data" / "column" / f"{column['name']}.{column['dtype']}.gz").read_bytes()
        assert gzip.decompress(packed) == documents.column(column["name"])
    assert unpack((folder / "data" / "rows" / "1.json.gz").read_bytes()) == json.loads(json.dumps(documents.rows(1)))
    policy = re.search(r'Security-Policy" content="([^"]*)"', (folder / "index.html").read_text())[1]
    assert set(policy.split("; ")) == set(POLICY.split("; ")) - {
        "frame-ancestors 'none'"
    }  # which only a header may say
    served = {path.name for path in (folder / "static").iterdir()} | {"index.html"}
    assert served == set(static_files())
    publish.write_folder(documents, folder)  # again, in place


def test_a_folder_of_other_things_is_left_alone(documents: Documents, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(GranaryError, match="holds other files"):
        publish.write_folder(documents, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_one_file_holds_what_was_chosen(documents: Documents, tmp_path: Path) -> None:
    documents.latents.notes.set_note(9, HOSTILE[0])
    publish.write_page(documents, [9, 3, 42, 9], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    table = json.loads(re.search(r'id="granary-data">(.*?)</script>', text, re.DOTALL)[1])
    data = {path: gzip.decompress(base64.b64decode(content)) for path, content in table.items()}
    assert json.loads(data["meta.json"])["only"] == [3, 9, 42]
    assert {path for path in data if path.startswith("latents/")} == {f"latents/{n}.json.gz" for n in (3, 9, 42)}
    density = np.frombuffer(data["column/density.f4.gz"], "<f4")
    assert density[42] == np.float32(documents.latents.table["density"][42])
    assert density[10] == 0
    assert text.count("<script") == 2
    assert "http://" not in re.sub(r"http://www\.w3\.org/2000/svg", "", text)
    policy = re.search(r'Security-Policy" content="([^"]*)"', text)[1]
    assert "unsafe" not in policy
    assert "'self'" not in policy


@pytest.mark.parametrize("chosen", [[], [70], [-1], range(201)])
def test_one_file_has_its_limits(documents: Documents, tmp_path: Path, chosen: list[int]) -> None:
    with pytest.raises(GranaryError, match="latents"):
        publish.write_page(documents, list(chosen), tmp_path / "page.html")


def test_chance_is_the_same_each_time_and_takes_no_dead_latent(documents: Documents) -> None:
    chosen = publish.chosen_by_chance(documents, 20)
    assert chosen == publish.chosen_by_chance(documents, 20)
    assert len(set(chosen)) == 20
    assert 3 not in publish.chosen_by_chance(documents, 70)


def test_the_modules_become_one_script() -> None:
    modules = {name[:-3]: content.decode() for name, content in static_files().items() if name.endswith(".js")}
    script = bundle(modules, "app")
    assert all(f"const module_{name} = " in script for name in modules)
    assert not re.search(r"^(import|export)\b", script, re.MULTILINE)


@pytest.mark.parametrize(
    "source",
    [
        'import * as all from "./b.js";',
        'import x from "./b.js";',
        "export default 3;",
        "export { a };",
        "export class A {}",
    ],
)
def test_a_module_of_another_form_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match="is not written as the bundle reads it"):
        bundle({"a": source, "b": ""}, "a")


def test_a_circle_of_modules_is_refused() -> None:
    modules = {"a": 'import { x } from "./b.js";', "b": 'import { y } from "./a.js";\nexport const x = 1;'}
    with pytest.raises(ValueError, match="in a circle"):
        bundle(modules, "a")


def test_no_markup_is_ever_made_from_a_string() -> None:
    made = re.compile(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|setTimeout\(['\"]|DOMParser"
    )
    for name, content in static_files().items():
        if name.endswith(".js"):
            assert not made.search(content.decode()), name
