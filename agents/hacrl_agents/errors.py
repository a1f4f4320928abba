"""What can go wrong on an agent's side. Messages are sentences: what happened, what to do."""

from __future__ import annotations


class AgentError(Exception):
    """Base of the agents' own errors. The command line prints the message and exits with 1."""


class ModelLoadError(AgentError):
    """A model or tokenizer cannot be loaded. Give a folder that `save_pretrained` wrote, or a hub name."""


class SettingsError(AgentError):
    """Two settings contradict each other, or one is out of its range."""


class PromptTooLongError(AgentError):
    """A prompt leaves no room for an answer in the model's context."""


class CheckpointError(AgentError):
    """A checkpoint is damaged or belongs to another run. Use another folder, or remove it."""


class TrainingDivergedError(AgentError):
    """A gradient is not finite. The last checkpoint stands; go on from it with a lower learning rate."""


class EvaluationFileError(AgentError):
    """A file of held-out prompts cannot be read. Every line is an object with prompt and reference."""
