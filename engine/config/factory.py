"""Finds callables that a configuration names as `module:attribute`: the factory of a data set or of a scorer.

The callable is not called here, and its parameters are not checked.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from ..errors import UserError, one_line


def resolve(spec: str, key: str) -> Callable:
    """Returns the callable that `spec` names, such as "package.module:factory" or "package.module:Class.method".

    key: the configuration key of `spec`, for the message. Raises UserError naming the key and what was found: no
    colon, no such module, a module that does not import, no such attribute, or something that is not callable.
    """
    module_name, colon, attribute = spec.partition(":")
    if not colon or not module_name or not attribute or module_name.startswith("."):
        raise UserError(f"{key}: found {spec!r}, expected module:factory, such as strop.bench.tinyworld.pairs:load")
    try:
        value = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(_no_module(key, module_name, error)) from None
    except Exception as error:  # the user's module may raise anything
        message = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{key}: module {module_name} does not import ({message})") from error
    for name in attribute.split("."):
        if not hasattr(value, name):
            raise UserError(f"{key}: {module_name} has no attribute {attribute}")
        value = getattr(value, name)
    if not callable(value):
        raise UserError(f"{key}: {spec} is a {type(value).__name__}, expected something callable")
    return value


def _no_module(key: str, module_name: str, error: ModuleNotFoundError) -> str:
    """Says whether the module itself is missing, or one that it imports."""
    missing = error.name or module_name
    if module_name == missing or module_name.startswith(missing + "."):
        return f"{key}: no module {missing}; it must be importable from here (installed, or on PYTHONPATH)"
    return f"{key}: module {module_name} needs {missing}, which is not installed"
