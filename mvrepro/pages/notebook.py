"""Executing a report notebook with papermill, so that the same inputs give the same bytes."""

import copy
import os
import tempfile
import uuid
from pathlib import Path
from typing import Any

from jupyter_client.manager import AsyncKernelManager

from mvrepro.determinism import environment
from mvrepro.errors import UserError
from mvrepro.files import RESULTS, ROOT, TEMPORARY, write_atomic

NOTEBOOKS = ROOT / "notebooks"
CELL_TIMEOUT_S = 300


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


def execute(source: Path, profile: str, parameters: dict[str, Any] | None = None) -> Path:
    """Run a source notebook on a profile; returns results/executed/<profile>/<name>.ipynb.

    The result appears there when every cell has run, or not at all. Raises UserError for a parameter
    that the notebook doesn't have and for a cell that fails, with the end of its traceback.
    """
    os.environ.update(
        environment(threads=1) | {"TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default"}
    )
    import nbformat
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    values = {"profile": profile, **(parameters or {})}
    known = papermill.inspect_notebook(str(source))
    unknown = sorted(values.keys() - known.keys())
    if unknown:
        raise UserError(f"{source.name} has no parameter {', '.join(unknown)}; it has: {', '.join(known) or 'none'}")
    out = RESULTS / "executed" / profile / source.name
    with tempfile.TemporaryDirectory(prefix=TEMPORARY) as scratch:
        aside = Path(scratch) / source.name
        try:
            papermill.execute_notebook(
                str(source),
                str(aside),
                values,
                kernel_name="python3",
                cwd=str(ROOT),
                progress_bar=False,
                record_timing=False,
                execution_timeout=CELL_TIMEOUT_S,
                kernel_manager_class="mvrepro.pages.notebook.SocketKernelManager",
            )
        except PapermillExecutionError as error:
            tail = "\n".join(str(error).strip().splitlines()[-12:])
            raise UserError(f"{source.name}, cell [{error.exec_count}] failed:\n{tail}") from None
        except CellTimeoutError:
            raise UserError(
                f"a cell of {source.name} took longer than {CELL_TIMEOUT_S} s; nothing was written"
            ) from None
        except RuntimeError as error:
            # nbclient's, or jupyter_client's own where the kernel dies before its first cell
            if not isinstance(error, DeadKernelError) and "Kernel died" not in str(error):
                raise
            raise UserError(
                f"the kernel of {source.name} died (killed, or out of memory); nothing was written: run it again"
            ) from None
        notebook = nbformat.read(aside, as_version=4)
    write_atomic(out, nbformat.writes(without_noise(notebook)) + "\n")
    return out


def without_noise(notebook: Any) -> Any:
    """The notebook without what differs between two equal runs: times, random ids, paths."""
    clean = copy.deepcopy(notebook)
    clean.metadata.pop("papermill", None)
    clean.metadata.get("language_info", {}).pop("version", None)
    for cell in clean.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell["id"] = "injected-parameters"
    return clean
