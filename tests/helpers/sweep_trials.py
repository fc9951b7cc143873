"""Work on a trial that a Ray worker can import."""

from __future__ import annotations

import os

from verl_speculator.sweep.trial import Trial, write_record


def finish_without_training(trial: Trial) -> None:
    """Stands in for training and evaluating a trial; the one with four drafts ends its whole process."""
    if trial.values["model.speculator.n_predict"] == "4":
        os._exit(1)
    write_record(trial.directory / "training.json", {"status": "done", "final_loss": 1.0, "pid": os.getpid()})
    write_record(
        trial.directory / "evaluation.json", {"status": "done", "figures": {"tau": 2.0}, "measured": trial.measured}
    )
