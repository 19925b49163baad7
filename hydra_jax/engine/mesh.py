"""The layout of a model and its prompts on devices: prompts over `data`, parameters and caches over `model`.

A mesh belongs to one *worker*: a process, or as many processes as it takes to hold one copy of the model.
Workers share nothing while they work, so a mesh's data axis is the worker's own, and a run of W workers
spreads its prompts over W times as many devices.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import typing
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from jaxtyping import Array, Int, Shaped

from hydra_jax.config import MeshConfig
from hydra_jax.core.prefill import LayerClean
from hydra_jax.errors import UserError
from hydra_jax.models.config import ModelConfig
from hydra_jax.models.transformer import Params, flat, layout

DATA, MODEL = "data", "model"

SPLIT = {
    r"embedding": (-2, -1),
    r"positions": (-1,),
    r"unembedding": (-1, -2),
    r".*/(query|key|value|gate|up)/kernel": (-1, -2),
    r".*/(query|key|value|gate|up)/bias": (-1,),
    r".*/(out|down)/kernel": (-2, -1),
}
"""Parameters by name, and the axes along which they may be split over `model`: the first that it divides.

They are the vocabulary, the heads and the hidden width, so that a layer adds up over devices twice: for
attention's write and for the MLP's. Norms, and the biases of writes, are whole on every device.
"""

CACHE_SPLIT = {"keys": (1, 2), "values": (1, 3)}
"""The same for P texts' clean runs in a layer: key/value heads, else the dimensions of each. The stream is whole."""

Leaf = Array | np.ndarray
"""A parameter or an input, on devices or on this host."""


@dataclasses.dataclass(frozen=True)
class Worker:
    """One of the parts of a run that work by themselves.

    Attributes:
      number: its number, from 0.
      count: the number of workers.
      leads: whether this process speaks and writes for it; one of a worker's processes does.
    """

    number: int
    count: int
    leads: bool

    def share(self, things: list[Any]) -> list[Any]:
        """Return this worker's share: every `count`-th of the things, as neighbours are alike in cost."""
        return things[self.number :: self.count]


def make(config: MeshConfig) -> Mesh:
    """Make the mesh of this process' worker.

    Raises:
      UserError: if the devices cannot be divided so.
    """
    every, mine = jax.device_count(), jax.local_device_count()
    hosts = jax.process_count()
    data, model = config.data or every // config.model, config.model
    if model > every or data * model > every or (hosts > 1 and data * model != every):
        raise UserError(
            f"config.mesh: data {config.data} and model {model} do not go with {every} devices; give two numbers whose"
            f" product is {every}, or leave data at 0 and have model divide it"
        )
    if (mine % model and model % mine) or (every % model and hosts > 1):
        raise UserError(
            f"config.mesh.model: is {model}, each process has {mine} devices; give a number that divides"
            f" {mine}, or a multiple of it that divides {every}"
        )
    if hosts == 1:
        devices = jax.local_devices()[: data * model]
    else:
        together = max(1, model // mine)  # processes of a worker
        first = jax.process_index() // together * together
        devices = [d for d in jax.devices() if first <= d.process_index < first + together]
        devices.sort(key=lambda d: (d.process_index, d.id))
    return Mesh(np.array(devices).reshape(-1, model), (DATA, MODEL), axis_types=(AxisType.Auto,) * 2)


def worker(mesh: Mesh) -> Worker:
    """Return the worker that a mesh belongs to."""
    hosts = sorted({device.process_index for device in mesh.devices.flat})
    here = jax.process_index() == hosts[0]
    return Worker(hosts[0] // len(hosts), max(1, jax.process_count() // len(hosts)), here)


def mesh_of(params: Params) -> Mesh:
    """Return the mesh that parameters lie on, or a mesh of their one device if they were not laid on any."""
    sharding = jax.tree.leaves(params)[0].sharding
    if isinstance(sharding, NamedSharding):
        return typing.cast(Mesh, sharding.mesh)
    (device,) = sharding.device_set
    return Mesh(np.array([[device]]), (DATA, MODEL), axis_types=(AxisType.Auto,) * 2)


def parameter(mesh: Mesh, name: str, shape: tuple[int, ...]) -> NamedSharding:
    """Return the sharding of the parameter of a path such as "layers/attn/out/kernel"."""
    return NamedSharding(mesh, _spec(name, shape, mesh.shape[MODEL]))


def _spec(name: str, shape: tuple[int, ...], model: int) -> Spec:
    return split(shape, next((axes for pattern, axes in SPLIT.items() if re.fullmatch(pattern, name)), ()), model)


def split(shape: tuple[int, ...], axes: tuple[int, ...], model: int, first: str | None = None) -> Spec:
    """Split `shape` over `model` along the first of `axes` that it divides, and over `first` along its first axis."""
    names: list[str | None] = [first, *[None] * (len(shape) - 1)]
    axis = next((axis for axis in axes if shape[axis] % model == 0), None)
    if axis is not None:
        names[axis] = MODEL
    return Spec(*names)


@functools.cache
def bytes_a_device(config: ModelConfig, model: int, layers: int | None = None) -> int:
    """Return the bytes of a model's parameters, or those beside and of some `layers`, on each of `model` devices."""
    parts = 0
    for name, like in flat(layout(config).weights).items():
        shared = MODEL in _spec(name, like.shape, model)
        size = math.prod(like.shape) * like.dtype.itemsize // (model if shared else 1)
        if layers is not None and name.startswith("layers/"):
            size = size // config.layers * layers
        parts += size
    return parts


def over_data(mesh: Mesh) -> NamedSharding:
    """Return the sharding of P prompts' arrays: along the data axis, whole along the model axis."""
    return NamedSharding(mesh, Spec(DATA))


def put(mesh: Mesh, array: Shaped[Leaf, "*shape"], spec: Spec, copied: bool = False) -> Shaped[Array, "*shape"]:
    """Put an array of this host on a mesh; where processes are several, each gives its devices their part.

    Args:
      mesh: the mesh.
      array: the array.
      spec: how it lies there.
      copied: whether the array's memory will be used for something else.
    """
    sharding = NamedSharding(mesh, spec)
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding, may_alias=False if copied else None)
    return jax.make_array_from_callback(
        array.shape, sharding, lambda part: array[part].copy() if copied else array[part]
    )


def lay_one(mesh: Mesh, name: str, array: Shaped[Leaf, "*shape"]) -> Shaped[Array, "*shape"]:
    """Put a parameter where it belongs."""
    return put(mesh, array, parameter(mesh, name, array.shape).spec)


def lay(mesh: Mesh, params: Params) -> Params:
    """Put a model where it belongs."""
    laid = {name: lay_one(mesh, name, array) for name, array in flat(params.weights).items()}
    return params.replace(weights=traverse_util.unflatten_dict(laid, sep="/"))


def stack(
    mesh: Mesh, name: str, like: jax.ShapeDtypeStruct, layers: Iterable[Shaped[Leaf, "*part"]]
) -> Shaped[Array, "L ..."]:
    """Stack a parameter of all layers where it belongs, one layer after another: no host holds all of it."""
    sharding = parameter(mesh, name, like.shape)
    whole = jax.jit(lambda: jnp.zeros(like.shape, like.dtype), out_shardings=sharding)()

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=sharding)
    def write(
        whole: Shaped[Array, "*whole"], layer: Shaped[Array, "*part"], index: Int[Array, ""]
    ) -> Shaped[Array, "*whole"]:
        return jax.lax.dynamic_update_index_in_dim(whole, layer, index, 0)

    for index, layer in enumerate(layers):
        whole = write(whole, put(mesh, layer, Spec(*sharding.spec[1:])), np.int32(index))
    return whole


def spread(
    mesh: Mesh, run: Callable[..., Any], replicated: tuple[int, ...], out: Any = None, donated: tuple[int, ...] = ()
) -> jax.stages.Wrapped:
    """Return a jitted function of P prompts on a mesh: each device of the data axis runs it on its own prompts.

    Nothing passes between them. Along the model axis, products are split as their operands are.

    Args:
      mesh: the mesh.
      run: a function of arrays whose first axis is P, and of others.
      replicated: positions of the arguments that are others.
      out: shardings of the results; without it, they are whole along the model axis.
      donated: positions of the arguments whose memory the results may take.
    """

    @functools.partial(jax.jit, out_shardings=out or over_data(mesh), donate_argnums=donated)
    def everywhere(*arguments: Any) -> Any:
        specs = tuple(Spec() if position in replicated else Spec(DATA) for position in range(len(arguments)))
        # The specs say which values are replicated and which are split: a check would want casts inside `run`.
        local = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=Spec(DATA), axis_names={DATA}, check_vma=False)
        return local(*arguments)

    return everywhere


def clean_layer(mesh: Mesh, config: ModelConfig) -> LayerClean:
    """Return the shardings of P texts' clean runs in a layer: keys and values lie as heads do, all else is whole."""
    c, model = config, mesh.shape[MODEL]
    shapes = {"keys": (1, c.kv_heads, c.head_dim, 1), "values": (1, c.kv_heads, 1, c.head_dim)}
    lying = {name: split(shape, CACHE_SPLIT[name], model, DATA) for name, shape in shapes.items()}
    every: dict[str, Any] = {
        f.name: NamedSharding(mesh, lying.get(f.name, Spec(DATA))) for f in dataclasses.fields(LayerClean)
    }
    return LayerClean(**every)
