"""Where weights come from: files, directories, the Hub, training runs; knows nothing of what is computed with them."""
