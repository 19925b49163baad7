"""Training of matched models: with dropout and without, otherwise the same."""
