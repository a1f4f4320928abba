"""Verifiers: the API an author reads, the worker, isolation and the built-ins."""
