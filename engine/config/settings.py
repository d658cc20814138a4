"""Reads frozen settings from a YAML file and `key=value` overrides, and checks them all before anything is loaded.

The keys of the recipes are in the other files of this folder.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from ..errors import UserError, one_line, short
from ..user_files import is_text, read_text, user_path
from .plain_yaml import parse, written


class Section(BaseModel):
    """A frozen section of a recipe; unknown keys, NaN, infinity, and true or false for a number are errors.

    A text that begins with ~/ is a path in the home folder.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _bool_is_no_number(cls, values: Any) -> Any:
        for name, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field and field.annotation in (int, float):
                raise ValueError(f"{name} is {str(value).lower()}, but must be a number")
        return values

    @field_validator("*", mode="after")
    @classmethod
    def _text_and_paths(cls, value: Any) -> Any:
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and (not is_text(text) or "\0" in text):
                raise ValueError(f"found {short(text)}, expected text without half characters and zeros")
        return str(user_path(value)) if isinstance(value, str) and value.startswith("~") else value


C = TypeVar("C", bound=Section)
MOST_BYTES = 2**18  # of a recipe
RECIPES = Path(__file__).parents[2] / "configs"  # beside engine/, in a checkout and in a wheel


def read(path: str | Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Reads a YAML recipe and applies `section.key=value` overrides, whose values are YAML; nothing is checked yet.

    path: a file, or the name of a recipe in configs/ without .yaml. Raises UserError that names the file or override.
    """
    tree = _read_yaml(_recipe_file(path))
    for override in overrides:
        _apply(tree, override)
    return tree


def checked(tree: dict[str, Any], cls: type[C], path: str | Path) -> C:
    """Returns the settings that a tree read from `path` holds. Raises UserError, one sentence that names the key."""
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: {_sentence(cls, error)}") from None


def dumped(config: Section) -> str:
    """Returns the resolved configuration, every default filled in, as YAML that `load` reads back equal."""
    return written(config.model_dump(mode="json"))


def dump(config: Section, path: Path) -> None:
    """Writes a file of what `dumped` returns."""
    path.write_text(dumped(config), encoding="utf-8")


def keys(cls: type[BaseModel], prefix: str = "") -> list[str]:
    """Lists the dotted keys of a configuration class."""
    dotted = []
    for name, field in cls.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            dotted += keys(nested, f"{prefix}{name}.")
        else:
            dotted.append(prefix + name)
    return dotted


def differences(old: Section, new: Section, ignore: Sequence[str] = ()) -> list[str]:
    """Lists `key: old -> new` for every dotted key outside `ignore` whose values differ.

    Of recipes of two methods it lists that alone.
    """
    if type(old) is not type(new):
        return [f"method: {getattr(old, 'method', None)!r} -> {getattr(new, 'method', None)!r}"]

    def value(config: Any, dotted: str) -> Any:
        for part in dotted.split("."):
            config = getattr(config, part)
        return config

    return [
        f"{key}: {value(old, key)!r} -> {value(new, key)!r}"
        for key in keys(type(new))
        if key not in ignore and value(old, key) != value(new, key)
    ]


def varied(config: C, values: Mapping[str, Any]) -> C:
    """Returns a copy of a configuration with other values of some dotted keys, checked like any other."""
    tree = config.model_dump()
    for key, value in values.items():
        *sections, last = key.split(".")
        functools.reduce(dict.__getitem__, sections, tree)[last] = value
    return type(config).model_validate(tree)


def accepts(config: Section, values: Mapping[str, Any]) -> bool:
    """Returns whether a configuration has these dotted keys and may have these values of them."""
    if values.keys() - set(keys(type(config))):
        return False
    try:
        varied(config, values)
    except ValueError:
        return False
    return True


def recipes() -> list[str]:
    """Lists the names of the recipes that come with strop, such as tinyworld."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def _recipe_file(path: str | Path) -> Path:
    """Returns the file of a recipe, which is named by a path or by its name in configs/ without .yaml."""
    named, file = RECIPES / f"{path}.yaml", user_path(str(path))
    return named if file.name == str(path) and not file.exists() and named.is_file() else file


def _read_yaml(path: Path) -> dict:
    try:
        tree = parse(read_text(path, MOST_BYTES))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give the path of a recipe, or one of {', '.join(recipes())}"
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not valid YAML ({one_line(error)})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: found {type(tree).__name__}, expected sections such as `model:` and `run:`")
    return tree


def _apply(tree: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {short(override)}: expected section.key=value, such as optim.lr=1e-4")
    *sections, last = key.split(".")
    for section in sections:
        if tree.get(section) is None:  # absent, or there and empty
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise UserError(
                f"override {short(override)}: {section} is a key, expected a section; write section.key=value"
            )
    try:
        tree[last] = parse(value)
    except (yaml.YAMLError, ValueError) as error:
        why = getattr(error, "problem", None) or "not valid YAML"
        raise UserError(f"override {short(override)}: {one_line(why)}, in YAML; put text in quotes") from None


def _sentence(cls: type[BaseModel], error: ValidationError) -> str:
    """Writes the first of pydantic's complaints as a sentence that a person can act on."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])[:80]
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        near = _nearest(cls, key)
        return (
            f"unknown key {key}; "
            + (f"did you mean {near}?" if near else "docs/configuration.md lists all keys")
            + more
        )
    if first["type"] == "missing":
        return f"{key} is missing{more}"
    if first["type"] == "value_error":
        return f"{key}{': ' if key else ''}{first['ctx']['error']}{more}"
    if first["type"] == "model_type":
        return (
            f"{key}: found {short(first['input'])}, expected keys and values, as docs/configuration.md has them{more}"
        )
    expected = first["msg"].removeprefix("Input should be ").removeprefix("Tuple should have ")
    return f"{key}: found {short(first['input'])}, expected {expected.split(' after validation')[0]}{more}"


def _nearest(cls: type[BaseModel], key: str) -> str | None:
    """Returns the key that was probably meant: the same word in another section, else the most similar, else None."""
    word = key.rsplit(".", 1)[-1]
    elsewhere = [known for known in keys(cls) if known.rsplit(".", 1)[-1] == word]
    similar = difflib.get_close_matches(key, keys(cls) + ([] if "." in key else list(cls.model_fields)), n=1)
    return next(iter(elsewhere + similar), None)
