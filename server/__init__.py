"""Everything with a socket or a person behind it: the OpenAI-compatible API and the `ram` command."""
