"""A sweep summed up over its prompts: statistics, findings, results; knows no models and draws nothing."""
