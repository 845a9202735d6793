"""What there is to look at: a page on an export, a layer drawn, two adapters or files compared."""

from lora_fx.report.around import draw
from lora_fx.report.page import write_page

__all__ = ["draw", "write_page"]
