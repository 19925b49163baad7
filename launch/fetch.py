"""Fetch a model into the cache and verify it.

python -m launch.fetch --model=smollm2-135m
python -m launch.fetch --list
"""

from absl import flags

from hydra_jax import runtime

MODEL = flags.DEFINE_string("model", "smollm2-135m", "a named model, or a Hugging Face Hub id")
LIST = flags.DEFINE_bool("list", False, "show the named models and where they are kept")


def main() -> None:
    from hydra_jax.weights import hub

    if LIST.value:
        print(f"{'name':16} {'size':>8}  {'licence':12} {'dropout in training':20} model")
        for name, source in hub.MODELS.items():
            size = f"{source.size / 1e6:,.0f} MB"
            dropout = "not published" if source.dropout is None else f"{source.dropout:g}"
            print(f"{name:16} {size:>8}  {source.licence:12} {dropout:20} {source.about}")
        print(f"kept in {hub.cache_dir()} (set {hub.CACHE_VARIABLE} to move it)")
        return
    print(f"fetching {MODEL.value} into {hub.cache_dir()} ...", flush=True)
    path = hub.locate(MODEL.value)
    print(f"verified {path}" if MODEL.value in hub.MODELS else f"found {path}")


if __name__ == "__main__":
    runtime.main(main)
