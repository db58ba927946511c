"""One trial in a process of its own: `python -m diptych.ablation.worker ROOT KEY`, started by `runner`.

It ends at once when the process that started it is gone: its standard input is then closed.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

from diptych.ablation.trials import Trial, run_trial


def main(root: Path, key: str) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    trial = Trial(json.loads((root / "cells" / key / "settings.json").read_text()))
    run_trial(root, trial, lambda done, total, words: print(f"{done}/{total} {words}", flush=True))


def _end_with_parent() -> None:
    # The unbuffered descriptor: a reader inside sys.stdin's lock would make a normal exit of the interpreter wait or abort.
    while os.read(0, 1024):
        pass
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
