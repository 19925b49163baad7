"""Structural causal models: the paper's effects by their definition, on graphs small enough to see through.

`effects.py` computes the same quantities for a transformer, whose variables are its writes and whose
outcome is the target's logit. The README's section "what is measured" has the equations.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

Values = dict[str, Any]


class CausalModel:
    """Variables in causal order, each a function whose parameters are named as its causes.

    Names that no equation sets are exogenous, and are given to `run`.

    Attributes:
      equations: each variable's function, in causal order.
      causes: each variable's causes.
      exogenous: the names that no equation sets.
    """

    def __init__(self, **equations: Callable[..., Any]):
        """Take the variables' equations by name.

        Raises:
          ValueError: if a variable stands before one of its causes.
        """
        self.equations = equations
        self.causes = {name: tuple(inspect.signature(equation).parameters) for name, equation in equations.items()}
        every = [cause for causes in self.causes.values() for cause in causes]
        self.exogenous = tuple(dict.fromkeys(cause for cause in every if cause not in equations))
        known = set(self.exogenous)
        for name, causes in self.causes.items():
            for cause in causes:
                if cause not in known:
                    raise ValueError(f"{name}: its cause {cause} comes after it; list variables in causal order")
            known.add(name)

    def run(self, exogenous: Mapping[str, Any], do: Mapping[str, Any] | None = None) -> Values:
        """Return every variable's value; those in `do` are set, whatever their causes.

        Raises:
          KeyError: if an exogenous variable is not given.
        """
        values = {name: exogenous[name] for name in self.exogenous} | dict(do or {})
        for name, equation in self.equations.items():
            if name not in values:
                values[name] = equation(*(values[cause] for cause in self.causes[name]))
        return values

    def mediators(self, cause: str, outcome: str) -> list[str]:
        """Return the variables on a path from `cause` to `outcome`, both left out."""
        downstream, upstream = {cause}, {outcome}
        for name, causes in self.causes.items():
            if downstream.intersection(causes):
                downstream.add(name)
        for name, causes in reversed(self.causes.items()):
            if name in upstream:
                upstream.update(causes)
        return [name for name in self.equations if name in downstream & upstream - {cause, outcome}]


def total_effect(model: CausalModel, exogenous: Mapping[str, Any], cause: str, value: Any, outcome: str) -> Any:
    """Return Y - Y(do(X = x~)): the drop of the outcome when the intervention runs its course."""
    return model.run(exogenous)[outcome] - model.run(exogenous, {cause: value})[outcome]


def direct_effect(model: CausalModel, exogenous: Mapping[str, Any], cause: str, value: Any, outcome: str) -> Any:
    """Return Y - Y(do(X = x~, M = m)): the drop when every mediator is held at its clean value."""
    clean = model.run(exogenous)
    held = {name: clean[name] for name in model.mediators(cause, outcome)}
    return clean[outcome] - model.run(exogenous, held | {cause: value})[outcome]


def indirect_effect(model: CausalModel, exogenous: Mapping[str, Any], cause: str, value: Any, outcome: str) -> Any:
    """Return the total effect less the direct effect: the part that comes through mediators."""
    arguments = model, exogenous, cause, value, outcome
    return total_effect(*arguments) - direct_effect(*arguments)


def compensation(model: CausalModel, exogenous: Mapping[str, Any], cause: str, value: Any, outcome: str) -> Values:
    """Return, for each mediator M, Y(do(X = x~, M = m~, others clean)) - Y(do(X = x~, all clean)).

    m~ is the mediator's value in the ablated run. Where the outcome is a sum over its causes, the
    compensations of its direct causes add up to minus the indirect effect.
    """
    clean, ablated = model.run(exogenous), model.run(exogenous, {cause: value})
    mediators = model.mediators(cause, outcome)
    held = {name: clean[name] for name in mediators} | {cause: value}
    without = model.run(exogenous, held)[outcome]
    return {name: model.run(exogenous, held | {name: ablated[name]})[outcome] - without for name in mediators}


def motif(f: Callable[[Any, Any], Any]) -> CausalModel:
    """Return the paper's graph: x = u, and y = x + f(x, u), where f is the write of a later layer."""

    def write(x: Any, u: Any) -> Any:
        return f(x, u)

    return CausalModel(x=lambda u: u, f=write, y=lambda x, f: x + f)


ERASURE = motif(lambda x, u: -x)
"""The later layer removes what x wrote: the ablation of x has a direct effect and no total one."""

SELF_REPAIR = motif(lambda x, u: jnp.where(x == u, jnp.zeros_like(u), u))
"""The later layer writes u where x does not, and else nothing: ablated to 0, x is replaced in full."""
