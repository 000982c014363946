"""Makes the embedded demo: its base model, its instruction data and its benchmark items. From a checkout only."""
