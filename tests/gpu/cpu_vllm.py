"""What vLLM's builds for CPUs get wrong, mended where a test meets it. Imported in vLLM's own processes.

- A fallback of V1's rejection sampler (`expand_kernel`) copies what is not int64 and writes into the copy, so that
  every temperature but 0 is whatever lay in memory: speculation of any kind is noise, n-grams' too (0.28 to 0.32).
- Linear layers are packed and their parameters dropped, so that no newer weights can be loaded (0.28).
- Triton's interpreter, in which V2 runs, refuses a mask that was made of a mask and a number, and has no `log1p`
  (Triton 3.9).
"""

from __future__ import annotations

import os

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

    _custom_ops._supports_onednn = False
    if os.environ.get("TRITON_INTERPRET") == "1":
        mend_interpreter()
    else:
        mend_sampler()


def mend_sampler() -> None:
    """The fallback writes into its argument."""
    from vllm.utils import cpu_triton_utils

    cpu_triton_utils.expand_kernel = cpu_triton_utils._FuncWrapper(expand)


def mend_interpreter() -> None:
    """Masks become boolean again, and log1p(x) is log(1 + x)."""
    import numpy as np
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def with_mask(method, place):
        def masked(self, *arguments):
            arguments = list(arguments)
            mask = arguments[place]
            if mask is not None and mask.data.dtype != np.bool_:
                arguments[place] = TensorHandle(mask.data.astype(np.bool_), mask.dtype)
            return method(self, *arguments)

        return masked

    InterpreterBuilder.create_masked_load = with_mask(InterpreterBuilder.create_masked_load, 1)
    InterpreterBuilder.create_masked_store = with_mask(InterpreterBuilder.create_masked_store, 2)
    libdevice.log1p = lambda x: tl.log(1.0 + x)
