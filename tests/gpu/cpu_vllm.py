"""What vLLM 0.28's build for CPUs gets wrong, mended where a test meets it. Imported in vLLM's own processes.

- A fallback of the rejection sampler (`expand_kernel`) copies what is not int64 and writes into the copy, so that every
  temperature but 0 is whatever lay in memory: speculation of any kind then gives noise, n-grams' too (0.32 as well).
- Linear layers are packed and their parameters dropped, so that no newer weights can be loaded.
"""

from __future__ import annotations

from torch import Tensor


def expand(
    output: Tensor,
    values: Tensor,
    cu_num_tokens: Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int | None = None,  # the kernel's own name
) -> None:
    """Each request's value to all of its tokens: [B] to [T]."""
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    output.copy_(values.masked_fill(values == replace_from, replace_to).repeat_interleave(counts))


def mend() -> None:
    """Before a runner is built."""
    from vllm import _custom_ops
    from vllm.utils import cpu_triton_utils

    cpu_triton_utils.expand_kernel = cpu_triton_utils._FuncWrapper(expand)
    _custom_ops._supports_onednn = False
