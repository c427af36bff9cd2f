"""Residual alignment by importance sampling: the method, the engine, the aligners' life, their training.

Usable as a library; knows nothing of HTTP.
"""

__version__ = "0.1.0"
