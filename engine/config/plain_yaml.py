"""Parses YAML as people mean it: the scalars of YAML 1.2, each key once, no aliases, nothing nested deep.

PyYAML by itself reads YAML 1.1, where 010 is 8, 1:30 is 90 and 1e-5 is a text, lets the last of two equal keys win, and
expands aliases, which a page of text can turn into all memory there is.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

MOST_DEPTH = 20
MOST_DIGITS = 18  # of an integer; more fit no key and are left as text
NUMBER = list("-+.0123456789")
SCALARS = (  # (tag, what is of it and no text, the characters that it may begin with)
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", rf"[-+]?(?:0|[1-9][0-9]{{0,{MOST_DIGITS - 1}}})", NUMBER),
    ("float", r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+", NUMBER),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", NUMBER),
)


def parse(text: str) -> Any:
    """Parses one YAML document. Raises yaml.YAMLError whose text says what is wrong and where."""
    return yaml.load(text, _Loader)  # a subclass of SafeLoader: no code


def written(tree: dict) -> str:
    """Writes YAML that `parse` reads back equal, and other readers of either YAML too."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


class _Dumper(yaml.SafeDumper):
    """Puts texts in quotes that either YAML takes for something else."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - of the base class; filled below
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _error(f"found the alias *{event.anchor}, expected the value itself", event)
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise _error(f"found more than {MOST_DEPTH} levels, one in another", event)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _error("found a list or a section as a key, expected a word", key)
            if key.value in seen:
                raise _error(f"found {key.value[:80]} twice, expected each key once", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


for _tag, _form, _first in SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_form})\Z"), _first)


def _error(problem: str, at: yaml.Node | yaml.Event) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)
