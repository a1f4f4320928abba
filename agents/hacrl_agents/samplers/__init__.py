"""Engines that produce responses. Each returns token ids; log-probs are the trainer's job."""
