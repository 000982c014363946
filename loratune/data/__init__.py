"""From the user's files to tokenised examples: read, split without a leak, rendered as prompts, laid out in batches."""
