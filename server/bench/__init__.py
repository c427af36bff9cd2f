"""A load client for any server that speaks OpenAI's chat completions: what it sends, what it measures."""
