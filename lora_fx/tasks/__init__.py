"""Models of transformers by their tasks: which class, which inputs, which call is exported.

Pipelines of diffusers likewise, by their components. This room alone imports the two, and only when
a directory is read.
"""

from lora_fx.tasks.load import load
from lora_fx.tasks.model_source import ModelSource
from lora_fx.tasks.table import TASKS, Task

__all__ = ["TASKS", "ModelSource", "Task", "load"]
