"""The benchmark of the kernels.

    python -m launch.benchmark --config=configs/benchmark.py:smollm2-135m

After the colon stands a model, or a name of hydra_jax.models.shapes.SHAPES, such as random-1b or gpt2,
for random weights of that shape; every family has one. With --config.step=2, about two and a half
minutes on two CPU cores.
"""

from ml_collections import config_dict


def get_config(model: str = "smollm2-135m") -> config_dict.ConfigDict:
    """The defaults. What stands after a setting is what --help says of it."""
    return config_dict.create(
        model=model,  # what is measured: a model, or the name of a shape for random weights
        dtype="float32",  # of weights, keys and values: float32 or bfloat16
        precision="highest",  # of float32 products: highest, high or default (TF32 on a GPU)
        lengths=(12, 64, 256),  # tokens of a prompt
        peer_lengths=(12, 64),  # the same of --peers, which take long
        rows=0,  # rows of a block; 0: the sweep's default for the device
        draws=15,  # replacements a prompt
        step=1,  # measure every step-th component
        mesh=dict(
            data=0,  # of --sweep: devices that each take other prompts; 0: all there are
            model=1,  # of --sweep and --devices: devices that share a copy of the model
        ),
        strong=0,  # prompts that --devices spreads over them; 0: what fills the most of them
        layers=0,  # of a shape of random weights, its first so many alone, to fit it into memory; 0: all
    )
