"""What `diptych pretrain` makes: a world, a model of a size, and how many steps each part takes. The standard one is what is packaged."""

from __future__ import annotations

import dataclasses

from diptych.models.storyboard.model import StoryboardConfig, build_tokenizer
from diptych.worlds.storyboard.conversations import TURNS, turns_of
from diptych.worlds.storyboard.language import vocabulary
from diptych.worlds.storyboard.world import World, world_named

PARTS = ("storyboard", "image_text", "text_critic", "next_picture")


@dataclasses.dataclass(frozen=True)
class Lesson:
    """Rows of `length` positions, filled with turns of `kinds`."""

    kinds: tuple[str, ...]
    rows: int
    length: int


@dataclasses.dataclass(frozen=True)
class Course:
    """`facts` are learned first, then `words`; then `alone` and `amid` other turns in alternation."""

    facts: Lesson
    words: Lesson
    alone: Lesson
    amid: Lesson


STANDARD_COURSE = Course(
    facts=Lesson(("facts",), 12, 64),
    words=Lesson(("question", "event", "tell", "facts"), 40, 64),
    alone=Lesson(tuple(TURNS), 40, 64),
    amid=Lesson(tuple(TURNS), 18, 192),
)


def recall_course(world: World, rows: int, picture: int) -> Course:
    """For a world whose pictures are looked up. `rows`: of a batch with single turns; `picture`: positions of a picture."""
    kinds = tuple(turns_of(world))
    return Course(
        facts=Lesson(("facts",), max(2, rows // 2), 2 * picture),
        words=Lesson(("question", "event", "look_up", "recount", "facts"), rows, 3 * picture),
        alone=Lesson(kinds, rows, 3 * picture),
        amid=Lesson(kinds, max(2, rows // 2), 8 * picture),
    )


@dataclasses.dataclass(frozen=True)
class Setting:
    """world, telling: by name (`worlds.storyboard.world`). sizes: fields of `StoryboardConfig`; the others have their defaults.
    codec_steps, base_steps: optimizer steps; the packaged ones were made with the standard setting's. reward_steps: of the learned rewards,
    which are for the standard world alone."""

    world: str = "standard"
    telling: str = "full"
    sizes: dict[str, int | tuple[int, ...]] = dataclasses.field(default_factory=dict)
    codec_steps: int = 4000
    base_steps: int = 4500
    reward_steps: tuple[tuple[str, int], ...] = ()
    course: Course = STANDARD_COURSE

    @property
    def parts(self) -> tuple[str, ...]:
        return ("storyboard", *dict(self.reward_steps))

    @property
    def told(self) -> World:
        return world_named(self.world, self.telling)

    def config(self) -> StoryboardConfig:
        """Raises ValueError where the model's pictures are not those of the world."""
        tokenizer = build_tokenizer(vocabulary(self.told))
        config = StoryboardConfig(vocab_size=tokenizer.get_vocab_size(), world=self.world, **self.sizes)  # type: ignore[arg-type]
        check_geometry(config, self.told)
        return config


def check_geometry(config: StoryboardConfig, world: World) -> None:
    """Raises ValueError where a model's pictures are not as large as those of its world, or its tokenizer cannot cut them."""
    side = config.grid * config.patch
    if side != world.pixels:
        raise ValueError(
            f"grid {config.grid} x patch {config.patch} makes pictures of {side} pixels a side, those of the world {config.world!r} have "
            f"{world.pixels}; choose a grid and a patch with that product"
        )
    if config.patch % 8:
        raise ValueError(f"patch is {config.patch}; the image tokenizer halves it three times, so it is a multiple of 8")


SETTINGS: dict[str, Setting] = {
    "standard": Setting(reward_steps=(("image_text", 1500), ("text_critic", 2000), ("next_picture", 2500))),
    "large": Setting(
        world="large", telling="terse", codec_steps=12_000, base_steps=20_000, course=recall_course(world_named("large", "terse"), 24, 38),
        sizes={
            "grid": 6, "patch": 16, "depth": 2, "levels": (4, 4, 4, 4, 4, 4), "hidden_size": 192, "num_layers": 6, "num_heads": 6,
            "intermediate_size": 512, "max_positions": 640,
        },
    ),
    "large_100m": Setting(
        world="large_128", telling="terse", codec_steps=20_000, base_steps=40_000,
        course=recall_course(world_named("large_128", "terse"), 32, 66),
        sizes={
            "grid": 8, "patch": 16, "depth": 2, "levels": (4, 4, 4, 4, 4, 4), "hidden_size": 768, "num_layers": 12, "num_heads": 12,
            "intermediate_size": 2304, "depth_hidden_size": 256, "depth_layers": 3, "max_positions": 1024, "codec_width": 96,
        },
    ),
}  # fmt: skip


def setting_named(name: str) -> Setting:
    """Raises ValueError for a setting that there is not."""
    if name not in SETTINGS:
        raise ValueError(f"there is no setting {name!r} to pretrain; the settings are {', '.join(SETTINGS)}")
    return SETTINGS[name]


assert SETTINGS["standard"].parts == PARTS
