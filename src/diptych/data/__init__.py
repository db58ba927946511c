"""Training records: what they look like, where they come from, and how sources are mixed."""

from diptych.data.conversation import Record
from diptych.data.mixture import Mixture
from diptych.data.problems import Problem, Problems
from diptych.data.records import open_source

__all__ = ["Mixture", "Problem", "Problems", "Record", "open_source"]
