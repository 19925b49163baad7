"""The measurements of `python -m launch.benchmark`, a module each."""
