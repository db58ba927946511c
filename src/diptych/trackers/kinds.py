"""Trackers by name, through accelerate's tracker classes, and how each is shown documents."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL.Image

from diptych.trackers.documents import document_rows, groups_of, html_page, markdown_table, picture_grid

# What is imported, and the package that has it
MODULES = {
    "tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow", "comet_ml": "comet_ml", "swanlab": "swanlab",
    "aim": "aim", "clearml": "clearml", "dvclive": "dvclive",
}  # fmt: skip
EXTRAS = {"tensorboard": "diptych[track]", "wandb": "diptych[wandb]", "trackio": "diptych[trackio]", "mlflow": "diptych[mlflow]"}
Record = dict[str, Any]


class Run(Protocol):
    """What a tracker is told of the run."""

    @property
    def folder(self) -> Path: ...
    @property
    def project(self) -> str: ...
    @property
    def settings(self) -> Mapping[str, Any]: ...
    @property
    def id(self) -> str: ...


def check_installed(name: str) -> None:
    """Raises ValueError naming what to install."""
    if importlib.util.find_spec(MODULES[name]) is None:
        raise ValueError(
            f"report_to={name} needs a package that is not installed: pip install '{EXTRAS.get(name, name.replace('_', '-'))}'"
        )


def tracker_class(name: str) -> Any:
    """accelerate's class. Its module logs through an adapter that makes accelerate's state of the processes, and with it sets devices and
    threads, as soon as it is asked anything; here it logs without."""
    from accelerate import tracking

    tracking.logger = logging.getLogger(tracking.__name__)
    return tracking.LOGGER_TYPE_TO_CLASS[name]


class Opened:
    """A tracker that has started.

    forgets: it drops what it has of later steps when a run is resumed, so that all is sent again. id: the one that it gave the run.
    """

    forgets = False
    id: str | None = None

    def __init__(self, tracker: Any) -> None:
        self.tracker = tracker

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.tracker.log(dict(metrics), step=step)

    def documents(self, step: int, records: Sequence[Record]) -> None:
        """Nothing where the tracker has no place for them."""

    def finish(self) -> None:
        self.tracker.finish()


class _TensorBoard(Opened):
    """Event files in the run's folder: a table of texts, rewards and advantages for each group, and its pictures as one image."""

    forgets = True

    def documents(self, step: int, records: Sequence[Record]) -> None:
        for number, group in enumerate(groups_of(records), 1):
            self.tracker.log({f"documents/group {number}": markdown_table(group)}, step=step)
            grid = picture_grid(group)
            if grid is not None:
                self.tracker.log_images({f"documents/group {number}": np.asarray(grid)[None]}, step=step, dataformats="NHWC")
        self.tracker.tracker.flush()


class _Tables(Opened):
    """Weights & Biases and trackio, whose classes have the same names: a page of the documents, and a table of them with their pictures."""

    def documents(self, step: int, records: Sequence[Record]) -> None:
        module = importlib.import_module(self.tracker.name)
        columns, rows = document_rows(records)
        cells = [[module.Image(cell) if isinstance(cell, PIL.Image.Image) else cell for cell in row] for row in rows]
        page = module.Html(html_page(step, records), inject=False)
        self.tracker.log({"documents": page, "documents_table": module.Table(columns=columns, data=cells)}, step=step)


class _MLflow(Opened):
    """A page of the documents among the run's artifacts."""

    def __init__(self, tracker: Any) -> None:
        super().__init__(tracker)
        self.id = tracker.tracker.info.run_id

    def documents(self, step: int, records: Sequence[Record]) -> None:
        import mlflow

        mlflow.log_text(html_page(step, records), f"documents/step_{step}.html")


KINDS: dict[str, Callable[[Any], Opened]] = {"tensorboard": _TensorBoard, "wandb": _Tables, "trackio": _Tables, "mlflow": _MLflow}


def open_tracker(name: str, run: Run, step: int, options: Mapping[str, Any], own_id: str | None) -> Opened:
    """Starts a tracker, behind `step` where the run goes on, and tells it the settings. Raises whatever the tracker raises.

    `options`: keywords of the tracker's own start (`wandb.init` and so on). `own_id`: the id that it gave the run when it began.
    """
    label = f"{run.folder.name}-{run.id[:6]}"
    given: dict[str, dict[str, Any]] = {
        "tensorboard": {"logging_dir": run.folder, "purge_step": step + 1},
        "wandb": {"name": label, "id": run.id, "resume": "allow", "dir": str(run.folder), "settings": {"console": "off"}},
        "trackio": {"name": label, "resume": "allow", "config": dict(run.settings)},
        "mlflow": {"run_name": label, "run_id": own_id},
    }
    project = "tensorboard" if name == "tensorboard" else run.project  # here the name of a folder
    tracker: Any = tracker_class(name)(project, **{**given.get(name, {}), **options})
    tracker.main_process_only = False  # it is asked in the first process only, and need not make accelerate's state to know
    tracker.start()
    if name == "tensorboard":
        tracker.log({"settings": f"```\n{json.dumps(dict(run.settings), indent=1)}\n```"}, step=step)
    elif name != "trackio" and not (name == "mlflow" and own_id):  # mlflow refuses settings that changed
        tracker.store_init_configuration(dict(run.settings))
    return KINDS.get(name, Opened)(tracker)
