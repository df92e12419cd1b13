"""Executing a report notebook with papermill, so that the same inputs give the same bytes."""

import ast
import os
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

from jupyter_client.manager import AsyncKernelManager

from mvrepro.determinism import environment
from mvrepro.errors import UserError
from mvrepro.files import RESULTS, ROOT, write_atomic

NOTEBOOKS, SCRATCH = ROOT / "notebooks", ROOT / "scratch"
OUT = "MVREPRO_OUT"  # tells the kernel where the figures of what `execute` runs go
# They end what hangs; no machine that is only slow, or loaded, may fail by them.
START_TIMEOUT_S, CELL_TIMEOUT_S = 600, 1800


class SocketKernelManager(AsyncKernelManager):  # type: ignore[misc]
    """A kernel that talks over Unix sockets: no port to collide over when notebooks run side by side."""

    def __init__(self, **kwargs: Any) -> None:
        # A name of its own: the default lies in the working folder, where two kernels would share it.
        sockets = Path(tempfile.gettempdir()) / f"mvrepro-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        super().__init__(**{**kwargs, "transport": "ipc", "ip": str(sockets)})


def find(name: str) -> Path:
    """The source notebook that a name such as "04" or "04-margin-based.ipynb" means."""
    found = sorted(NOTEBOOKS.glob(f"{Path(name).stem}*.ipynb"))
    if len(found) != 1:
        known = ", ".join(path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb")))
        raise UserError(f"{name!r} names {len(found)} notebooks; notebooks/ holds: {known}")
    return found[0]


def execute(source: Path, profile: str, parameters: dict[str, Any] | None = None, out: Path | None = None) -> Path:
    """Run a source notebook on a profile; returns out/executed/<profile>/<name>.ipynb. out: None is results/.

    The result appears there when every cell has run, or not at all; what lies beside it for an earlier form of the
    page (out/figures/<profile>/<its number>) goes then. Raises UserError for a parameter that the notebook doesn't
    have and for a cell that fails, with the end of its traceback.
    """
    out = (out or RESULTS).absolute()
    os.environ.update(
        environment(threads=1)
        | {"TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default", OUT: str(out)}
    )
    # jsonschema, below papermill, would build the grammar of web addresses at its import, which takes more than 1 s.
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
    import nbformat
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    values = {"profile": profile, **(parameters or {})}
    known = papermill.inspect_notebook(str(source))
    unknown = sorted(values.keys() - known.keys())
    if unknown:
        raise UserError(f"{source.name} has no parameter {', '.join(unknown)}; it has: {', '.join(known) or 'none'}")
    figures = out / "figures" / profile / source.stem.partition("-")[0]
    before = _ages(figures)
    try:
        notebook = papermill.execute_notebook(
            str(source),
            None,  # written below, when every cell has run
            values,
            kernel_name="python3",
            cwd=str(ROOT),
            progress_bar=False,
            record_timing=False,
            start_timeout=START_TIMEOUT_S,
            execution_timeout=CELL_TIMEOUT_S,
            iopub_timeout=START_TIMEOUT_S,
            kernel_manager_class="mvrepro.pages.notebook.SocketKernelManager",
        )
    except PapermillExecutionError as error:
        tail = "\n".join(str(error).strip().splitlines()[-12:])
        raise UserError(f"{source.name}, cell [{error.exec_count}] failed:\n{tail}") from None
    except CellTimeoutError:
        raise UserError(f"a cell of {source.name} took longer than {CELL_TIMEOUT_S} s; nothing was written") from None
    except RuntimeError as error:  # nbclient's, or jupyter_client's own before the first cell
        if isinstance(error, DeadKernelError) or "Kernel died" in str(error):
            what = "died (killed, or out of memory)"
        elif "Kernel didn't respond" in str(error):
            what = f"did not start within {START_TIMEOUT_S} s"
        else:
            raise
        raise UserError(f"the kernel of {source.name} {what}; nothing was written: run it again") from None
    executed = out / "executed" / profile / source.name
    write_atomic(executed, nbformat.writes(without_noise(notebook)) + "\n")
    for path, _ in before & _ages(figures):  # figures that the page no longer has
        path.unlink()
    return executed


def _ages(folder: Path) -> set[tuple[Path, int]]:
    return {(path, path.stat().st_mtime_ns) for path in folder.glob("*.*")}


def without_noise(notebook: Any) -> Any:
    """The notebook, changed in place: without what differs between two equal runs (times, random ids, paths, and where
    a printed text was cut in two, which only the kernel's load decides)."""
    notebook.metadata.pop("papermill", None)
    notebook.metadata.get("language_info", {}).pop("version", None)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell["id"] = "injected-parameters"
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)
    return notebook


def _joined(outputs: list[Any]) -> list[Any]:
    """The outputs of a cell, with texts that were printed one after the other as one."""
    joined: list[Any] = []
    for output in outputs:
        if joined and output.output_type == "stream" and joined[-1].get("name") == output.name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def literals(code: str) -> set[str] | None:
    """The names that a cell gives literal values, as one of parameters does; None where it does anything else."""
    names = set()
    try:
        for node in ast.parse(code).body:
            match node:
                case ast.Assign([ast.Name(name)], value) | ast.AnnAssign(ast.Name(name), _, ast.expr() as value):
                    ast.literal_eval(value)
                    names.add(name)
                case _:
                    return None
    except (SyntaxError, ValueError, TypeError):
        return None
    return names
