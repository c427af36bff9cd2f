"""Hugging Face causal language models, unchanged: their files, their vocabulary, and KV memory in pages."""
