"""What a sweep says over its prompts: statistics, findings, results; knows no models and draws nothing."""
