"""What tests are made of: models, checkpoints, effects, commands, and ways to spoil them."""
