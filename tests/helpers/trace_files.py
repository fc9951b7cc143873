"""Which files of the package one SFT step and its checkpoint pass through, and which read one setting.

    python tests/helpers/trace_files.py                     # files of a step, from the command line to the checkpoint
    python tests/helpers/trace_files.py loss                # files whose code names model.speculator.loss

A file counts when one of its functions is called; modules that are only imported do not. The run is a real one: a tiny
base model, one process, two rows, in this process.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import threading
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "verl_speculator"
sys.path[:0] = [str(PACKAGE.parent), str(PACKAGE.parent / "tests")]


def files_called(function, *arguments) -> list[str]:
    """Files of the package of which a function is called while `function` runs, in the order of their first call."""
    seen: dict[str, None] = {}
    prefix = f"{PACKAGE}{os.sep}"

    def note(frame, event, argument):
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(prefix) and frame.f_code.co_name != "<module>":
            seen.setdefault(path.removeprefix(prefix))

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        function(*arguments)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return list(seen)


def one_step(folder: Path) -> list[str]:
    """The launcher's checks, then what one worker does: build, one step, one checkpoint."""
    import verl_speculator.preflight.launch as launch
    from helpers.tiny_models import make_base, make_chat_rows, make_tokenizer, write_parquet
    from helpers.training_runs import overrides
    from verl_speculator.train import train

    base = make_base("qwen2_tied", folder / "base", make_tokenizer())
    chat = write_parquet(folder / "chat.parquet", make_chat_rows(8))
    settings = overrides(base, chat, data__train_batch_size=8, trainer__total_training_steps=1)
    started: list[list[str]] = []
    launch.os = type("os", (), vars(os) | {"execve": lambda *command: started.append(command[1])})
    called = files_called(launch.launch, ["1", str(folder / "run"), *settings])
    (command,) = started
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ["VERL_FILE_LOGGER_PATH"] = str(folder / "log.jsonl")
    called += files_called(train, command[command.index("verl_speculator.train") + 1 :])
    assert list((folder / "run").glob("global_step_1/**/pytorch_model.bin")), "no checkpoint was written"
    return list(dict.fromkeys(called))


def readers_of(setting: str) -> list[str]:
    """Files whose code, and not only whose text, names a setting of model.speculator."""
    word = re.compile(rf"(?<!\w)(\.{setting}\b|[\"']{setting}[\"']|^ +{setting}: |\b{setting}=)", re.MULTILINE)
    return sorted(str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*.py") if word.search(p.read_text()))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        files = readers_of(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as directory:
            files = one_step(Path(directory))
    sys.stdout.write("\n".join([*files, f"{len(files)} files", ""]))
