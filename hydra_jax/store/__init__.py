"""Results on disk: the store, its sums and metadata, files whole or absent; knows nothing of how effects are made."""
