"""What a run says while it trains: OUT/log.jsonl, a line a log step, and TensorBoard on request. Rank 0 alone."""

import json
from pathlib import Path
from typing import Any

from mvrepro.errors import UserError, explain_os_error
from mvrepro.files import write_atomic


class Logs:
    """folder: OUT; first: the step that a run goes on from, behind which earlier lines are dropped: they come again.

    Raises UserError where --tensorboard is asked for and not installed, or the folder can't be written.
    """

    def __init__(self, folder: Path, first: int, tensorboard: bool) -> None:
        self.path = folder / "log.jsonl"
        write_atomic(self.path, "".join(f"{json.dumps(line)}\n" for line in self._lines() if line["step"] <= first))
        self.board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError('--tensorboard needs an extra: pip install "mvrepro[scale]"') from None
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first + 1)

    def _lines(self) -> list[dict[str, Any]]:
        """All whole lines: the last one of a killed run may be cut off."""
        lines = []
        for text in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
            try:
                lines.append(json.loads(text))
            except ValueError:
                break
        return lines

    def last(self) -> dict[str, Any]:
        """The last line about training; empty where there is none."""
        return next((line for line in reversed(self._lines()) if "loss" in line), {})

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line: "step", and the values by name."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise explain_os_error(error, f"write {self.path}") from None
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        if self.board:
            self.board.close()
