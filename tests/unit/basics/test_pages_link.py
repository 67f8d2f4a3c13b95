"""Reports lead to the pages of their latents, whichever was written first."""

from pathlib import Path

from shared.basics.pages_link import link_pages, reports_of, slot


def test_slots_follow_what_is_there(tmp_path: Path) -> None:
    run = tmp_path / "sweep" / "k=8,a b"
    (run / "explorer").mkdir(parents=True)
    report, comparison = run / "report.html", tmp_path / "comparison.html"
    report.write_text(f"<p>one</p>{slot('.')}")
    comparison.write_text(f"{slot('sweep/k=8,a b')}<p>two</p>{slot('sweep/other')}")
    assert {report, comparison} <= set(reports_of(run))
    empty = report.read_text(), comparison.read_text()
    for one in reports_of(run):
        link_pages(one)
    assert (report.read_text(), comparison.read_text()) == empty

    (run / "latents.html").write_text("")
    link_pages(report)
    assert 'href="latents.html"' in report.read_text()
    (run / "explorer" / "index.html").write_text("")
    for _ in range(2):  # again: nothing is written twice
        link_pages(report)
        link_pages(comparison)
    assert report.read_text().count("<a ") == comparison.read_text().count("<a ") == 1
    assert 'href="explorer/index.html"' in report.read_text()
    assert 'href="sweep/k%3D8%2Ca%20b/explorer/index.html"' in comparison.read_text()

    (run / "explorer" / "index.html").unlink()
    (run / "latents.html").unlink()
    link_pages(report)
    link_pages(comparison)
    assert (report.read_text(), comparison.read_text()) == empty
