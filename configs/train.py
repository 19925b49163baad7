"""Train a model: with dropout or without, otherwise the same.

    python -m launch.train --config=configs/train.py:no_dropout --workdir=DIR
    python -m launch.train --config=configs/train.py:dropout,small --workdir=DIR

After the colon stand the arm (no_dropout, dropout, stochastic_depth) and, after a comma, the preset: tiny
(the default; under ten minutes an arm on two CPU cores), small (one GPU, about ten minutes an arm), or
base (about 125M parameters, for several accelerators).
"""

from ml_collections import config_dict

RATE = 0.1

ARMS = {
    "no_dropout": dict(),
    "dropout": dict(resid=RATE, attn=RATE, mlp=RATE),
    "stochastic_depth": dict(depth=RATE),
}

PRESETS = {
    "tiny": dict(),
    "small": dict(
        steps=6000,
        batch=256,
        accumulate=1,
        dtype="bfloat16",
        model=dict(layers=12, width=512, heads=8, kv_heads=8, mlp_width=1536, context=128),
        data=dict(people=5000, unseen_people=200, vocab_size=4096),
        optimizer=dict(learning_rate=1e-3, warmup=200),
        checkpoint=dict(every=500, keep_every=500),
        evaluate_every=500,
    ),
    "base": dict(
        steps=40_000,
        batch=512,
        accumulate=1,
        dtype="bfloat16",
        model=dict(layers=16, width=768, heads=12, kv_heads=12, mlp_width=2048, context=256),
        data=dict(people=50_000, unseen_people=500, variants=40, vocab_size=8192),
        optimizer=dict(learning_rate=6e-4, warmup=1000),
        checkpoint=dict(every=1000, keep_every=4000),
        evaluate_every=1000,
    ),
}


def get_config(arm: str = "no_dropout") -> config_dict.ConfigDict:
    """The defaults. What stands after a setting is what --help says of it."""
    arm, _, preset = arm.partition(",")
    preset = preset or "tiny"
    for name, known in ((arm, ARMS), (preset, PRESETS)):
        if name not in known:
            raise ValueError(f"{name!r} is none of {', '.join(known)}")
    config = config_dict.create(
        arm=arm,  # its name in comparisons; what it changes is the dropout
        preset=preset,  # where the defaults come from: tiny, small or base
        seed=0,  # of initial parameters, the order of data, and dropout
        steps=700,  # of the optimiser
        batch=32,  # sequences a step, over all devices
        accumulate=4,  # parts that a batch is worked through in, one after the other: small ones fit a CPU's cache
        dtype="float32",  # of products and activations; or bfloat16, with float32 parameters
        precision="highest",  # of float32 products: highest, high or default (TF32 on a GPU)
        model=dict(
            layers=8,  # of attention and MLP
            width=128,  # dimensions of the residual stream
            heads=4,  # of queries
            kv_heads=4,  # of keys and values; they divide the heads
            mlp_width=384,  # dimensions within an MLP
            context=64,  # tokens of a sequence
        ),
        data=dict(
            kind="biographies",  # of invented people; or text: UTF-8 files
            seed=0,  # of the people; leave it as it is for models that are compared
            people=120,  # in biographies
            unseen_people=40,  # who are in no biography: what is guessed
            variants=30,  # biographies a person
            path="",  # of text: files, directories and patterns, separated by commas
            holdout=0.05,  # share of text that is kept for evaluation
            vocab_size=2048,  # tokens of the tokenizer that is trained on the text
        ),
        dropout=dict(
            resid=0.0,  # share of the embedding's dimensions that is left out
            attn=0.0,  # share of the dimensions of attention's writes
            mlp=0.0,  # share of the dimensions of MLPs' writes
            depth=0.0,  # share of whole writes: stochastic depth
        )
        | ARMS[arm],
        optimizer=dict(
            learning_rate=3e-3,  # the highest
            final_share=0.1,  # of the learning rate, at the last step
            warmup=50,  # steps in which the learning rate rises
            weight_decay=0.1,  # of matrices
            beta1=0.9,  # of Adam: how slowly the mean of gradients moves
            beta2=0.95,  # of Adam: how slowly the mean of their squares moves
            clip=1.0,  # norm that gradients are scaled down to
        ),
        checkpoint=dict(
            every=100,  # steps
            keep_last=2,  # of checkpoints, the last few
            keep_every=100,  # steps whose checkpoints stay for good, a multiple of every
        ),
        evaluate_every=100,  # steps
        log_every=10,  # steps between lines of metrics.jsonl
    )
    config.update(PRESETS[preset])
    return config
