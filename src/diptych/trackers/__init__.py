"""Experiment trackers: metrics, settings and sampled documents of a run, sent on by threads that can neither stop nor slow the training."""

from diptych.trackers.background import Trackers
from diptych.trackers.kinds import check_installed

__all__ = ["Trackers", "check_installed"]
