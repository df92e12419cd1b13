"""Every page of the book, as readers have it: from the file system, on a desk and on a phone, light and dark."""

import json
import re
import subprocess
import sys
from base64 import b64decode
from collections import Counter
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import BOOK, ROOT, Visit

PAGES = sorted(BOOK.rglob("*.html"))
GUIDES = [path.stem for path in (ROOT / "docs").glob("*.md") if path.stem != "index"]
NOTEBOOKS = sorted((ROOT / "results" / "executed").glob("*/*.ipynb"))


def name(path: Path) -> str:
    return str(path.relative_to(BOOK))


def page_of(notebook: Path) -> Path:
    return BOOK / notebook.parent.name / f"{notebook.stem}.html"


AXE = {"resultTypes": ["violations"], "preload": False}  # to load styles again would be refused on the file system
# Highlighted code has thousands of words in the same few colours: one word of each class is enough to judge them.
ONE_WORD_EACH = """() => {
  const seen = new Set();
  for (const word of document.querySelectorAll(".highlight pre span")) {
    if (seen.has(word.className)) word.replaceWith(...word.childNodes);
    seen.add(word.className);
  }
}"""


def faults(visit: Visit, **options: object) -> list[str]:
    """What axe-core finds serious or critical."""
    found = Axe().run(visit.page, options=AXE | options).response["violations"]
    return [
        f"{rule['id']}: {node['target']} {node.get('failureSummary', '')}"
        for rule in found
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    ]


def test_every_notebook_is_a_page() -> None:
    assert NOTEBOOKS
    assert [path for path in NOTEBOOKS if not page_of(path).is_file()] == []
    assert {f"{page}.html" for page in ("index", "search", *GUIDES)} <= {name(path) for path in PAGES}


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_page(visit: Visit, path: Path) -> None:
    page = visit.open(path)
    assert visit.errors == []
    assert {urlsplit(url).scheme for url in visit.requests} <= {"file", "data"}
    images = page.evaluate("[...document.images].map((i) => [i.src, i.alt, i.complete && i.naturalWidth])")
    assert [image for image in images if not (image[1].strip() and image[2])] == []
    sources = page.locator(".math").count()
    assert page.locator("mjx-container").count() >= sources
    assert page.locator("mjx-merror").count() == 0
    # What is left of mathematics that nobody typeset; code may hold dollar signs.
    prose = page.evaluate(
        "(() => { const body = document.querySelector('article, main').cloneNode(true);"
        "body.querySelectorAll('pre, code, script').forEach((node) => node.remove()); return body.textContent; })()"
    )
    assert not re.search(r"\$[^$\n]+\$|\\[(\[a-z]", prose)
    # On a phone no page scrolls sideways; what is wide does so in its own box. Figures keep a size at which their
    # letters can be read: 9 points at 150 dots an inch are 18.75 dots.
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    sizes = page.evaluate("[...document.querySelectorAll('.cell_output img')].map((i) => i.width / i.naturalWidth)")
    assert [size for size in sizes if 18.75 * size < 9] == []
    told = page.evaluate(
        "[...document.querySelectorAll('.table-wrapper, .cell_output, figure')].map((b) => ["
        "b.scrollWidth > b.clientWidth && getComputedStyle(b).overflowX === 'auto',"
        "getComputedStyle(b, '::before').content.includes('scroll sideways')])"
    )
    assert [one for one in told if one[0] != one[1]] == []  # and says so
    # At a desk formulas and what a cell printed are seen whole.
    page.set_viewport_size({"width": 1280, "height": 900})
    boxes = "[...document.querySelectorAll('.math-wrapper, .highlight-myst-ansi pre')]"
    wide = f"{boxes}.filter((b) => b.scrollWidth > b.clientWidth + 1)"
    assert page.evaluate(f"{wide}.map((b) => b.textContent.slice(0, 60))") == []
    assert visit.errors == []
    page.evaluate(ONE_WORD_EACH)
    page.emulate_media(color_scheme="light")
    assert faults(visit) == []
    page.emulate_media(color_scheme="dark")
    assert faults(visit, runOnly=["color-contrast"]) == []  # all that the scheme can change


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    missing = []
    for link in re.findall(r'\bhref="([^"]+)"', path.read_text(encoding="utf-8")):
        parts = urlsplit(link.replace("&amp;", "&"))
        if parts.scheme or parts.netloc:
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        there = target.is_file() and target.is_relative_to(BOOK)
        if not there or (parts.fragment and f'id="{unquote(parts.fragment)}"' not in target.read_text("utf-8")):
            missing.append(link)
    assert missing == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_page_says_where_it_comes_from(notebook: Path) -> None:
    text = page_of(notebook).read_text(encoding="utf-8")
    profile, place = notebook.parent.name, str(notebook.relative_to(ROOT))
    (small_print,) = re.findall(r'<div class="about docutils container">\s*<p>(Profile .*?)</div>', text, re.DOTALL)
    for fact in (profile, place, f"notebooks/{notebook.name}"):
        assert fact in small_print
    records = [json.loads(p.read_text()) for p in (ROOT / "results" / "runs" / profile).glob("*.json")]
    for record in records:
        assert record["provenance"]["commit"][:7] in small_print
        assert record["provenance"]["device"] in small_print
    assert re.search(r"\d{4}-\d\d-\d\d|date unknown", small_print)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_figure_keeps_its_alt_text_and_its_data(notebook: Path) -> None:
    text = page_of(notebook).read_text(encoding="utf-8")
    outputs = [o for cell in json.loads(notebook.read_text())["cells"] for o in cell.get("outputs", [])]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    shown = re.findall(r'<img alt="([^"]*)" src="([^"]*)"', text)
    assert len(shown) == len(pictures)
    page = page_of(notebook).parent
    for picture, (alt, source) in zip(pictures, shown, strict=True):
        said = picture["metadata"]["image/png"]["alt"]
        assert Counter(re.sub(r"&\w+;|\W", "", alt)) == Counter(re.sub(r"\W", "", said))
        assert (page / source).read_bytes() == b64decode("".join(picture["data"]["image/png"]))
    assert len(re.findall(r'href="[^"]*/_downloads/\w+/[\w-]+\.json"', text)) == len(pictures)


def beside(path: Path, which: str) -> Path | None:
    """The page that "next" or "prev" leads to."""
    link = re.search(rf'<a class="{which}-page" href="([^"]+)"', path.read_text(encoding="utf-8"))
    return (path.parent / link[1]).resolve() if link else None


def test_pages_follow_each_other() -> None:
    """Next after next leads through the whole book, and back."""
    path, seen = BOOK / "index.html", []
    while after := beside(path, "next"):
        assert beside(after, "prev") == path
        seen.append(after)
        path = after
    assert len(seen) == len(set(seen)) == len(NOTEBOOKS) + len(GUIDES)


def test_titles_tell_pages_apart() -> None:
    titles = [re.search(r"<title>(.*?)</title>", path.read_text(encoding="utf-8"))[1] for path in PAGES]
    assert len(set(titles)) == len(titles)
    assert [title for title in titles if "\\(" in title] == []


def test_the_first_page_says_what_came_out(visit: Visit) -> None:
    """The picture and the answer of README.md, with a way to the page that explains it."""
    page = visit.open(BOOK / "index.html")
    assert page.locator("figure img").get_attribute("alt") in (ROOT / "README.md").read_text(encoding="utf-8")
    assert page.locator("#what-came-out a[href='faces/07-convergence.html']").count() == 1


def test_the_first_figure_is_seen_without_scrolling(visit: Visit) -> None:
    visit.page.set_viewport_size({"width": 1280, "height": 800})
    page = visit.open(BOOK / "index.html")
    box = page.locator("figure img").bounding_box()
    assert box["height"] > 250
    assert box["y"] + box["height"] <= 800


def test_code_is_folded_but_where_it_stands_beside_its_equation(visit: Visit) -> None:
    """And "Show the code" can be seen, in the dark, too, and shows it; long lines go on below."""
    for notebook in NOTEBOOKS:
        text = page_of(notebook).read_text(encoding="utf-8")
        cells = re.findall(r'<div class="cell_input[^"]*"', text)
        folded = len(re.findall(r"<details [^>]*hide above-input", text))
        if notebook.stem[:2] == "01":
            assert 0 < folded < len(cells) / 2
        else:
            assert folded == len(cells)
    page = visit.open(page_of(next(path for path in NOTEBOOKS if path.stem[:2] == "02")))
    page.emulate_media(color_scheme="dark")
    summary = page.locator("details.hide summary").first
    assert "Show the code" in summary.inner_text()
    summary.click()
    assert page.locator(".cell_input pre").first.is_visible()
    wide = (
        "[...document.querySelectorAll('.highlight pre')].filter((pre) => pre.scrollWidth > pre.clientWidth + 1).length"
    )
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate(wide) == 0


def test_figures_do_not_glare_in_the_dark(visit: Visit) -> None:
    page = visit.open(BOOK / "index.html")
    for scheme, filter in (("light", "none"), ("dark", "invert(0.94) hue-rotate(180deg) brightness(1.35)")):
        page.emulate_media(color_scheme=scheme)
        assert page.locator("figure img").evaluate("(image) => getComputedStyle(image).filter") == filter


@pytest.mark.parametrize(
    "query",
    [
        "MV-Softmax",
        "MV Softmax",
        "mvsoftmax",
        "MV\u2011Softmax",
        "MV\u2013Softmax",
        "MV\u2212Softmax",
        "MV-Soft\u00admax",
    ],
)
def test_search_finds_the_loss_however_it_is_written(visit: Visit, query: str) -> None:
    page = visit.open(BOOK / "search.html", f"?q={quote(query)}")
    for found in ("index", "faces/01-losses", "faces/02-geometry"):  # they come one after the other
        page.locator(f"ul.search li a[href*='{found}.html']").first.wait_for()


def test_search_finds_pages(visit: Visit) -> None:
    page = visit.open(BOOK / "search.html", "?q=autograd")
    page.locator("ul.search li a").first.wait_for()
    assert any("01-losses" in link for link in page.locator("ul.search li a").evaluate_all("l => l.map((a) => a.href)"))
    assert visit.errors == []


def test_dark_is_dark(visit: Visit) -> None:
    page = visit.open(BOOK / "index.html")
    colours = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    light, dark = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
    assert dark < 150 < 600 < light


def test_the_server_serves_this_machine(visit: Visit) -> None:
    """Over HTTP the search has excerpts, too; a port in use is said in one line."""
    command = [sys.executable, str(ROOT / "docs" / "serve.py")]
    with subprocess.Popen([*command, "0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            url = re.search(r"http://127\.0\.0\.1:\d+/", server.stdout.readline())[0]
            visit.page.goto(f"{url}search.html?q=autograd")
            visit.page.locator("ul.search li p.context").first.wait_for()
            assert visit.errors == []
            assert all(request.startswith(url) for request in visit.requests)
            port = str(urlsplit(url).port)
            second = subprocess.run([*command, port], capture_output=True, text=True, check=False)
            assert second.returncode == 1
            assert second.stderr.startswith(f"mvrepro: port {port} can't be used") and second.stderr.count("\n") == 1
        finally:
            server.terminate()
