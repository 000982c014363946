"""How a model with several adapters answers the items of a benchmark."""
