"""`make badges` makes what README links to, for an address that only its caller knows."""

import ast
import importlib.util
from pathlib import Path

import pytest

from mvrepro.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("badges", ROOT / "docs" / "badges.py")
badges = importlib.util.module_from_spec(spec)
spec.loader.exec_module(badges)


def test_both_badges_lead_to_the_repository_that_was_named():
    text = badges.badges("somebody/mvrepro")
    assert "mybinder.org/v2/gh/somebody/mvrepro/" in text
    assert f"/github/somebody/mvrepro/blob/HEAD/{badges.START}" in text


@pytest.mark.parametrize("remote", ["git@github.com:a/b.git", "https://github.com/a/b", "https://github.com/a/b.git/"])
def test_the_repository_may_come_from_the_remote(remote, monkeypatch):
    done = type("Done", (), {"stdout": f"{remote}\n"})
    monkeypatch.setattr(badges.subprocess, "run", lambda *args, **kwargs: done)
    assert badges.repository("") == "a/b"
    assert badges.repository("c/d") == "c/d"


@pytest.mark.parametrize("given", ["", "mvrepro", "a/b/c", "https://example.org/a/b"])
def test_no_address_is_invented(given, monkeypatch):
    monkeypatch.setattr(badges.subprocess, "run", lambda *args, **kwargs: type("Done", (), {"stdout": "/srv/git\n"}))
    with pytest.raises(UserError, match="REPO=owner/name"):
        badges.repository(given)


def test_what_colab_opens_names_files_and_options_that_are_there():
    cells = badges.colab("somebody/mvrepro")["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert "github.com/somebody/mvrepro" in code
    plain = "\n".join(line for line in code.splitlines() if line[0] not in "!%")
    (picture,) = [
        n.value for n in ast.walk(ast.parse(plain)) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    ]
    assert (ROOT / "results" / Path(picture).relative_to("scratch")).with_suffix(".json").is_file()
    assert "t_band" in (ROOT / "notebooks" / "06-effect-of-t.ipynb").read_text(encoding="utf-8")


def test_readme_has_the_place_for_them():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count(badges.BEGIN) == text.count(badges.END) == 1
