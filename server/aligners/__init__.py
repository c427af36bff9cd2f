"""The aligners of a running server: found, verified, loaded, promoted, lent to requests and given back."""
