"""The report in a real browser: no word in its console, nothing asked of a network, verdict and table readable."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
from tests.report.test_report import surveyed
from tests.results.factory import EVIL, make_results, make_run

from holdfast import report
from holdfast import results as R

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")


def browse(page, folder, *flags):
    """(DOM after loading, console lines, addresses asked for)."""
    log = folder / "net.json"
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--enable-logging=stderr",
            f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", "--dump-dom", *flags, page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    events = json.loads(log.read_text())["events"]
    requests = [e["params"] for e in events if {"url", "initiator"} <= (e.get("params") or {}).keys()]
    by_page = {r["url"] for r in requests if r["initiator"] != "not an origin"}  # those are the browser's own errands
    return done.stdout, console, {url for url in by_page if not url.startswith(("file:", "data:", "chrome"))}


def words(dom):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"<(style|script).*?</\1>", "", dom, flags=re.S)))


def test_the_page_opens_from_disk_and_asks_for_nothing(tmp_path):
    dom, console, asked = browse(report.render(make_results(), tmp_path / "report.html"), tmp_path)
    assert console == []
    assert asked == set()
    text = words(dom)
    assert "isce:s=100: PGD-50 reports 79.0%, but robust accuracy is at most 19.5%." in text
    body = re.search(r'<table class="main.*?</table>', dom, re.S)[0]
    for row in R.rows(make_results()):
        assert row.label in words(body)
        assert R.percent(row.robust.value) in words(body)


def test_the_browser_test_can_fail(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("<script>console.error('broken')</script><img src='http://127.0.0.1:9/picture.png'>")
    _, console, asked = browse(page, tmp_path)
    assert any("broken" in line for line in console)
    assert asked == {"http://127.0.0.1:9/picture.png"}


def test_markup_in_class_names_is_text_to_a_browser(tmp_path):
    results = make_results([make_run(EVIL, name=EVIL)], classes=[EVIL] * 10)
    dom, console, asked = browse(report.render(results, tmp_path / "report.html"), tmp_path)
    assert console == []
    assert asked == set()
    assert dom.count("<script") == 1
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in dom


def used(page, folder, script):
    """The DOM after a script that acts as a reader does; the page's policy allows none but its own."""
    acted = folder / "acted.html"
    html = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    acted.write_text(html.replace("</body>", f"<script>{script}</script></body>"))
    dom, console, _ = browse(acted, folder)
    assert console == []
    return dom


def shown_rows(dom):
    """Labels of the rows that the main table shows, in order."""
    table = re.search(r'<table class="main.*?</table>', dom, re.S)[0]
    return [re.search('data-row="([^"]*)"', tag)[1] for tag in re.findall("<tr[^>]*>", table) if "data-row" in tag
            and "hidden" not in tag]  # fmt: skip


def test_a_click_on_a_heading_sorts_and_what_is_void_stays_last(tmp_path):
    runs = [make_run("b", robust=0.2), make_run("void", status="void"), make_run("a", robust=0.35)]
    page = report.render(make_results([*runs, make_run("c", robust=0.05)]), tmp_path / "report.html")
    robust = "[...document.querySelectorAll('.main th button')].find(b => b.textContent == 'robust').click();"
    assert shown_rows(used(page, tmp_path, "")) == ["b", "void", "a", "c"]
    assert shown_rows(used(page, tmp_path, robust)) == ["a", "b", "c", "void"]
    assert shown_rows(used(page, tmp_path, 2 * robust)) == ["c", "b", "a", "void"]
    assert shown_rows(used(page, tmp_path, "document.querySelector('.main th button').click()"))[0] == "a"


def test_words_in_the_box_leave_the_rows_that_have_them(tmp_path):
    losses = ["sce", *(f"isce:s={i}" for i in (1, 3, 10)), *(f"isce:s={i}@cosine" for i in (1, 3, 10))]
    type_in = "const box = document.querySelector('input'); box.value = 'COSINE s=1'; "
    type_in += "box.dispatchEvent(new Event('input'));"
    many = report.render(make_results([make_run(loss) for loss in [*losses, "mmc"]]), tmp_path / "many.html")
    dom = used(many, tmp_path, type_in)
    assert shown_rows(dom) == ["isce:s=1@cosine", "isce:s=10@cosine"]
    assert "2 of 8 rows in all tables" in words(dom)
    few = report.render(make_results([make_run(loss) for loss in losses]), tmp_path / "few.html")
    assert "<input" not in browse(few, tmp_path)[0]


def test_print_shows_every_run_and_no_table_is_cut_off(tmp_path):
    """Folded details are open on paper, and nothing is wider than the page: paper does not scroll."""
    names = ["isce:s=10", "isce:s=1000000", "cosface:m=0.35,scale=15", "sce+adversarial:steps=10,ramp=0.3", *"abcd"]
    page = report.render(make_results([surveyed(make_run(name)) for name in names]), tmp_path / "report.html")
    ask = (
        "<script>document.title = [...document.querySelectorAll('details table')].filter(t => !t.offsetHeight).length"
        " + ' folded, ' + [...document.querySelectorAll('table, .scroll')].filter(t =>"
        " t.getBoundingClientRect().right > innerWidth + 1 || t.scrollWidth > t.clientWidth + 1).length + ' cut off'"
        "</script></body>"
    )

    def title(media):
        text = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text().replace("</body>", ask))
        (tmp_path / "asked.html").write_text(text.replace("@media print", f"@media {media}"))
        dom, _, _ = browse(tmp_path / "asked.html", tmp_path, "--window-size=700,1000", "--hide-scrollbars")
        return re.search(r"<title>(.*?)</title>", dom)[1]

    assert title("all") == "0 folded, 0 cut off"
    assert title("print") != "0 folded, 0 cut off"  # the screen folds: the question can be answered with no
