"""Training records: what they look like, where they come from, and how sources are mixed."""

from diptych.data.mixture import Mixture
from diptych.data.records import Record, open_source

__all__ = ["Mixture", "Record", "open_source"]
