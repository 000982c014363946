"""The benchmarks: items with prompts, and a verdict on each answer."""
