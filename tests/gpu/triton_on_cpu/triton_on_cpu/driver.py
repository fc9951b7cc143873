"""The driver that Triton expects of a backend: one device without streams."""

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class CPUDriver(DriverBase):
    @staticmethod
    def is_active():
        return True

    def get_current_target(self):
        return GPUTarget("cpu", 0, 0)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cpu

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_device_capability(self, device=None):
        return 0, 0

    def _never(self, *arguments):
        raise RuntimeError("this backend compiles nothing: set TRITON_INTERPRET=1")

    map_python_to_cpp_type = get_benchmarker = _never
