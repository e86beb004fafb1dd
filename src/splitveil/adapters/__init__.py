"""Reading PEFT adapter folders, without the base model and without importing torch or PEFT."""

from splitveil.adapters.folder import Adapter, LoraModule, load_adapter

__all__ = ["Adapter", "LoraModule", "load_adapter"]
