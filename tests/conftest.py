"""Tiny bases, tokenizers and data, all made here; nothing is downloaded."""

from __future__ import annotations

import os

# Before anything asks verl for a device: these tests run on the CPU, on machines with an accelerator too.
os.environ["VERL_PLATFORM"] = "cpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models gain nothing from more threads, and lose much on a machine that has other things to do.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest

from helpers.engine_harness import load_rows, process_group
from helpers.tiny_models import (
    ARCHITECTURES,
    GGUF_FILE,
    OTHERS,
    SCALED,
    make_base,
    make_chat_rows,
    make_gguf,
    make_tokenizer,
    write_parquet,
)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and small real models, where the directory exists next to the project."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED.name}/ with real data and models does not exist next to the project")
    return SHARED


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level tokenizer with ChatML's markers and template."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def bases(tmp_path_factory, tokenizer) -> dict[str, Path]:
    """One tiny base per architecture, saved as Hugging Face folders."""
    root = tmp_path_factory.mktemp("bases")
    return {name: make_base(name, root / name, tokenizer) for name in ARCHITECTURES}


@pytest.fixture(scope="session")
def other_bases(tmp_path_factory, tokenizer) -> dict[str, Path]:
    """One tiny base for each of OTHERS."""
    root = tmp_path_factory.mktemp("other_bases")
    return {name: make_base(name, root / name, tokenizer) for name in OTHERS}


@pytest.fixture(scope="session")
def scaled(tmp_path_factory, tokenizer) -> dict[str, Path]:
    """One tiny base per architecture that scales or caps its logits."""
    root = tmp_path_factory.mktemp("scaled")
    return {name: make_base(name, root / name, tokenizer) for name in SCALED}


@pytest.fixture(scope="session")
def base(bases) -> Path:
    """The base of most tests: Qwen2 with a tied head."""
    return bases["qwen2_tied"]


@pytest.fixture(scope="session")
def gguf_bases(bases, tmp_path_factory) -> dict[str, Path]:
    """Folders with a GGUF file and nothing else, of a tied and an untied base. For tests that have the library."""
    root = tmp_path_factory.mktemp("gguf")
    for name in ("qwen2_tied", "qwen2_untied"):
        (root / name).mkdir()
        make_gguf(bases[name], root / name / GGUF_FILE)
    return {folder.name: folder for folder in root.iterdir()}


@pytest.fixture(scope="module")
def gloo(tmp_path_factory):
    """A process group of this one process."""
    with process_group(tmp_path_factory.mktemp("group")):
        yield


@pytest.fixture(scope="session")
def rows(chat, tokenizer):
    """The first 16 conversations of `chat`, tokenized; six of them have two turns."""
    return load_rows(chat, tokenizer)[:16]


@pytest.fixture(scope="session")
def chat(tmp_path_factory) -> Path:
    """40 conversations, every third of them with two turns."""
    return write_parquet(tmp_path_factory.mktemp("data") / "chat.parquet", make_chat_rows(40))
