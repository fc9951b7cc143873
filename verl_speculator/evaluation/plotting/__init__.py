"""The pictures of an evaluation, from its `results.csv` and `categories.csv` alone."""

from __future__ import annotations

from pathlib import Path

from verl_speculator.errors import UserError
from verl_speculator.evaluation.plotting.figures import every_figure
from verl_speculator.evaluation.plotting.sheets import STYLE
from verl_speculator.evaluation.plotting.tables import read_tables
from verl_speculator.files import atomic_file

__all__ = ["plot"]

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
    import matplotlib

    directory = Path(directory)
    results, categories = read_tables(directory)
    folder = directory / PLOTS
    written = []
    with matplotlib.rc_context(STYLE):
        for name, figure in every_figure(results, categories):
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
