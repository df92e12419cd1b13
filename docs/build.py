"""Build the book: every executed notebook as a page of an offline site in build/book.

A copy of each notebook gets what a reader of the page needs (where its numbers come from, alt texts, the data
behind each figure, links that lead somewhere); then Sphinx makes pages of the copies, and each of its warnings is
an error. Nothing is executed, and the same commit gives the same bytes.
"""

import ast
import json
import re
import shutil
import sys
from base64 import b64decode
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from posixpath import normpath
from typing import Any

from sphinx.cmd.build import main as sphinx

from mvrepro.errors import UserError
from mvrepro.files import RESULTS, ROOT, read_json, write_atomic, write_json
from mvrepro.provenance import git

DOCS, BUILD = ROOT / "docs", ROOT / "build"
PAGES, STATIC, BOOK = BUILD / "pages", BUILD / "static", BUILD / "book"
# A formula and the punctuation after it, between which a browser would break the line.
PUNCTUATION = re.compile(r"(?<![\\$`])\$(?=[^\s$])([^$`\n]*[^\s$`\\])\$([.,;:)]+)")
PARTS = {  # of the navigation: pages of docs/ -> what it calls them
    "Start here": {"read": "how to read it"},
    "Try and use": {
        "interactive": "a loss in your hands",
        "play": "play with a notebook",
        "reproduce": "reproduce and validate",
        "data": "photographs and formats",
        "head": "the head in your own code",
        "scale": "training at scale",
    },
    "Look up": {
        "background": "words, profiles, tuning",
        "article": "from article to code",
        "model-card": "model card",
        "data-sheet": "data sheet",
        "conventions": "conventions of others",
        "security": "files from outside",
    },
}
GUIDES = {name for part in PARTS.values() for name in part}
# To a file, and maybe a heading in it; not to an address.
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s:#]+\.\w+)(#[\w-]+)?\)")
OPEN, TOOLS = "01", "tools"  # the notebook whose code stands beside its equations, and the cell there that doesn't


def profiles() -> list[str]:
    """The profiles with executed notebooks, real faces first."""
    found = {path.parent.name for path in (RESULTS / "executed").glob("*/*.ipynb")}
    return sorted(found, key=lambda name: (name != "faces", name))


def notebooks(profile: str) -> list[Path]:
    return sorted((RESULTS / "executed" / profile).glob("*.ipynb"))


def title(path: Path) -> str:
    return "".join(read_json(path)["cells"][0]["source"]).splitlines()[0].removeprefix("# ")


def short(path: Path) -> str:
    """04-margin-based.ipynb -> "04 margin-based"."""
    return path.stem.replace("-", " ").replace(" based", "-based")


def commit(revision: str | None) -> str:
    """A commit with its date, which a shallow clone may not know."""
    if not revision:
        return "a commit not known here"
    return f"`{revision[:7]}` ({git('show', '-s', '--format=%cs', revision) or 'date unknown'})"


def origin(profile: str) -> str:
    """Where the profile's numbers come from: commits, dates and hardware, out of the records of its runs."""
    records = [read_json(path)["provenance"] for path in sorted((RESULTS / "runs" / profile).glob("*.json"))]
    if not records:
        return "no training runs"
    commits = " and ".join(commit(each) for each in sorted({r["commit"] for r in records}, key=str))
    changed = sum(r["dirty"] is not False for r in records)
    machines = sorted({f"{r['device']} with {r['cpus']} cores, torch {r['versions']['torch']}" for r in records})
    note = (
        f", {changed} of them with changes not yet committed (`make reproduce` compares each value anew)"
        if changed
        else ""
    )
    return f"{len(records)} training runs at {commits}{note}, on {' and '.join(machines)}"


def about(path: Path) -> str:
    """The small print of a page."""
    profile, place = path.parent.name, path.relative_to(ROOT)
    shallow = git("rev-parse", "--is-shallow-repository") != "false"  # there every file seems to be of one commit
    last = None if shallow else git("log", "-1", "--format=%H", "--", str(place))
    source = f"[notebooks/{path.name}](notebooks/{path.name})"
    return (
        "```{container} about\n"
        f"Profile **{profile}**: {origin(profile)}. This page: [{place}]({place}), last changed at {commit(last)}; "
        f"without outputs: {source}.\n```"
    )


def resolve(text: str, folder: str, up: str) -> str:
    """Let links lead to a page of the book or to a file of the repository; others become their words.
    Punctuation moves into the formula before it.

    folder: where the text stands in the repository; up: the way from its page, in build/pages, to the repository's
    root.
    """

    def link(match: re.Match[str]) -> str:
        words, target, heading = match.groups()
        for place in (normpath(f"{folder}/{target}"), normpath(target)):
            if (ROOT / place).is_file():
                plain = words.replace("`", "")  # a role takes no markup inside
                page = place_in_book(place)
                return f"[{words}]({up[6:]}{page}{heading or ''})" if page else f"{{download}}`{plain} <{up}{place}>`"
        return words

    return PUNCTUATION.sub(r"$\1\\text{\2}$", LINK.sub(link, text))


def place_in_book(place: str) -> str | None:
    """Where in build/pages a file of the repository is, if it is a page."""
    path = Path(place)
    if path.parent == Path("docs") and path.suffix == ".md" and path.stem in GUIDES:
        return path.name
    return "/".join(path.parts[2:]) if path.match("results/executed/*/*.ipynb") else None


def figure_data(profile: str) -> dict[str, str]:
    """SHA-256 of each picture of a profile -> the file with the data behind it."""
    records = {path: read_json(path) for path in sorted((RESULTS / "figures" / profile).glob("*/*.json"))}
    return {record["sha256"]: str(path.relative_to(ROOT)) for path, record in records.items() if "sha256" in record}


def join_setup(cells: list[dict[str, Any]]) -> None:
    """The first code cells (parameters and imports) as one, so that one click shows them."""
    first = next(i for i, cell in enumerate(cells) if cell["cell_type"] == "code")
    while cells[first + 1]["cell_type"] == "code":
        cells[first]["source"] = [*cells[first]["source"], "\n\n", *cells.pop(first + 1)["source"]]
    cells[first]["metadata"]["tags"] = ["hide-input"]


def page(path: Path, data: dict[str, str]) -> dict[str, Any]:
    """The notebook as the book shows it. data: of figure_data."""
    notebook = read_json(path)
    folder, up = str(path.parent.relative_to(ROOT)), "../../../"
    if path.parent.name != profiles()[0]:  # or search and tabs would show the same title twice
        heading = notebook["cells"][0]["source"][0]
        notebook["cells"][0]["source"][0] = f"{heading.rstrip()} (profile {path.parent.name})\n"
    join_setup(notebook["cells"])
    for cell in notebook["cells"]:
        code = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            cell["source"] = resolve(code, folder, up)
            continue
        if code.startswith("report.header("):
            cell["metadata"]["tags"] = ["remove-input"]  # the box that it prints says the same
        elif path.stem[:2] != OPEN or cell["id"] == TOOLS:
            cell["metadata"]["tags"] = ["hide-input"]
        for output in cell["outputs"]:
            text = output.get("data", {}).get("text/markdown")
            if text:
                output["data"]["text/markdown"] = resolve("".join(text), folder, up)
        pictures = [output for output in cell["outputs"] if "image/png" in output.get("data", {})]
        if len(pictures) > 1:
            raise UserError(f"{path.relative_to(ROOT)}: cell {cell['id']} shows two figures, the book takes one a cell")
        for output in pictures:
            # MyST-NB takes the size of a picture from its output, but the alt text from its cell.
            cell["metadata"] |= {
                "tags": ["hide-input"],
                "mystnb": {"image": {"alt": output["metadata"]["image/png"]["alt"]}},
            }
            source = data.get(sha256(b64decode("".join(output["data"]["image/png"]))).hexdigest())
            if source:
                note = f"```{{container}} about\n{{download}}`Data of this figure <{up}{source}>`\n```"
                added = {"output_type": "display_data", "data": {"text/markdown": note}, "metadata": {}}
                cell["outputs"].append(added)
    small_print = {"cell_type": "markdown", "id": "about", "metadata": {}, "source": resolve(about(path), "", up)}
    notebook["cells"].insert(1, small_print)
    return notebook


def readme(what: str, pattern: str) -> re.Match[str]:
    """A part of README.md that the book shows, too. Raises UserError, naming it, where it is not there."""
    found = re.search(pattern, (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    if not found:
        raise UserError(f"README.md lacks {what}, which the first page of the book shows")
    return found


def verdicts() -> str:
    """The table of claims."""
    return readme("the table of claims between its two marks", r"<!-- claims:.*?-->\n(.*?)<!-- end of claims -->")[1]


def answer() -> str:
    """What came out so far, below its picture."""
    words = resolve(readme("the section '## The answer so far'", r"^## The answer so far\n\n(.*?)\n#")[1], "", "../../")
    alt, picture, caption = readme("a figure with its caption", r"^!\[([^]]*)\]\(([^)]*)\)\n\n\*(.*?)\*$").groups()
    return f"```{{figure}} ../../{picture}\n:alt: {alt}\n\n{caption}\n```\n\n{words}\n"


def reading() -> str:
    """What the first page lists: each profile's notebooks by their titles, and what the profile is."""
    parts = []
    for profile in profiles():
        pages = notebooks(profile)
        note = re.search(rf"`{profile}`: ([^|]*) \|", pages[0].read_text(encoding="utf-8"))[1]  # out of its box
        parts.append(f"## Profile {profile}\n\n{note[0].upper()}{note[1:]}.\n")
        parts += [f"- {path.stem[:2]} [{title(path)}]({profile}/{path.name})" for path in pages]
    return "\n".join(parts)


def tree(caption: str, pages: list[str]) -> str:
    """A part of the navigation: "00 claims <faces/00-claims>" and so on."""
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```\n"])


def index() -> str:
    first = f"{profiles()[0]}/{notebooks(profiles()[0])[0].name}"
    text = resolve((DOCS / "index.md").read_text(encoding="utf-8"), "docs", "../../").replace("<!-- first -->", first)
    table = verdicts().replace("(paper/claims.toml)", f"({first})").replace("(results/executed/", "(")
    text = text.replace("<!-- verdicts -->", table)
    text = text.replace("<!-- notebooks -->", reading()).replace("<!-- answer -->", answer())
    trees = [tree(f"Profile {each}", [f"{short(p)} <{each}/{p.stem}>" for p in notebooks(each)]) for each in profiles()]
    guides = [tree(part, [f"{words} <{name}>" for name, words in pages.items()]) for part, pages in PARTS.items()]
    return text + "".join([guides[0], *trees[:1], *guides[1:], *trees[1:]])


def formulas() -> str:
    """The library's tables for the interactive page, out of its source: the library itself would need torch here.
    A loss with a part that docs/interactive/losses.js doesn't know is left out."""
    slots = {"f": ("cos", "A", "AM", "Arc"), "h": (None, "fixed", "adaptive"), "g": (None, "HM", "F")}
    found = {}
    for node in ast.parse((ROOT / "mvrepro" / "losses.py").read_text(encoding="utf-8")).body:
        match node:
            case ast.AnnAssign(ast.Name("LOSSES"), _, ast.Dict(names, calls)):
                found["LOSSES"] = {name.value: row(call) for name, call in zip(names, calls, strict=True)}
            case ast.Assign([ast.Name("DEFAULT_MARGIN")], margins):
                found["MARGINS"] = ast.literal_eval(margins)
    if len(found) < 2:
        raise UserError("mvrepro/losses.py lacks the table LOSSES or DEFAULT_MARGIN, which the book reads")
    known = {n: r for n, r in found["LOSSES"].items() if all(r[part] in slots.get(part, ()) for part in r)}
    lines = {"MV_LOSSES": known, "MV_MARGINS": found["MARGINS"]}
    return "".join(f"const {name} = {json.dumps(value)};\n" for name, value in lines.items())


def row(call: ast.Call) -> dict[str, Any]:
    """Loss("AM", h="fixed") -> its parts."""
    given = dict(zip("fhg", map(ast.literal_eval, call.args), strict=False))
    return {"f": "cos", "h": None, "g": None} | given | {k.arg: ast.literal_eval(k.value) for k in call.keywords}


def assets() -> None:
    """Styles and scripts, and MathJax out of its package: what the pages need of its 24 MB."""
    mathjax = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"
    for folder in (DOCS / "static", DOCS / "interactive"):
        shutil.copytree(folder, STATIC, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.md", "*.html"))
    fonts = Path("output", "chtml", "fonts", "woff-v2")
    shutil.copytree(mathjax / fonts, STATIC / "mathjax" / fonts)
    shutil.copy(mathjax / "tex-chtml.js", STATIC / "mathjax")
    write_atomic(STATIC / "table.js", formulas())


def main() -> int:
    if not profiles():
        raise UserError("results/executed holds no notebook, so there is nothing to show: `make reproduce` makes some")
    for folder in (PAGES, STATIC, BOOK):
        shutil.rmtree(folder, ignore_errors=True)
    assets()
    for profile in profiles():
        data = figure_data(profile)
        for path in notebooks(profile):
            write_json(PAGES / profile / path.name, page(path, data))
    write_atomic(PAGES / "index.md", index())
    for name in GUIDES:
        text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
        write_atomic(PAGES / f"{name}.md", resolve(text, "docs", "../../"))
    shutil.copy(DOCS / "interactive" / "widget.html", PAGES)
    options = ["-q", "-W", "--keep-going", "-c", str(DOCS), "-d", str(BUILD / "doctrees")]
    return sphinx([*options, str(PAGES), str(BOOK)])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"mvrepro: {error}")
