"""What a checkpoint folder is, what is wrong with it, and what it needs: the logic behind `diptych doctor`."""

from diptych.doctor.diagnosis import Diagnosis, examine
from diptych.doctor.hardware import fleet, machine, plans, released
from diptych.doctor.memory import DocumentSize, Memory, Sizes, estimate
from diptych.doctor.scale import Fleet, Plan, plan
from diptych.doctor.terminal import render, render_machine, render_plans

__all__ = [
    "Diagnosis", "DocumentSize", "Fleet", "Memory", "Plan", "Sizes", "estimate", "examine", "fleet", "machine", "plan", "plans", "released",
    "render", "render_machine", "render_plans",
]  # fmt: skip
