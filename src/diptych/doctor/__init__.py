"""What a checkpoint folder is, what is wrong with it, and what it needs: the logic behind `diptych doctor`."""

from diptych.doctor.diagnosis import Diagnosis, examine
from diptych.doctor.hardware import machine
from diptych.doctor.memory import DocumentSize, Memory, Sizes, estimate
from diptych.doctor.terminal import render, render_machine

__all__ = ["Diagnosis", "DocumentSize", "Memory", "Sizes", "estimate", "examine", "machine", "render", "render_machine"]
