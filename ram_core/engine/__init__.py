"""Continuous batching of one proposal and any number of aligners over a paged KV cache."""
