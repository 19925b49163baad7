"""Text on its way to a model: prompts, tokens and their padding; knows no weights, devices or results."""
