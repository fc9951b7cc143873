"""Messages of libraries about what is not installed or not here, which nobody who trains a speculator can act on.

Exactly these are left out, by logger or category and by their words; everything else that the same libraries say is
printed. Imports no library.
"""

from __future__ import annotations

import logging
import warnings

# By logger, the beginning of the messages.
MESSAGES = {
    # The platform is the one that the launcher asked for.
    "verl.plugin.platform.platform_manager": "Platform override from VERL_PLATFORM",
    # A kernel of 4-bit base models on a CPU, for which bitsandbytes has another way.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # A note to those who write against torch, about a function that torch itself calls.
    "torch.fx._symbolic_trace": "is_fx_tracing will return true",
}
# verl tries to import each of its engines; ours needs the one of FSDP, which is not optional.
ENGINES = r"(torchtitan|veomni|automodel|mindspeed|megatron) engine is not available"


def silence_import_warnings() -> None:
    """Leave them out in this process. To be called before verl is imported; calling it again changes nothing."""
    for name, beginning in MESSAGES.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Without) for known in logger.filters):
            logger.addFilter(_Without(beginning))
    warnings.filterwarnings("ignore", message=ENGINES, category=UserWarning, module=r"verl\.workers\.engine")


class _Without(logging.Filter):
    """Passes every record but those of one message."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self.beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is to be printed."""
        return not record.getMessage().startswith(self.beginning)
