"""What `verl-speculator convert` is told, checked before anything is read. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from verl_speculator.checkpoint import (
    BASE_DIRECTORY,
    CONFIG_FILE,
    STATE_DIRECTORY,
    TRACKER_FILE,
    WEIGHTS_FILE,
    read_checkpoint_info,
)
from verl_speculator.convert.keymaps import AUTO, FORMATS
from verl_speculator.decoding.load import DTYPES
from verl_speculator.errors import UserError, nearest
from verl_speculator.families import HIDDEN_STATES
from verl_speculator.files import check_writable

# What a head may predict first: the token after the newest one, or the one after that.
NEXT_TOKEN, TOKEN_AFTER_NEXT = 1, 2
# A checkpoint's own files are replaced if asked; a training run's are not.
OF_A_RUN = (STATE_DIRECTORY, BASE_DIRECTORY, TRACKER_FILE)


@dataclass(frozen=True)
class ConvertSettings:
    """What is read, what is known of it, and where it goes.

    Attributes:
        source: a file of tensors, or a directory with one.
        out: directory of the checkpoint.
        format: of FORMATS.
        base: directory or hub name of the base; None where nothing is needed of it.
        n_predict: heads in the file, in place of what its configuration says.
        first_offset: the file's first head predicts the token so many positions on.
        hidden_state: the base's state that the heads read, in place of what the configuration says.
        dtype: of the tensors written; None for that of the file.
        overwrite: replace a checkpoint that is there.
    """

    source: Path
    out: Path
    format: str = AUTO
    base: str | None = None
    n_predict: int | None = None
    first_offset: int = TOKEN_AFTER_NEXT
    hidden_state: str | None = None
    dtype: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name, known in (("format", FORMATS), ("hidden_state", HIDDEN_STATES), ("dtype", tuple(DTYPES))):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise UserError(f"{name}={value}: expected one of {', '.join(known)}{nearest(value, known)}")
        if self.first_offset not in (NEXT_TOKEN, TOKEN_AFTER_NEXT):
            raise UserError(
                f"first_offset={self.first_offset}: expected {TOKEN_AFTER_NEXT} (the first head predicts the token "
                f"after the next), or {NEXT_TOKEN} (the next)"
            )
        if self.n_predict is not None and self.n_predict < 1:
            raise UserError(f"n_predict={self.n_predict}: expected a number ≥ 1")

    def check_output(self, source: Path) -> None:
        """Refuse an output directory that cannot be written to or holds what would be lost, without making it.

        Args:
            source: the file that is read.

        Raises:
            UserError: naming what is in the way.
        """
        setting = f"out={self.out}"
        check_writable(setting, self.out)
        if self.out.is_dir() and self.out.samefile(source.parent):
            raise UserError(f"{setting}: {source.name} is read there; expected another directory")
        for name in OF_A_RUN:
            if (self.out / name).exists():
                raise UserError(f"{setting}: holds {name} of a training run; expected another directory")
        held = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if (self.out / name).exists()]
        if held and not self.overwrite:
            raise UserError(f"{setting}: holds {held[0]} already; expected another directory, or --overwrite")
        if CONFIG_FILE in held:
            try:
                read_checkpoint_info(self.out)
            except UserError:
                # A base has a file of that name too, and the other formats have.
                raise UserError(
                    f"{setting}: holds a {CONFIG_FILE} that is no speculator's of ours; expected another directory"
                ) from None
