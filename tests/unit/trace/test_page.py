"""The page opens anywhere: one file, no address, and nothing of a prompt or a path becomes markup."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from shared.basics.errors import GranaryError
from shared.sae.for_store import weights_sha256
from stage_trace.attribution import AttributionGraph
from stage_trace.nodes import Kind
from stage_trace.page import in_script, strongest
from stage_trace.trace import trace
from tests.latents import synthetic_latents
from tests.tracing import bundled_transcoder, make_clt


def test_f42_the_page_is_whole_and_escapes_everything(graph: AttributionGraph, tmp_path: Path) -> None:
    hostile = replace(graph.prune(), names=("</script><img src=x onerror=alert(1)>", "\u2028"))
    page = hostile.save(tmp_path, certificate=graph.certify(3, 5), spliced=graph.spliced())[-1].read_text()
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
    (told,) = (told for name, _, told in data["facts"] if name == "Replacement model")
    assert re.search(r"[\d.]+ over the prompt, same token at \d+ of \d+", told)
    assert re.search(r"Its loss on the prompt is [\d.]+ nats, the model's [\d.]+\.", data["spliced_text"])


def test_marks_that_a_reader_saved_are_kept(graph: AttributionGraph, tmp_path: Path) -> None:
    pruned = graph.prune()
    first, second, third = (node.id for node in pruned.nodes[:3])
    path = pruned.save(tmp_path)[0]
    document = json.loads(path.read_text())
    document["qParams"] |= {"pinnedIds": [first, "9_9_9"], "supernodes": [["both", second, third], ["gone", "9_9_9"]]}
    path.write_text(json.dumps(document))
    for _ in range(2):
        kept = json.loads(pruned.save(tmp_path)[0].read_text())["qParams"]
        assert kept["pinnedIds"] == [first]
        assert kept["supernodes"] == [["both", second, third]]
    document["metadata"]["prompt_tokens"] = ["another"]
    path.write_text(json.dumps(document))
    assert json.loads(pruned.save(tmp_path)[0].read_text())["qParams"]["pinnedIds"] == []


def test_a_page_draws_the_strongest_edges(graph: AttributionGraph) -> None:
    edges = graph.prune().edges
    few = strongest(edges, 20)
    assert len(few) == 20
    assert few == [edge for edge in edges if edge in few]
    assert {edge.target.id for edge in strongest(edges, len(edges) - 1)} == {edge.target.id for edge in edges}


def test_the_page_shows_what_a_latents_folder_knows(tmp_path: Path) -> None:
    """Found beside the dictionary by the hash of its weights; texts of strangers, escaped as all others."""
    bundled_transcoder(1, threshold=0.8).save_pretrained(tmp_path / "tc", {})
    sha256 = weights_sha256(tmp_path / "tc")
    latents = synthetic_latents(tmp_path / "tc" / "latents", 96)
    meta = json.loads((tmp_path / "tc" / "latents" / "meta.json").read_text())
    meta["dictionary"]["sha256"] = sha256
    (tmp_path / "tc" / "latents" / "meta.json").write_text(json.dumps(meta))
    traced = trace("bundled", tmp_path / "tc", "def f(x):")
    feature = next(node for node in traced.sources if node.kind is Kind.feature and node.number != 3)
    latents.notes.set_note(feature.number, "opens <b>\nmore")
    page = traced.prune(1.0, 1.0).save(tmp_path / "out")[-1].read_text()
    assert "<b>" not in page
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    card = data["cards"][f"1_{feature.number}"]
    assert len(card["examples"][0]["pieces"]) == len(card["examples"][0]["heat"])
    assert 10 in card["examples"][0]["heat"]
    assert next(node for node in data["nodes"] if node["id"] == feature.id)["name"] == "opens <b>"
    document = json.loads((tmp_path / "out" / "graph.json").read_text())
    assert next(node for node in document["nodes"] if node["node_id"] == feature.id)["clerp"] == "opens <b>"

    meta["dictionary"]["sha256"] = "0" * 64
    (tmp_path / "tc" / "latents" / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(GranaryError, match="made from other weights"):
        traced.save(tmp_path / "out", latents=[tmp_path / "tc" / "latents"])


def test_the_page_shows_what_the_latents_folder_of_a_clt_knows(tmp_path: Path) -> None:
    """Its latents are numbered layer after layer in the folder, and by layer in the graph."""
    make_clt(4, width=128, latents=32).save_pretrained(tmp_path / "clt", {})
    latents = synthetic_latents(tmp_path / "clt" / "latents", 128)
    path = tmp_path / "clt" / "latents" / "meta.json"
    meta = json.loads(path.read_text())
    meta["dictionary"]["sha256"] = weights_sha256(tmp_path / "clt")
    path.write_text(json.dumps(meta))
    traced = trace("bundled", tmp_path / "clt", "def f(x):")
    feature = next(node for node in traced.sources if node.kind is Kind.feature and node.layer == 2)
    latents.notes.set_note(2 * 32 + feature.number, "of the third layer")
    page = traced.prune(1.0, 1.0).save(tmp_path / "out")[-1].read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    card = data["cards"][f"2_{feature.number}"]
    assert card["number"] == 2 * 32 + feature.number
    assert card["examples"]
    assert next(node for node in data["nodes"] if node["id"] == feature.id)["name"] == "of the third layer"


def test_the_code_writes_text_alone() -> None:
    code = (Path(__file__).parents[3] / "stage_trace" / "assets" / "page.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", code)


def test_json_in_a_script_is_json() -> None:
    value = {"a": "</script>&\u2028<!--", "b": [1.5, None]}
    text = in_script(value)
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == value
