"""Finds the recipe of a method: `method` names a file of config/methods/, whose class has all of the method's keys."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError, short
from . import methods, settings
from .settings import C
from .training import Config

DEFAULT = "spo"  # of a recipe that names no method


def names() -> list[str]:
    """Lists the methods in alphabetical order."""
    return sorted(module.name for module in pkgutil.iter_modules(methods.__path__))


def config_class(method: str) -> type[Config]:
    """Returns the class of a method's recipes. Raises UserError for a method that there is not."""
    if method not in names():
        raise UserError(f"method: found {short(method)}, expected one of {', '.join(names())}")
    module = importlib.import_module(f"{methods.__name__}.{method}")
    classes = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Config)]
    return next(cls for cls in classes if cls.__module__ == module.__name__)


def load(path: str | Path, overrides: Sequence[str] = (), cls: type[C] = Config) -> C:
    """Reads a recipe from a YAML file and `section.key=value` overrides; where `cls` is a Config, one of its method.

    path: a file, or the name of a recipe in configs/ without .yaml. Raises UserError, one sentence that names the file
    and the key.
    """
    tree = settings.read(path, overrides)
    try:
        _refuse_recipes_of_others(tree, cls)
        if issubclass(cls, Config):
            cls = config_class(tree.get("method", DEFAULT))
            _refuse_keys_of_others(tree, cls)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return settings.checked(tree, cls, path)


def config_of(tree: Mapping[str, Any]) -> Config:
    """Returns the configuration of a tree that `model_dump` made. Raises ValueError for what is none."""
    try:
        return config_class(tree.get("method", DEFAULT)).model_validate(tree)
    except UserError as error:
        raise ValueError(str(error)) from None


def config_of_json(text: str) -> Config:
    """Does as `config_of` with JSON."""
    tree = json.loads(text)
    if not isinstance(tree, dict):
        raise ValueError("no configuration")
    return config_of(tree)


def _refuse_recipes_of_others(tree: Mapping[str, Any], cls: type) -> None:
    """Raises UserError for the recipe of a judge where a method's is expected, and the other way round."""
    method, optim = issubclass(cls, Config), tree.get("optim")
    if method and "prompts" not in tree and isinstance(optim, Mapping) and "steps" in optim:
        raise UserError("found optim.steps and no prompts, expected a recipe of a method; `strop train-judge` runs it")
    if not method and "prompts" in tree:
        raise UserError("found prompts, expected a recipe of a judge, such as judge_sd15; `strop train` runs it")


def _refuse_keys_of_others(tree: Mapping[str, Any], cls: type[Config]) -> None:
    """Raises UserError for a key that other methods have and this one has not."""
    own = {part for key in settings.keys(cls) for part in (key, key.partition(".")[0])}
    for section, values in tree.items():
        inside = [f"{section}.{key}" for key in values] if isinstance(values, Mapping) and section in own else []
        for key in (section, *inside):
            others = [] if key in own else [name for name in names() if _has(config_class(name), key)]
            if others:
                method = cls.model_fields["method"].default
                raise UserError(f"{key}: method {method} has no such key, which is one of {', '.join(others)}")


def _has(cls: type[Config], key: str) -> bool:
    """Whether a method has this key or section."""
    return any(own == key or own.startswith(f"{key}.") for own in settings.keys(cls))
