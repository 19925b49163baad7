"""Sources of weights: files, directories, the Hub, training runs; it knows nothing of what is computed with them."""
