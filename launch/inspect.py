"""Show what a model is and what a sweep of it would cost, without reading its weights.

python -m launch.inspect --model=smollm2-135m
python -m launch.inspect --model=DIRECTORY --prompts=1209 --length=24 --dtype=bfloat16
python -m launch.inspect --shape=llama2-70b --dtype=bfloat16 --share=8 --devices=64 --tflops=400
"""

import dataclasses

from absl import flags

from hydra_jax import runtime
from hydra_jax.errors import UserError
from hydra_jax.models.config import AS_STORED, DTYPES
from hydra_jax.models.shapes import SHAPES

MODEL = flags.DEFINE_string("model", "smollm2-135m", "a named model, a .gguf file, a directory, or a Hub id")
PROMPTS = flags.DEFINE_integer("prompts", 1000, "prompts of the sweep", lower_bound=1)
LENGTH = flags.DEFINE_integer("length", 12, "tokens of a prompt", lower_bound=1)
REPLACEMENTS = flags.DEFINE_integer("replacements", 15, "replacements of an ablation", lower_bound=1)
SHAPE = flags.DEFINE_enum("shape", None, list(SHAPES), "instead of a model, a published one's sizes")
SHARE = flags.DEFINE_integer("share", 1, "devices that share a copy of the model: config.mesh.model", lower_bound=1)
DEVICES = flags.DEFINE_integer("devices", 1, "accelerators in all", lower_bound=1)
TFLOPS = flags.DEFINE_float(
    "tflops", None, "10^12 operations a second that each does in this dtype, for a time", lower_bound=1e-6
)
EDGES = flags.DEFINE_bool("edges", True, "also direct edges, as a sweep does: about twice the work")
DTYPE = flags.DEFINE_enum("dtype", DTYPES[0], [*DTYPES, AS_STORED], "of weights, keys and values")


def main() -> None:
    from hydra_jax.sweep.cost import describe
    from hydra_jax.weights import source

    if SHAPE.value:
        stored = "bfloat16" if DTYPE.value == AS_STORED else DTYPE.value
        architecture, config = SHAPE.value, dataclasses.replace(SHAPES[SHAPE.value], dtype=stored)
    else:
        opened = source.open(MODEL.value)
        architecture, config = opened.architecture, opened.config(dtype=DTYPE.value)
    if LENGTH.value > config.context:
        raise UserError(f"--length: {LENGTH.value:,} tokens, {architecture} takes at most {config.context:,}")
    sweep = PROMPTS.value, LENGTH.value, REPLACEMENTS.value
    if DEVICES.value % SHARE.value and TFLOPS.value:
        raise UserError(
            f"--share: is {SHARE.value}, which does not divide --devices={DEVICES.value}; give one that does"
        )
    print(describe(architecture, config, *sweep, SHARE.value, DEVICES.value, TFLOPS.value or 0.0, EDGES.value))


if __name__ == "__main__":
    runtime.main(main)
