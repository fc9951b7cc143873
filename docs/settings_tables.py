"""Write the texts that are generated from verl_speculator/config/schema.py into the files that hold them.

`make docs-tables` runs this; tests/unit/config/test_schema.py fails where a file differs from what is generated.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from verl_speculator.config import hydra
from verl_speculator.config.families import FAMILIES
from verl_speculator.config.schema import (
    PREFIX,
    as_written,
    describe_setting,
    known_settings,
    setting_families,
    summarise_setting,
)

CONFIGURATION = Path(__file__).with_name("configuration.md")
YAML = Path(hydra.__file__).with_name(f"{hydra.CONFIG_NAME}.yaml")
# Sections of the docs that say more than the help of a setting.
LINKS = {
    "loss": "training.md#the-objective",
    "depth_weights": "training.md#the-objective",
    "train": "training.md#the-actor-of-ppo-and-grpo",
}


def yaml_section() -> str:
    """`model.speculator` in the YAML: each setting with its default, below a comment."""
    entries = []
    for name, default in known_settings().items():
        comment = textwrap.fill(summarise_setting(name), 120, initial_indent="    # ", subsequent_indent="    # ")
        entries.append(f"{comment}\n    {name}: {as_written(default)}\n")
    return "  speculator:\n\n" + "\n".join(entries)


def markdown_table() -> str:
    """The table of docs/configuration.md."""
    rows = ["| key | value | default | read by | meaning |", "|---|---|---|---|---|"]
    for name, default in known_settings().items():
        values, text = describe_setting(name)
        families = setting_families(name)
        readers = "all" if len(families) == len(FAMILIES) else ", ".join(f"`{family}`" for family in families)
        link = f" ([{LINKS[name].split('#')[0]}]({LINKS[name]}))" if name in LINKS else ""
        rows.append(f"| `{PREFIX}{name}` | {values} | `{as_written(default)}` | {readers} | {text}{link} |")
    return "\n".join(rows) + "\n"


def generated_files() -> dict[Path, str]:
    """The full text of each file with a generated section."""
    sections = {
        YAML: (r"^  speculator:\n.*?(?=^\n\w)", yaml_section()),
        CONFIGURATION: (r"(?<=^## The speculator\n\n)(\|[^\n]*\n)+", markdown_table()),
    }
    return {
        file: re.sub(pattern, lambda _, section=section: section, file.read_text(), count=1, flags=re.M | re.S)
        for file, (pattern, section) in sections.items()
    }


if __name__ == "__main__":
    for path, content in generated_files().items():
        path.write_text(content)
