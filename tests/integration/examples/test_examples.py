"""The examples, as they are used."""

from __future__ import annotations

import subprocess

from helpers.training_runs import ROOT
from verl_speculator.config.hydra import load_run_config, load_settings
from verl_speculator.sweep.settings import read_settings

RECIPES = sorted((ROOT / "verl_speculator" / "config" / "recipes").glob("*.txt"))


def test_recipes_are_overrides_without_blanks():
    """So that `$(grep -v '^#' FILE)` puts them on a command line as they are."""
    assert RECIPES
    for file in RECIPES:
        lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
        assert lines and not any(" " in line or not line for line in lines)
        speculator = load_run_config([*lines, "trainer.default_local_dir=x", "trainer.device=cpu"]).speculator
        objective = speculator.training.objective
        assert objective.needs_teacher and objective.depths(speculator.config.n_predict)


def test_sweeps_are_read_and_their_settings_exist():
    for file in sorted((ROOT / "examples" / "sweeps").glob("*.yaml")):
        asked = read_settings(file)
        for point in asked.points:
            overrides = [f"{name}={value}" for name, value in (asked.settings | point).items()]
            load_settings([*overrides, "trainer.default_local_dir=x", "trainer.device=cpu"])


def test_scripts_are_bash():
    for file in sorted((ROOT / "examples").rglob("*.sh")):
        subprocess.run(["bash", "-n", file], check=True)
