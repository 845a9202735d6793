"""The main job on real input: two adapters of a sentence encoder, in every exported form."""

from lora_fx.demo.job import Result, run
from lora_fx.demo.report import table

__all__ = ["Result", "run", "table"]
