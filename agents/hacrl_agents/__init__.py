"""Reference agents: HACPO, sampling, training and the demo."""
