"""The house: which room may import which, and that the front door stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "verl_speculator"

# Each room with the rooms that it may import. A room is a module, or a folder of them.
MAY_IMPORT = {
    "errors": set(),
    "files": {"errors"},
    "progress": set(),
    "selection": set(),
    "families": set(),
    "config": {"errors", "families", "objective"},
    "base_form": {"errors"},
    "bases": {"base_form", "errors"},
    "tokens": {"errors"},
    "alignment": set(),
    "provenance": set(),
    "models": {"config", "errors", "families"},
    "objective": {"errors"},
    "losses": {"models", "objective"},
    "tensors": {"errors"},
    "checkpoint": {"base_form", "bases", "config", "errors", "families", "files", "models", "provenance", "tensors"},
    "decoding": {"base_form", "bases", "config", "errors", "files", "models", "tokens"},
    "evaluation": {
        *(
            "alignment",
            "base_form",
            "bases",
            "checkpoint",
            "config",
            "decoding",
            "errors",
            "files",
            "models",
            "provenance",
            "progress",
            "selection",
            "tokens",
        ),
    },
    "diagnosis": {"errors", "files", "progress"},
    "checkup": {
        *("alignment", "bases", "checkpoint", "decoding", "diagnosis", "errors", "evaluation", "families", "models"),
        *("progress", "provenance", "selection", "tokens"),
    },
    "settings": {"config", "errors", "families"},
    "state_cache": {"base_form", "errors", "files", "provenance"},
    "run_record": {"base_form", "config", "provenance", "state_cache"},
    "preflight": {
        *("base_form", "checkpoint", "config", "errors", "files", "models", "objective", "provenance"),
        *("run_record", "selection", "settings", "state_cache", "tokens"),
    },
    "sweep": {
        *("bases", "checkpoint", "config", "decoding", "errors", "evaluation", "files", "preflight", "provenance"),
        "settings",
    },
    "allocator": set(),
    "launch": {"allocator", "config", "errors", "files", "preflight", "settings"},
    "leash": set(),
    "import_warnings": set(),
    "engine": {
        *("alignment", "base_form", "checkpoint", "config", "errors", "files", "import_warnings", "losses", "models"),
        *("provenance", "rollout", "run_record", "state_cache", "tokens"),
    },
    "train": {"engine", "errors", "leash", "settings"},
    "train_ppo": {"engine", "errors", "import_warnings", "rollout", "settings"},
    "train_ray": {"engine", "errors", "files", "launch", "preflight", "settings"},
    "data": {"base_form", "decoding", "errors", "evaluation", "files", "progress", "provenance", "selection", "tokens"},
    "rollout": {"bases", "checkpoint", "config", "errors", "families", "files", "models", "tensors"},
    "convert": {
        *(
            "bases",
            "checkpoint",
            "config",
            "decoding",
            "errors",
            "families",
            "files",
            "models",
            "provenance",
            "tensors",
        ),
    },
    "server": {"bases", "decoding", "errors", "models", "tokens"},
    "commands": {
        *("checkup", "diagnosis"),
        *("allocator", "base_form", "bases", "checkpoint", "convert", "data", "decoding", "errors", "evaluation"),
        *("families", "files", "models", "provenance", "rollout", "server", "sweep", "tokens"),
    },
    "__main__": {"commands", "errors", "import_warnings"},
    "__init__": {"checkpoint", "config", "models"},
}

# Modules of a lighter room that live in verl's own processes.
TALKS_TO_VERL = ("push.py", "verl_worker.py")


def imported(path: Path) -> set[str]:
    """Dotted names that a module imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_go_one_way():
    for path in PACKAGE.rglob("*.py"):
        room = room_of(path)
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "verl_speculator" and len(parts) > 1 and parts[1] != room:
                assert parts[1] in MAY_IMPORT[room], f"{room} imports {parts[1]}"
            if parts[0] == "verl":
                talks = room in ("engine", "train", "train_ppo", "train_ray") or path.name in TALKS_TO_VERL
                assert talks, f"{room} imports verl"


def test_importers_of_verl_are_those_that_the_texts_name():
    """Outside of engine/, whose docstring and docs/design.md name them all."""
    importers = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if room_of(path) != "engine" and any(name.split(".")[0] == "verl" for name in imported(path))
    }
    assert importers == {"train.py", "train_ppo.py", *(f"rollout/{name}" for name in TALKS_TO_VERL)}
    docstring = ast.get_docstring(ast.parse((PACKAGE / "engine" / "__init__.py").read_text()))
    design = (PACKAGE.parent / "docs" / "design.md").read_text()
    (entry,) = (line for line in design.split("\n  ") if "importers of verl" in line)
    for name in importers:
        assert name in docstring and name in entry, name


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nsys.stdout.write(' '.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_the_front_door_is_light():
    heavy = {"torch", "verl", "ray", "transformers"}
    assert not heavy & modules_after("import verl_speculator; verl_speculator.SpeculatorConfig")
    reading = "from verl_speculator.checkpoint import read_checkpoint_info; import verl_speculator.settings"
    assert not heavy & modules_after(reading)


def test_verl_finds_the_engine_and_the_platform_by_itself():
    """Through the entry point, in any process that imports verl."""
    code = (
        "import verl\n"
        "from verl.workers.engine import EngineRegistry\n"
        "from verl.plugin.platform import PlatformRegistry, get_platform\n"
        "engines = EngineRegistry._engines['language_model_with_speculator']\n"
        "assert {b: set(d) for b, d in engines.items()} == "
        "{b: {'cuda', 'npu', 'cpu'} for b in ('fsdp', 'fsdp2')}\n"
        "assert get_platform().device_name == 'cpu'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_public_names():
    import verl_speculator

    assert set(verl_speculator.__all__) == {
        "SpeculatorConfig",
        "build_speculator",
        "load_speculator",
        "save_speculator",
    }
    assert all(callable(getattr(verl_speculator, name)) for name in verl_speculator.__all__)
