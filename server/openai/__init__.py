"""OpenAI's vocabulary: what clients say and hear, and its translation into the core's words."""
