"""The kernels over batches, devices and processes; knows no prompts' texts, settings or stores."""
