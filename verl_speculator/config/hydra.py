"""From a command line to one resolved configuration. Imports Hydra, and torch only to detect the device."""

from __future__ import annotations

import difflib
import importlib.util
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from verl_speculator.config.schema import (
    DIM_KEYS,
    PREFIX,
    SpeculatorSettings,
    as_written,
    check_setting_names,
    known_settings,
    summarise_setting,
)
from verl_speculator.utils.process import cpu_computes_bf16
from verl_speculator.utils.settings import UserError, nearest

CONFIG_NAME = "speculator_sft"
DEVICES = ("cuda", "npu", "cpu")
_OVERRIDE = re.compile(r"^(?P<sign>[+~]{0,2})(?P<key>[^=@:]+)=(?P<value>.*)$", re.DOTALL)


@dataclass(frozen=True)
class RunConfig:
    """The settings of a training run."""

    tree: DictConfig  # verl's configuration, resolved; `model.speculator` holds the values of `speculator`
    speculator: SpeculatorSettings  # the `model.speculator.*` settings, parsed


def common_overrides() -> str:
    """The overrides that most runs need and those of the speculator, for a usage text."""
    wrapper = textwrap.TextWrapper(120, initial_indent="  ", subsequent_indent=" " * 26)
    settings = "\n".join(
        wrapper.fill(f"{name + '=' + as_written(default):<23} {summarise_setting(name)}")
        for name, default in known_settings().items()
    )
    return f"""Common overrides (all of verl's, and those of docs/configuration.md):
  model.partial_pretrain=Qwen/Qwen2.5-0.5B-Instruct   base model, a directory or a hub name
  data.train_files=train.parquet data.val_files=test.parquet
  optim.lr=1e-4 trainer.total_epochs=1 data.train_batch_size=256 data.micro_batch_size_per_gpu=4

Settings of the speculator with their defaults, written as {PREFIX}<name>=<value>:
{settings}
"""


def quote_dims(override: str) -> str:
    """Quote a width, because Hydra would read `inner_dim=1024.2560` as the number 1024.256."""
    match = _OVERRIDE.match(override)
    if not match or match["key"] not in {PREFIX + name for name in DIM_KEYS}:
        return override
    value = re.sub(r"""^(["'])(.*)\1$""", r"\2", match["value"].strip())
    if not re.fullmatch(r"[+-]?\d+|null", value):
        value = "'" + value.replace("'", "") + "'"
    return f"{match['sign']}{match['key']}={value}"


def _verl_config_directory() -> Path:
    spec = importlib.util.find_spec("verl")  # finds the package without importing it
    if spec is None or not spec.submodule_search_locations:
        raise UserError("verl is not installed: pip install verl==0.9.1")
    return Path(spec.submodule_search_locations[0]) / "trainer" / "config"


def walk_settings(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted name and the value of each key of a tree, sections included."""
    for key, value in tree.items():
        yield prefix + key, value
        if isinstance(value, dict):
            yield from walk_settings(value, f"{prefix}{key}.")


def _compose(directory: Path, name: str, overrides: Sequence[str]) -> DictConfig:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException

    for override in overrides:
        _check_syntax(override)
    search = f"hydra.searchpath=['file://{_verl_config_directory()}']"
    with initialize_config_dir(str(directory), version_base=None):
        try:
            return hydra_compose(name, overrides=[search, *overrides])
        except (HydraException, OmegaConfBaseException) as error:
            text = str(error).split("\n")[0].strip()
            if unknown := re.search(r"Could not (?:override|delete|append)[^']*'([^'@]+)", text):
                known = dict(walk_settings(OmegaConf.to_container(hydra_compose(name, overrides=[search]))))
                text = f"{unknown[1]} is not a setting{_nearest_setting(unknown[1], known)}"
            raise UserError(text) from None


def _check_syntax(override: str) -> None:
    """Refuse an override that Hydra's grammar cannot read, in words."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    match = _OVERRIDE.match(override)
    if match is None and not override.startswith("~"):
        raise UserError(f"{override!r} is not an override: expected key=value")
    try:
        sweeps = OverridesParser.create().parse_override(override).is_sweep_override()
    except HydraException:
        sweeps = None
    if sweeps is False:
        return
    key, value = (match["key"], match["value"]) if match else (override, "")
    problem = "several values" if sweeps else "its value cannot be read"
    quoted = value.replace("'", "").replace('"', "")
    raise UserError(
        f"{key}={value}: {problem}; expected a list as [a,b], a mapping as {{a:1,b:2}}, and a text that holds one of "
        f"=,[]{{}}() or a quote in quotes of its own: \"{key}='{quoted}'\""
    )


def _nearest_setting(key: str, known: Mapping[str, Any]) -> str:
    """A hint at the setting that was meant, as `nearest`: one of the same name in any section, else a similar one."""
    parent, _, last = key.rpartition(".")
    if known.get(parent, "") in ({}, None):  # a section for keys of others
        return f" of verl's own; expected +{key}=…, with the plus"
    if named := [name for name in known if name.rpartition(".")[2] == last]:
        # Of a name without a section the outermost setting, else the most similar one.
        similar = {name: difflib.SequenceMatcher(None, key, name).ratio() if parent else 0.0 for name in named}
        return f" (did you mean {min(named, key=lambda name: (-similar[name], name.count('.')))!r}?)"
    if hint := nearest(key, known):
        return hint
    by_last = {name.rpartition(".")[2]: name for name in reversed(known)}
    close = difflib.get_close_matches(last, by_last, n=1, cutoff=0.75)
    return f" (did you mean {by_last[close[0]]!r}?)" if close else "; docs/configuration.md lists them"


RECIPES = Path(__file__).resolve().parent / "recipes"


def recipe_names() -> list[str]:
    """The recipes of the package."""
    return sorted(path.stem for path in RECIPES.glob("*.txt"))


def read_recipe(name: str) -> list[str]:
    """The overrides of a recipe, a file of `recipes/`.

    Raises:
        UserError: for a name that no recipe has.
    """
    known = recipe_names()
    if name not in known:
        raise UserError(f"--recipe {name}: expected one of {', '.join(known)}{nearest(name, known)}")
    lines = (RECIPES / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def compose(overrides: Sequence[str]) -> DictConfig:
    """The unresolved configuration tree with overrides in Hydra's syntax.

    Raises:
        UserError: for an override that Hydra refuses, with the nearest key.
    """
    matches = filter(None, map(_OVERRIDE.match, overrides))
    check_setting_names(match["key"].removeprefix(PREFIX) for match in matches if match["key"].startswith(PREFIX))
    return _compose(Path(__file__).resolve().parent, CONFIG_NAME, list(map(quote_dims, overrides)))


def compose_ppo(overrides: Sequence[str]) -> DictConfig:
    """verl's PPO configuration with overrides; nothing is resolved yet.

    Raises:
        UserError: as `compose`.
    """
    return _compose(_verl_config_directory(), "ppo_trainer", overrides)


def flash_attention_installed() -> bool:
    """Whether the `flash_attn` package can be imported."""
    return importlib.util.find_spec("flash_attn") is not None


def _as_files(value: Any) -> list[str]:
    """A setting of files, which is one path, a list of them or null, as a list of paths."""
    values = value if isinstance(value, (list, tuple, ListConfig)) else [value]
    return [expanduser(str(path)) for path in values if path is not None]


def resolve(config: DictConfig) -> RunConfig:
    """Parse the speculator's settings and fill in, in place, what depends on the machine or on other settings.

    Raises:
        UserError: for a setting that cannot be used.
    """
    if not isinstance(config.model.speculator, DictConfig):
        raise UserError(f"model.speculator={config.model.speculator}: expected settings, model.speculator.<name>=…")
    try:
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0]) from None
    with open_dict(config):
        speculator = SpeculatorSettings.parse(OmegaConf.to_container(config.model.speculator))
        if speculator.training.train is False:
            raise UserError(f"{PREFIX}train=false: SFT always trains the speculator; expected true or null")
        config.model.speculator = speculator.to_dict()
        _resolve_base(config.model)
        _resolve_device_and_types(config)
        # 0 turns the warm-up off and null leaves it to the ratio; verl reads 0 as the latter and fails on null.
        steps = config.optim.lr_warmup_steps
        is_off = type(steps) is int and steps == 0
        if is_off:
            config.optim.lr_warmup_steps_ratio = 0.0
        if is_off or steps is None:
            config.optim.lr_warmup_steps = -1
        _resolve_attention(config)
        for name in ("project_name", "experiment_name"):  # Hydra reads experiment_name=3 as a number
            if type(config.trainer[name]) in (int, float):
                config.trainer[name] = str(config.trainer[name])
        for name in ("train_files", "val_files"):
            config.data[name] = _as_files(config.data[name])
    return RunConfig(config, speculator)


def _resolve_base(model: DictConfig) -> None:
    """`model.partial_pretrain` and `model.path` name the same thing."""
    if model.partial_pretrain not in (model.path, "Qwen/Qwen2.5-0.5B-Instruct"):
        names = f"model.path={model.path} and model.partial_pretrain={model.partial_pretrain}"
        raise UserError(f"{names} name the same thing: set one")
    if not isinstance(model.path, str) or not model.path:
        raise UserError(f"model.partial_pretrain={model.path}: expected a directory or a hub name")
    path = expanduser(model.path)
    model.path = model.partial_pretrain = path.rstrip("/") or path


def _resolve_device_and_types(config: DictConfig) -> None:
    device = config.trainer.device
    if device == "auto":
        import torch

        available = (name for name in DEVICES[:-1] if hasattr(torch, name) and getattr(torch, name).is_available())
        config.trainer.device = next(available, "cpu")
    elif device not in DEVICES:
        raise UserError(f"trainer.device={device}: expected auto, {', '.join(DEVICES)}")
    if compute_dtype(config) == "auto":
        on_cpu, frozen = config.trainer.device == "cpu", config.model.freeze_base_model
        is_fp32 = on_cpu and not (frozen and cpu_computes_bf16())
        config.engine.mixed_precision.param_dtype = "fp32" if is_fp32 else "bf16"
    if config.engine.model_dtype == "auto":
        config.engine.model_dtype = compute_dtype(config) if config.model.freeze_base_model else "fp32"


def compute_dtype(config: DictConfig) -> str:
    """The type in which the base model computes, `engine.mixed_precision.param_dtype`."""
    precision = config.engine.mixed_precision
    return "bf16" if precision is None else precision.get("param_dtype", "bf16")


def _resolve_attention(config: DictConfig) -> None:
    """flash-attn if it is installed and the device supports it, else sdpa, unless the user names one."""
    if config.model.override_config is None:
        config.model.override_config = {}
    if "attn_implementation" in config.model.override_config:
        return
    usable = False
    if config.trainer.device == "cuda" and compute_dtype(config) not in ("fp32", "float32"):
        import torch

        # flash-attn 2 needs compute capability 8.0.
        is_ampere = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8
        usable = flash_attention_installed() and is_ampere
    config.model.override_config["attn_implementation"] = "flash_attention_2" if usable else "sdpa"


def load_run_config(overrides: Sequence[str]) -> RunConfig:
    """`compose`, then `resolve`."""
    return resolve(compose(overrides))


def load_settings(overrides: Sequence[str]) -> DictConfig:
    """The tree of `load_run_config`, for code that takes verl's configuration."""
    return load_run_config(overrides).tree
