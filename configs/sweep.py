"""A sweep: ablate every attention and MLP layer of a model at the last token of many prompts.

    python -m launch.sweep --config=configs/sweep.py:smollm2-135m --workdir=DIR

After the colon stands the model: a name that `python -m launch.fetch --list` shows, a .gguf file, a
Hugging Face directory, or a Hub id. Any setting below is changed with --config.NAME=VALUE. On two CPU
cores ROME's 1,209 known_1000.json prompts, 279 of them answered right and swept, take about three minutes, half
of them for direct edges.
"""

from ml_collections import config_dict


def get_config(model: str = "smollm2-135m") -> config_dict.ConfigDict:
    """The defaults. What stands after a setting is what --help says of it."""
    return config_dict.create(
        model=model,  # a named model, a .gguf file, a Hugging Face directory, a Hub id, or what launch.train trained
        model_step=-1,  # the checkpoint of a model that launch.train trained; -1: the last
        dtype="float32",  # or bfloat16: half the memory; on accelerators, faster; auto: what the weights are stored in
        precision="highest",  # of float32 products: highest, high or default (TF32 on a GPU)
        prompts=dict(
            kind="records",  # a prompt a record; or text: prompts cut from an ordinary text file at random positions
            path="",  # known_1000.json, CounterFact, JSON lines, CSV, Parquet; or a built-in set: builtin:facts (""),
            # builtin:ioi, builtin:ioi_abc, builtin:greater_than
            text="",  # one prompt by itself, as --prompt gives it
            correct_only=True,  # as the paper: prompts that the model answers right
            limit=0,  # the most prompts that are swept, picked by seed; 0: no limit
            target="top",  # older name of readout.target: top or answer
            positions="last",  # tokens after which prompts are read and ablated: last, all, places ("3,-1") or a part
            # of every text whose last token is meant
        ),
        ablation=dict(
            kind="resample",  # what a write is replaced by: that of another prompt; or mean, zero, noise
            replacements=15,  # drawn for each ablation, where the kind is random: resample, noise
            sites="attn,mlp",  # or one of them; or heads: each attention head by itself
            layers="all",  # or e.g. "0,5,10-14"
            edges=True,  # also what each component does when it alone sees the edit: doubles the work
            components="",  # what is ablated instead, e.g. "attn 23, attn 23.4, layer 5, attn 24 + mlp 29" (together)
            freeze="",  # held at their clean writes, e.g. "attn 24, mlp 29, norm"; effects without that are kept beside
            paired=False,  # each prompt's one replacement is its own counterfactual, its source
            match="",  # draw replacements only from prompts of the same relation, or length
            interactions=False,  # also every pair of what is ablated, together
            cascade=0,  # cuts one after another: the strongest attention, then what repaired most, and so on
        ),
        readout=dict(
            target="auto",  # the token whose logit is read: top (the most likely next), answer, a token's text
            # (" Paris"); auto: the answer of prompts that have a foil, else top
            foil="auto",  # the token whose logit is subtracted: foil (the prompt's own), a token's text, "" for none;
            # auto: the foil of prompts that have one
            metrics="",  # any of log_probability, kl, rank, top_changed: of the whole distribution
            responders="layers",  # or heads: also what each attention head changes
        ),
        seed=0,  # of every draw: prompts under a limit, replacements, noise, bootstrap
        rows=0,  # rows of a block, moved at once on a device; 0: 512 on a CPU, 16,384 on an accelerator
        memory=0.0,  # GB of each device that may be used; 0: what is free. Layers that do not fit are read as needed
        mesh=dict(
            data=0,  # devices that each take other prompts; 0: all there are
            model=1,  # devices that share a copy of the model, where one cannot hold it
        ),
        identity_tolerance=1e-4,  # logits that the effects' identity may be off by, before the run stops
        non_finite=0.01,  # share of interventions whose values may be no numbers, before the run stops
        bootstrap=1000,  # resamples behind each interval
        example="",  # prompt_id for the single-prompt figure, among those picked by how much is repaired
    )
