"""The live view of runs: a page whose curves and documents come while a training writes them."""

from diptych.listening import listen
from diptych.report.live.server import address, show

__all__ = ["address", "listen", "show"]
