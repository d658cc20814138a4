"""Finds the method that a recipe names."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from ..config.training import Config
from .protocol import Method


def method_class(config: Config | type[Config]) -> Callable[..., Method]:
    """Returns the class of a recipe's method; its arguments are config, models, prompts and session.

    Its `columns` are those of the method, also without an instance.
    """
    module, _, name = config.code.partition(":")
    return getattr(importlib.import_module(f"{__package__}.{module}"), name)
