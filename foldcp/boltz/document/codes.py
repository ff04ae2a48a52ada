"""Codes of residues as they are written: YAML reads 143 and 017 as numbers, NO as false."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

from foldcp.boltz.run import current

_TEXT = "tag:yaml.org,2002:str"
_OTHER = {f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "bool", "timestamp")}


class CodeLoader(yaml.SafeLoader):
    """`yaml.safe_load` as Boltz uses it, except that the value of a field `ccd` stays text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Construct the values of a mapping, see the class.

        Args:
            node: the mapping.
            deep: construct nested values at once, as in `yaml`.
        """
        self.flatten_mapping(node)  # what it merges may hold codes, too
        node.value = [(k, _as_written(v) if k.value == "ccd" else v) for k, v in node.value]
        return super().construct_mapping(node, deep)


def _as_written(node: yaml.Node) -> yaml.Node:
    """The node, or one like it whose plain values are text: its anchor may stand elsewhere, too."""
    marks = node.start_mark, node.end_mark
    if isinstance(node, yaml.SequenceNode):
        return yaml.SequenceNode(node.tag, [_as_written(x) for x in node.value], *marks)
    if isinstance(node, yaml.ScalarNode) and node.tag in _OTHER:
        return yaml.ScalarNode(_TEXT, node.value, *marks)
    return node


class _Yaml:
    """Stands for the module `yaml` where Boltz reads an input."""

    def __getattr__(self, name: str) -> Any:
        return getattr(yaml, name)

    @staticmethod
    def safe_load(stream: Any) -> Any:
        """Load YAML; during a prediction, keep residue codes as they are written."""
        loader = yaml.SafeLoader if current() is None else CodeLoader
        return yaml.load(stream, loader)  # noqa: S506


def install() -> None:
    """Make Boltz read residue codes as they are written."""
    from boltz.data.parse import yaml as stock

    stock.yaml = _Yaml()
