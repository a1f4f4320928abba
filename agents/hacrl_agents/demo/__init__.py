"""The demo: two small, really different agents that learn from each other on one machine.

Here live their task, models, tokenizers, warm starts and held-out evaluation, and the command that runs all of
it.
"""
