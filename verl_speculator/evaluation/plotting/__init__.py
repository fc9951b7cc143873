"""The pictures of an evaluation, from its `results.csv` and `categories.csv` alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from verl_speculator.errors import UserError
from verl_speculator.evaluation.plotting.figures import every_figure
from verl_speculator.evaluation.plotting.sheets import STYLE
from verl_speculator.evaluation.plotting.tables import read_tables
from verl_speculator.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw", "plot"]

PLOTS = "plots"


def plot(directory: Path) -> list[Path]:
    """Draw every plot for which the tables have data. Error bars are the tables' own intervals.

    Args:
        directory: holds `results.csv` and perhaps `categories.csv`; nothing else in it is read.

    Returns:
        The files written, `plots/<name>.png` and `plots/<name>.pdf` for each plot.

    Raises:
        UserError: if a table is missing, empty or has other columns, or if the directory cannot be written.
    """
    directory = Path(directory)
    results, categories = read_tables(directory)
    return draw(directory / PLOTS, lambda: every_figure(results, categories))


def draw(folder: Path, figures: Callable[[], Iterable[tuple[str, Figure]]]) -> list[Path]:
    """Write figures by name, as PNG and PDF; they are made in the house's style.

    Raises:
        UserError: if the folder cannot be written to.
    """
    import matplotlib

    written = []
    with matplotlib.rc_context(STYLE):
        for name, figure in figures():
            for suffix in ("png", "pdf"):
                path = folder / f"{name}.{suffix}"
                try:
                    folder.mkdir(exist_ok=True)
                    with atomic_file(path) as temporary:
                        # Without a date the same tables give the same bytes.
                        metadata = {"CreationDate": None} if suffix == "pdf" else {}
                        figure.savefig(temporary, format=suffix, dpi=200, metadata=metadata)
                except OSError as error:
                    raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
                written.append(path)
    return written
