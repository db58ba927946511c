"""Loads a Janus of about 150 MB and prints the size of its weights, the peak and the final growth of anonymous memory, in MB."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

from toy_checkpoints import make_janus
from transformers import JanusForConditionalGeneration

from diptych.models import load_model


def anonymous_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def make_large(folder: Path) -> None:
    """The toy with wider layers, in several shards."""
    make_janus(folder)
    config = JanusForConditionalGeneration.config_class.from_pretrained(folder)
    config.text_config.num_hidden_layers, config.text_config.intermediate_size = 8, 24_000
    JanusForConditionalGeneration(config).save_pretrained(folder, max_shard_size="40MB")


if __name__ == "__main__":
    target = Path(sys.argv[1]) / "large"
    if len(sys.argv) == 2:  # made in another process, so that its memory does not count
        import subprocess

        subprocess.run([sys.executable, __file__, sys.argv[1], "make"], check=True)
        (target / "model.safetensors").unlink()  # of the toy; the shards are what is loaded
        load_model(target.parent / "small")  # imports and allocator are warm
        seen, done = [anonymous_mb()], threading.Event()

        def watch() -> None:
            while not done.is_set():
                seen.append(anonymous_mb())
                time.sleep(0.002)

        watcher = threading.Thread(target=watch)
        watcher.start()
        model = load_model(target)
        done.set()
        watcher.join()
        size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
        print(size, max(seen) - seen[0], anonymous_mb() - seen[0])
    else:
        make_large(target)
        make_janus(target.parent / "small")
