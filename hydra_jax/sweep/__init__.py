"""A sweep of a model over prompts: its plan, clean pass, ablations and cost; knows nothing of how results are shown."""
