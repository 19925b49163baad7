"""What `python -m launch.benchmark` measures, each on its own."""
