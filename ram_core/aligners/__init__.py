"""Aligners from their directories to being served: manifests, verification, sources, and the registry."""
