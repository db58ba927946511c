"""The packaged small model of the Storyboard world."""

from diptych.models.storyboard.model import StoryboardConfig, StoryboardModel, build_tokenizer

__all__ = ["StoryboardConfig", "StoryboardModel", "build_tokenizer"]
