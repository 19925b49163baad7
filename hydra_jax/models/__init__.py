"""The decoder as pure functions of its parameters, and nothing else: no text, files, devices or ablations."""
