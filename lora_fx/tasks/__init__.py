"""Models of transformers by their tasks: which class, which inputs, which call is exported.

This room alone imports transformers, and only when a directory is read.
"""

from lora_fx.tasks.table import TASKS, Task

__all__ = ["TASKS", "Task"]
