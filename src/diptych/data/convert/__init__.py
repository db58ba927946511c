"""Published data sets to records: one short file for each source, one job that writes them all.

To add a source: a file with `read(options, problems)` that yields a `RawRecord` for each record and reports what it passes over, and one
line in `KINDS`. Everything else (pictures, exclusion, duplicates, resuming, the report) is written once, in `job.py`.
"""

from diptych.data.convert import activitynet, comm, emova, genhowto, journeydb, messages, openstory, vist, wikihow
from diptych.data.convert.job import run
from diptych.data.convert.raw_record import Kind, Message, Options, RawRecord

UNKNOWN = "unknown: see the source"
KINDS: dict[str, Kind] = {
    "messages": Kind(messages.read, UNKNOWN, "the ecosystem's messages: JSONL, JSON, parquet, WebDataset tar"),
    "activitynet": Kind(activitynet.read, "other: see ActivityNet; videos belong to their authors", "ActivityNet Captions and its videos"),
    "genhowto": Kind(genhowto.read, "other: see ChangeIt; videos belong to their authors", "GenHowTo's public triplets and their videos"),
    "openstory": Kind(openstory.read, "cc-by-4.0 (annotations); frames belong to their authors", "OpenStory++ stories and their frames"),
    "journeydb": Kind(journeydb.read, "JourneyDB terms: non-commercial research, no redistribution", "JourneyDB, captions to pictures"),
    "emova": Kind(emova.read, "apache-2.0", "EMOVA's image-text part, and LLaVA-style JSON"),
    "vist": Kind(vist.read, UNKNOWN, "VIST, story in sequence, and its photographs"),
    "comm": Kind(comm.read, UNKNOWN, "CoMM and its downloaded pictures"),
    "wikihow": Kind(wikihow.read, "cc-by-nc-sa-3.0; single pictures differ", "wikiHow as VisualHow or VGSI, and its downloaded pictures"),
}

__all__ = ["KINDS", "Kind", "Message", "Options", "RawRecord", "run"]
