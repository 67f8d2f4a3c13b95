"""The page opens anywhere: one file, no address, and nothing of a prompt or a path becomes markup."""

import json
import re
from dataclasses import replace
from pathlib import Path

from stage_trace.attribution import AttributionGraph
from stage_trace.page import in_script


def test_the_page_is_whole_and_escapes_everything(graph: AttributionGraph, tmp_path: Path) -> None:
    """F42, A15."""
    hostile = replace(graph.prune(), names=("</script><img src=x onerror=alert(1)>", "\u2028"))
    page = hostile.save(tmp_path, certificate=graph.certify(3))[-1].read_text()
    assert len(page) < 3_000_000
    assert not re.search(r"https?:|//\w+\.|url\(|@import|<link[^>]*href=\"(?!data:)", page)
    assert page.count("</script>") == 2  # its own two
    assert "<img" not in page
    held = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert held is not None
    data = json.loads(held[1])
    assert data["prompt"] == graph.prompt.text
    assert "</script><b>" in data["prompt"]
    assert len(data["nodes"]) == len(hostile.nodes)
    assert data["document"]["metadata"]["prompt"] == graph.prompt.text


def test_the_code_writes_text_alone() -> None:
    code = (Path(__file__).parents[3] / "stage_trace" / "assets" / "page.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", code)


def test_json_in_a_script_is_json() -> None:
    value = {"a": "</script>&\u2028<!--", "b": [1.5, None]}
    text = in_script(value)
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == value
