"""Messages among the processes of a run: few, and through JAX's coordination service, not the devices.

The service notices a process that is lost, and then ends the others: none waits for ever.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import time
from typing import Any

import jax
from jax._src import distributed  # what jax.distributed is made of has no public names for it

from hydra_jax.errors import UserError

POLL_SECONDS = 1
"""Length of one wait among many: a wait in one piece would not hear of Ctrl-C or SIGTERM."""

_calls = itertools.count()  # every exchange needs a name of its own, the same in all processes


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes of a run, or this one alone.

    Attributes:
      process: this one's number, from 0.
      count: the number of processes.
    """

    process: int
    count: int

    @classmethod
    def joined(cls) -> Cluster:
        """Return the cluster of `jax.distributed`, or this process alone where that was not started."""
        return cls(jax.process_index(), jax.process_count())

    @property
    def first(self) -> bool:
        """Whether this process speaks for all."""
        return self.process == 0

    def share(self, things: list[Any]) -> list[Any]:
        """Return this process' share of `things`."""
        return things[self.process :: self.count]

    def gather(self, said: Any) -> list[Any]:
        """Return the values that all processes pass to this call, in their order; JSON, not much of it."""
        if self.count == 1:
            return [said]
        client, call = _client(), next(_calls)
        client.key_value_set(f"hydra_jax/{call}/{self.process}", json.dumps(said))
        keys = (f"hydra_jax/{call}/{process}" for process in range(self.count))
        return [json.loads(_heard(client, key)) for key in keys]

    def wait(self) -> None:
        """Wait until every process is here."""
        self.gather(None)

    def agree(self, failure: UserError | None, said: str = "", what: str = "") -> None:
        """Stop in every process if one cannot go on, or they do not say the same: the others would wait for it.

        Args:
          failure: this process' error, if it cannot go on.
          said: a hash of the work, which must be the same in all.
          what: the words for a difference, to end the error's "the processes of this run have ...".

        Raises:
          UserError: in a process that fails, its own.
        """
        said_by_all = self.gather(None if failure else said)
        if failure:
            raise failure
        if None in said_by_all:
            raise UserError("another process of this run cannot go on; see what it says")
        if len(set(said_by_all)) > 1:
            raise UserError(f"the processes of this run have {what}; give all of them the same")


def _heard(client: Any, key: str) -> str:
    """Return another process' value under a key, however long it works before; the service notices a lost one."""
    while True:
        try:
            return client.blocking_key_value_get(key, POLL_SECONDS * 1000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def is_broken(error: jax.errors.JaxRuntimeError) -> bool:
    """Whether an error says that a process, or the service that carries its words, is not there any more."""
    return any(word in str(error) for word in ("UNAVAILABLE", "heartbeat", "Barrier failed", "CANCELLED"))


def _client() -> Any:
    return distributed.global_state.client


def leave(seconds: int) -> None:
    """Wait a little for the others to leave as well: once one process ends, JAX's service ends the rest."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # they did not come in time
        _client().wait_at_barrier("hydra_jax/leave", seconds * 1000)
    if jax.process_index() == 0:  # it has the service
        time.sleep(1)
