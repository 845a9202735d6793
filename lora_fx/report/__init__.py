"""What there is to look at: a page on an export, a layer drawn, two adapters or files compared."""

from lora_fx.report.around import Drawing, draw
from lora_fx.report.diff import Differences, diff
from lora_fx.report.page import write_page

__all__ = ["Differences", "Drawing", "diff", "draw", "write_page"]
