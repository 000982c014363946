"""A whole study: its loop, its objectives, its cost, from the description to the hand-over."""
