"""The decoder, its weights and its tokenizer."""
