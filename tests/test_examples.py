"""The examples, as they are used."""

from __future__ import annotations

from runs import ROOT

from verl_speculator.config import split_settings
from verl_speculator.settings import load_settings

RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.txt"))


def test_recipes_are_overrides_without_blanks():
    """So that `$(grep -v '^#' FILE)` puts them on a command line as they are."""
    assert RECIPES
    for file in RECIPES:
        lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
        assert lines and not any(" " in line or not line for line in lines)
        config = load_settings([*lines, "trainer.default_local_dir=x", "trainer.device=cpu"])
        shape, training = split_settings(config.model.speculator)
        assert training.objective.needs_teacher and training.objective.depths(shape.n_predict)
