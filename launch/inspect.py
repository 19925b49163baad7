"""Show what a model is and what a sweep of it would cost, without reading its weights.

python -m launch.inspect --model=smollm2-135m
python -m launch.inspect --model=DIRECTORY --prompts=1209 --length=24 --dtype=bfloat16
"""

from absl import flags

from hydra_jax import runtime
from hydra_jax.describe import describe
from hydra_jax.errors import UserError
from hydra_jax.models import hub
from hydra_jax.models.config import AS_STORED, DTYPES
from hydra_jax.models.load import read_config

MODEL = flags.DEFINE_string("model", "smollm2-135m", "a named model, a .gguf file, a directory, or a Hub id")
PROMPTS = flags.DEFINE_integer("prompts", 1000, "prompts of the sweep", lower_bound=1)
LENGTH = flags.DEFINE_integer("length", 12, "tokens of a prompt", lower_bound=1)
REPLACEMENTS = flags.DEFINE_integer("replacements", 15, "replacements of an ablation", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", DTYPES[0], [*DTYPES, AS_STORED], "of weights, keys and values")


def main() -> None:
    architecture, config = read_config(hub.locate(MODEL.value), dtype=DTYPE.value)
    if LENGTH.value > config.context:
        raise UserError(f"--length: {LENGTH.value:,} tokens, {MODEL.value} takes at most {config.context:,}")
    print(describe(architecture, config, PROMPTS.value, LENGTH.value, REPLACEMENTS.value))


if __name__ == "__main__":
    runtime.main(main)
