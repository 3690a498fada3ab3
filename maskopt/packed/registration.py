"""Registers packed folders with transformers, whenever that is imported.

transformers has no entry points: a type of model exists once it has been registered with the modules that hold the
tables. Importing those takes seconds, which `import maskopt` must not. So where they are imported, they are told now,
and otherwise when their import ends: Python asks the finders on `sys.meta_path` where a module lies, and one of ours
answers what the others say, with one more step after the module's code.
"""

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["register"]

_STEPS = {
    "transformers.models.auto.configuration_auto": "register_config",
    "transformers.models.auto.modeling_auto": "register_models",
}
"""What `_READERS` do once a module of transformers has been imported."""

_READERS = ("maskopt.packed.reader", "maskopt.packed.shrunk")


class _AfterImport(MetaPathFinder):
    """Finds the modules of `_STEPS` as all other finders do, and takes the step when their code has run."""

    def __init__(self) -> None:
        self.waiting: dict[str, str] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        step = self.waiting.pop(fullname, None)
        if step is None:
            return None
        spec = importlib.util.find_spec(fullname)  # of the other finders: this module is no longer waited for
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _take(step)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _take(step: str) -> None:
    for reader in _READERS:
        try:
            getattr(importlib.import_module(reader), step)()
        except Exception as error:  # nothing of ours may stop an import of transformers
            warnings.warn(
                f"maskopt's packed folders cannot be loaded by this version of transformers: {error!r}.", stacklevel=2
            )


def register() -> None:
    """Register packed folders now where transformers is imported already, else when it will be."""
    finder = _AfterImport()
    for module, step in _STEPS.items():
        if module in sys.modules:
            _take(step)
        else:
            finder.waiting[module] = step
    if finder.waiting:
        sys.meta_path.insert(0, finder)
