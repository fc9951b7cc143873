"""The compiler that Triton expects of a backend; the interpreter never calls it."""

from triton.backends.compiler import BaseBackend


class CPUBackend(BaseBackend):
    @staticmethod
    def supports_target(target):
        return target.backend == "cpu"

    def hash(self):
        return "interpreter"

    def _never(self, *arguments, **settings):
        raise RuntimeError("this backend compiles nothing: set TRITON_INTERPRET=1")

    parse_options = add_stages = _never

    def load_dialects(self, context):
        pass

    def get_module_map(self):
        return {}
