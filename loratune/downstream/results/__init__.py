"""Answers and scores as they are kept, and what they say."""
