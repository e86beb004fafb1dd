"""Checkpoints of models whose own code is not in transformers, under the names of a class that is."""

from splitveil.checkpoints.chatglm import CONFIG, convert_adapter, convert_model

__all__ = ["CONFIG", "convert_adapter", "convert_model"]
