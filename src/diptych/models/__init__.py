"""Unified models: the adapter contract and its families."""

from diptych.models.base import UnifiedModel
from diptych.models.image_spec import ImageSpec
from diptych.models.loading import FAMILIES, PACKAGED, equip, load_model, open_policy, packaged_folder

__all__ = ["FAMILIES", "PACKAGED", "ImageSpec", "UnifiedModel", "equip", "load_model", "open_policy", "packaged_folder"]
