"""Peak memory of scoring with gradient, in chunks and with all logits at once, at two lengths and a real vocabulary.

    python benchmarks/memory.py [--quick]

Each measurement runs in a process of its own, on the CPU: growth of the peak resident set over the model and the batch. The model
has one narrow layer, so that logits are what there is. Prints a table, then one JSON line; `ratio` is the memory of all logits at once
over ours at the greater length, `limit` the size of one chunk's logits in MiB.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from _shapes import JANUS, JanusShape, random_model

from diptych.config import ImageSampling, SamplingParams
from diptych.runtime import versions
from diptych.sampling import logprobs
from diptych.tokens import TokenRow, collate

VOCABULARY = 102_400


def measure(words: int, chunk: int) -> float:
    """MiB that scoring one row of `words` text tokens and a picture adds, backward pass included."""
    shape = JanusShape(64, 96, 1, 2, VOCABULARY, 65_536, grid=8, codes=16_384, vision_width=64, vision_layers=1, codec_channels=32,
                       dtype=torch.float32)  # fmt: skip
    JANUS["narrow"] = shape
    with tempfile.TemporaryDirectory() as scratch:
        model = random_model("narrow", torch.device("cpu"), Path(scratch) / "toy")
    spec = model.image_spec
    text = TokenRow.text([1 + i % 200 for i in range(words)], 1, chosen=True, step=0)
    codes = torch.randint(spec.codebook_size, (spec.num_positions, 1), generator=torch.Generator().manual_seed(0))
    batch = collate([TokenRow.concat([TokenRow.text([1, 2, 3], 1), text, spec.row(codes, chosen=True, step=1, begin_step=0)])])
    logprobs.CHUNK_LOGITS = chunk
    params = SamplingParams(image=ImageSampling(guidance_scale=2.0))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    small = collate([TokenRow.concat([TokenRow.text([1, 2, 3], 1), TokenRow.text([5, 6], 1, chosen=True, step=0)])])
    logprobs.score(model, small, params).logprobs.sum().backward()  # allocator and libraries are warm
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    logprobs.score(model, batch, params).logprobs.sum().backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter rows")
    parser.add_argument("--one", nargs=2, type=int, metavar=("WORDS", "CHUNK"), help="one measurement, in this process")
    arguments = parser.parse_args()
    if arguments.one:
        print(measure(*arguments.one))
        return
    lengths = (512, 1024) if arguments.quick else (1024, 4096)
    chunk, whole = logprobs.CHUNK_LOGITS, 2**40
    found: dict[str, dict[int, float]] = {"in chunks": {}, "all at once": {}}
    for name, size in (("in chunks", chunk), ("all at once", whole)):
        for words in lengths:
            command = [sys.executable, __file__, "--one", str(words), str(size)]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found[name][words] = float(output.split()[-1])
    print(f"MiB added by scoring one row with gradient, vocabulary {VOCABULARY}, float32, CPU")
    print(f"  {'text tokens':<14}" + "".join(f"{words:>10}" for words in lengths) + f"{'growth':>10}")
    for name, row in found.items():
        print(f"  {name:<14}" + "".join(f"{row[words]:10.0f}" for words in lengths) + f"{row[lengths[1]] / row[lengths[0]]:9.1f}x")
    print(f"  one chunk's logits: {chunk * 4 / 2**20:.0f} MiB; all of them: {lengths[1] * VOCABULARY * 4 / 2**20:.0f} MiB")
    ratio = found["all at once"][lengths[1]] / found["in chunks"][lengths[1]]
    report = {
        "name": "memory", "ratio": ratio, "limit": chunk * 4 / 2**20, "mib": found, "vocabulary": VOCABULARY, "device": "cpu",
        "versions": versions(),
    }  # fmt: skip
    print(json.dumps(report))


if __name__ == "__main__":
    main()
