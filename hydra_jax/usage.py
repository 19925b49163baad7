"""The settings of a config file as --help shows them: names, values, and meanings, which are the file's own comments.

A meaning is said once, beside the default that one reads and changes, and is read from there.
"""

from __future__ import annotations

import ast
import io
import textwrap
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

WIDTH = 100


def settings(path: Path, config: Mapping[str, Any]) -> str:
    """Describe the settings of a config, a paragraph for each.

    Args:
      path: of the Python file that made it.
      config: of any depth; its values are shown.
    """
    said = meanings(path.read_text("utf-8"))
    lines = [f"settings of {path.name}, each changed with --config.NAME=VALUE:", ""]
    order = list(said)
    # A ConfigDict sorts its keys; the file keeps together what belongs together.
    for name, value in sorted(flat(config), key=lambda item: order.index(item[0]) if item[0] in said else len(order)):
        lines.append(f"  --config.{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}")
        if name in said:
            lines += textwrap.wrap(said[name], WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the names, with dots, and the values of a config's settings."""
    for key, value in config.items():
        if isinstance(value, Mapping) or hasattr(value, "items"):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def meanings(code: str) -> dict[str, str]:
    """Return the meanings of settings by their names with dots: the comment after each in a `config_dict.create(...)`.

    A comment goes on in lines below it that have nothing else.

    Args:
      code: of a config file.
    """
    found = [t for t in tokenize.generate_tokens(io.StringIO(code).readline) if t.type == tokenize.COMMENT]
    comments = {token.start[0]: token.string.lstrip("# ") for token in found}
    for token in reversed(found):
        if token.line.lstrip().startswith("#") and token.start[0] - 1 in comments:
            comments[token.start[0] - 1] += " " + comments[token.start[0]]
    said: dict[str, str] = {}

    def visit(call: ast.Call, prefix: str) -> None:
        for keyword in call.keywords:
            value: ast.expr = keyword.value
            while isinstance(value, ast.BinOp):  # defaults | changes
                value = value.left
            if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "dict":
                visit(value, f"{prefix}{keyword.arg}.")
            elif comment := comments.get(keyword.value.end_lineno or 0):
                said[f"{prefix}{keyword.arg}"] = comment

    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "create":
            visit(node, "")
    return said
