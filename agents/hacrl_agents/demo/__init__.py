"""The demo: two small, really different agents that learn from each other on one machine.

Here live their task, models, tokenizers and warm starts, and the command that runs it all.
"""
