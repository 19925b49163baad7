"""The page's HTML: templates that escape whatever they are given, unless it is marked as safe here."""

from __future__ import annotations

import functools
import importlib.resources
import json
from typing import Any

import jinja2
from markupsafe import Markup

ASSETS = "assets"


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("hydra_jax.report", ASSETS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render(name: str, **values: Any) -> Markup:
    """Fill in a template of `assets/`.

    Args:
      name: its file name.
      values: what it shows. Text from prompts, models and files is escaped; only `Markup` goes in as it is.

    Returns:
      The HTML, which other templates take as it is.
    """
    return Markup(_environment().get_template(name).render(values))  # every value in it has been escaped


def asset(name: str) -> Markup:
    """Read a style sheet or script of `assets/`, which goes in as it is."""
    text = (importlib.resources.files("hydra_jax.report") / ASSETS / name).read_text("utf-8")
    return Markup(text)  # our own file: nothing of a prompt, model or sweep is in it


def plotly() -> Markup:
    """Return the script of the plotting library, which goes in as it is."""
    import plotly.offline

    return Markup(plotly.offline.get_plotlyjs())  # a file of an installed package, like those that we import


def script_data(tree: Any) -> Markup:
    """Write a JSON tree such that it can stand inside a script element.

    Raises:
      ValueError: if a number in it is not finite.
    """
    text = json.dumps(tree, allow_nan=False, separators=(",", ":"))
    # A script's text is not unescaped by browsers, so HTML's escapes would end up in the data; only a "<" could end
    # the element, and JSON has an escape of its own for it.
    return Markup(text.replace("<", "\\u003c"))
