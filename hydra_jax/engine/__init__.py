"""The kernels over batches, devices and processes; knows no prompts' texts or results on disk."""
