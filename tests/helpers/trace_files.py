"""Which files of the package one SFT step and its checkpoint pass through, and which read one setting.

    python tests/helpers/trace_files.py                     # files of a step, from the command line to the checkpoint
    python tests/helpers/trace_files.py loss                # files whose code reads model.speculator.loss

A file counts when one of its functions is called; a module that is only imported does not, whatever its import calls.
The run is a real one: a tiny base model, one process, 8 rows, in this process.
"""

from __future__ import annotations

import ast
import inspect
import os
import sys
import tempfile
import threading
from pathlib import Path

VERLS_KEY = ("engine.py", "loss")  # of what a micro-batch reports, in training/engine.py
PACKAGE = Path(__file__).resolve().parents[2] / "verl_speculator"
sys.path[:0] = [str(PACKAGE.parent), str(PACKAGE.parent / "tests")]


def files_called(function, *arguments) -> list[str]:
    """Files of the package of which a function is called while `function` runs, in the order of their first call."""
    seen: dict[str, None] = {}
    prefix = f"{PACKAGE}{os.sep}"

    def note(frame, event, argument):
        path, is_function = frame.f_code.co_filename, frame.f_code.co_flags & inspect.CO_OPTIMIZED
        if event == "call" and is_function and path.startswith(prefix):
            seen.setdefault(path.removeprefix(prefix))

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        function(*arguments)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return list(seen)


def one_step(folder: Path) -> dict[str, list[str]]:
    """Files of the command line's checks, of the start of a worker, and of its only step with the checkpoint. The last
    two are without those of the command line."""
    os.environ["VERL_PLATFORM"] = "cpu"
    import verl_speculator.training.plugin  # before anything is recorded, since importing does not count
    from helpers.tiny_models import make_base, make_chat_rows, make_tokenizer, write_parquet
    from helpers.training_runs import overrides, train_here
    from verl_speculator.preflight import launch
    from verl_speculator.training.trainer import SpeculatorTrainer

    assert verl_speculator.training.plugin
    base = make_base("qwen2_tied", folder / "base", make_tokenizer())
    chat = write_parquet(folder / "chat.parquet", make_chat_rows(8))
    settings = overrides(base, chat, data__train_batch_size=8, trainer__total_training_steps=1)
    started: list[list[str]] = []
    launch.os = type("os", (), vars(os) | {"execve": lambda *command: started.append(command[1])})
    command_line = files_called(launch.launch, ["1", str(folder / "run"), *settings])
    (command,) = started
    options, step = command[command.index("verl_speculator.train") + 1 :], []
    fit = SpeculatorTrainer.fit
    SpeculatorTrainer.fit = lambda trainer: step.extend(files_called(fit, trainer))
    start = files_called(train_here, options, folder / "log.jsonl")
    assert list((folder / "run").glob("global_step_1/**/pytorch_model.bin")), "no checkpoint was written"
    return {
        "the command line": command_line,
        "the start of training": [file for file in start if file not in command_line],
        "one step and its checkpoint": [file for file in step if file not in command_line],
    }


def readers_of(setting: str) -> list[str]:
    """Files whose code, and not only its text, reads a setting of model.speculator."""
    return sorted(
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if (path.name, setting) != VERLS_KEY
        and any(names_setting(node, setting) for node in ast.walk(ast.parse(path.read_text())))
    )


def names_setting(node: ast.AST, setting: str) -> bool:
    """Whether it is the setting as a key, a field, a parameter or an argument. A field that is a tensor is a result."""
    match node:
        case ast.Constant(value=str(value)):
            return value == setting
        case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation):
            return name == setting and ast.unparse(annotation) != "Tensor"
        case ast.keyword(arg=name):
            return name == setting
        case ast.arg(arg=name, annotation=annotation):
            return name == setting and annotation is not None and ast.unparse(annotation) != "Tensor"
    return False


if __name__ == "__main__":
    if len(sys.argv) > 1:
        groups = {f"model.speculator.{sys.argv[1]}": readers_of(sys.argv[1])}
    else:
        with tempfile.TemporaryDirectory() as directory:
            groups = one_step(Path(directory))
    for title, files in groups.items():
        sys.stdout.write("\n  ".join([f"{title}: {len(files)} files", *files]) + "\n")
