"""Diptych: post-train unified vision-language models until they write illustrated documents."""

from diptych.document import Document, Image, Text
from diptych.models import UnifiedModel, load_model

__version__ = "0.1.0"
__all__ = ["Document", "Image", "Text", "UnifiedModel", "__version__", "load_model"]
