"""``python -m lora_fx`` is the command ``lora-fx``."""

from lora_fx.cli import main

main()
