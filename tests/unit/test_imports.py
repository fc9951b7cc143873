"""Which folder imports which, and that importing the package stays light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "verl_speculator"

# What each folder (or module of the root) imports of the others, in the order in which they build on each other: an
# entry names earlier ones alone, so there is no cycle. The root re-exports names of three folders when they are used.
IMPORTS = {
    "utils": set(),
    "config": {"utils"},
    "base_model": {"utils"},
    "models": {"utils", "config", "base_model"},
    "losses": {"config", "models"},
    "checkpoint": {"utils", "config", "base_model", "models"},
    "decoding": {"utils", "config", "base_model", "models"},
    "data": {"utils", "config", "base_model", "checkpoint", "decoding"},
    "evaluation": {"utils", "base_model", "models", "losses", "checkpoint", "decoding", "data"},
    "training": {"utils", "config", "base_model", "models", "losses", "checkpoint", "data"},
    "interop": {"utils", "config", "base_model", "models", "checkpoint"},
    "vllm_plugin": {"utils", "models", "checkpoint", "interop"},
    "rl": {"utils", "config", "base_model", "checkpoint", "training", "interop", "vllm_plugin"},
    "server": {"utils", "base_model", "models", "decoding"},
    "preflight": {"utils", "config", "base_model", "models", "checkpoint", "data"},
    "diagnose": {"utils", "config", "base_model", "models", "checkpoint", "decoding", "evaluation"},
    "sweep": {"utils", "config", "base_model", "checkpoint", "decoding", "evaluation", "preflight"},
    "cli": {
        "utils",
        "config",
        "base_model",
        "models",
        "checkpoint",
        "decoding",
        "data",
        "evaluation",
        "interop",
        "rl",
        "server",
        "diagnose",
        "sweep",
    },
    "train": {"utils", "config", "training"},
    "train_ray": {"utils", "config", "training", "preflight", "train"},
    "train_ppo": {"utils", "config", "rl", "train"},
    "__main__": {"utils", "cli", "preflight"},
    "__init__": {"config", "models", "checkpoint"},
}

# Files outside of training/ and rl/ that import verl: the folders run inside it, everything else does without.
IMPORT_VERL = {"train.py", "train_ppo.py", "data/dataset.py", "vllm_plugin/worker.py"}


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


def folder_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_between_folders_are_exactly_those_of_the_table():
    """Equal, not a subset: an entry that nothing needs any more would let a cycle back in."""
    imports = {folder_of(path): set() for path in PACKAGE.rglob("*.py")}
    for path in PACKAGE.rglob("*.py"):
        folder = folder_of(path)
        for name in imported(path):
            package, _, rest = name.partition(".")
            imported_folder = rest.partition(".")[0]
            if package == "verl_speculator" and imported_folder not in ("", folder):
                imports[folder].add(imported_folder)
    assert imports == IMPORTS


def test_imports_go_one_way():
    order = list(IMPORTS)
    for folder, imported_folders in IMPORTS.items():
        if folder != "__init__":
            assert all(order.index(name) < order.index(folder) for name in imported_folders), folder


def test_importers_of_verl_are_those_that_the_texts_name():
    importers = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(name.partition(".")[0] == "verl" for name in imported(path))
    }
    assert {name for name in importers if name.partition("/")[0] not in ("training", "rl")} == IMPORT_VERL
    docstring = ast.get_docstring(ast.parse((PACKAGE / "training" / "__init__.py").read_text()))
    design = (PACKAGE.parent / "docs" / "design.md").read_text()
    (entry,) = (paragraph for paragraph in design.split("\n\n") if "importers of verl" in paragraph)
    for name in IMPORT_VERL:
        assert name in docstring and name in entry, name


def test_the_design_page_lists_every_file_by_its_folder():
    layout = (PACKAGE.parent / "docs" / "design.md").read_text().split("## Layout", 1)[1].split("```")[1]
    entries = re.split(r"^  (?=\S)", layout, flags=re.MULTILINE)[1:]
    listed = {entry.split()[0]: set(re.findall(r"\w+", entry)) for entry in entries}
    folders = {f"{path.name}/" for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    root = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}
    assert listed.keys() == folders | root
    for folder in folders:
        modules = {path.stem for path in (PACKAGE / folder).glob("*.py")} - {"__init__"}
        assert modules <= listed[folder], folder


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nsys.stdout.write(' '.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_the_package_loads_nothing_heavy():
    heavy = {"torch", "verl", "ray", "transformers"}
    assert not heavy & modules_after("import verl_speculator; verl_speculator.SpeculatorConfig")
    reading = "from verl_speculator.checkpoint.format import read_checkpoint_info; import verl_speculator.config.hydra"
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
