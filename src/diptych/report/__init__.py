"""Self-contained HTML pages: every document a model wrote, its pictures and its rewards, in one file."""

from diptych.report.demo import demo_page
from diptych.report.pages import run_page

__all__ = ["demo_page", "run_page"]
