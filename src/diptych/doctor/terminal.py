"""A diagnosis and a machine for the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from diptych.doctor.diagnosis import TOTAL, Diagnosis
from diptych.doctor.hardware import REFERENCE_MODES
from diptych.doctor.memory import USABLE, DocumentSize
from diptych.doctor.scale import Fleet, Link, Plan

_TERMS = {
    "weights": "weights", "gradients": "gradients", "optimizer": "Adam", "kv_cache": "KV cache", "activations": "activations",
    "logits": "logits", "total": "total",
}  # fmt: skip
_MEANING = {"sampling": "sampling", "lora": "LoRA", "qlora": "QLoRA", "full": "full GRPO"}
_GPU_TERMS = {
    "weights": "weights", "frozen": "frozen", "moments": "Adam", "reference": "copy", "gathered": "gathered", "kv_cache": "KV cache",
    "drawing": "logits", "sampling": "sampling", "gradients": "gradients", "units": "gathered", "activations": "activ.",
    "training": "training",
}  # fmt: skip
_PEAKS = ("sampling", "training")
_WAYS = {"full": "full", "lora": "LoRA", "lora_shard": "LoRA, sharded", "qlora": "QLoRA"}
_WARNING = "warning: "


def render(diagnosis: Diagnosis) -> RenderableType:
    """Facts, memory, then what is wrong and what to do."""
    parts: list[RenderableType] = [_facts(diagnosis)]
    if diagnosis.scale is not None:
        parts += [Text(), *_too_long(diagnosis), _plan(diagnosis.scale)]
    elif diagnosis.memory is not None:
        parts += [Text(), _memory(diagnosis)]
    parts += [Text(), _verdict(diagnosis)]
    return Group(*parts)


def render_machine(found: dict[str, Any]) -> RenderableType:
    """What `machine` returns."""
    table = _grid()
    table.add_row("python, torch", f"{found['python']}, {found['torch']}")
    table.add_row("transformers, peft", f"{found['transformers']}, {_or_missing(found['peft'])}")
    table.add_row("bitsandbytes", found["bitsandbytes"] or "[yellow]not installed[/] (QLoRA needs it: pip install 'diptych\\[gpu]')")
    ram = "" if found["ram_gib"] is None else f", {found['ram_gib']:.0f} GiB memory"
    table.add_row("processor", f"{escape(found['cpu'])}, {found['cpu_cores']} cores{ram}")
    for gpu in found["gpus"]:
        table.add_row("GPU", f"{escape(gpu['name'])}, {gpu['gib']:.0f} GiB, bf16 {_yes(gpu['bf16'])}")
    if not found["gpus"]:
        table.add_row("GPU", "[yellow]none[/]")
    table.add_row("packaged demo", _yes(found["demo"]) + " (diptych demo)")
    models = Table(title="Memory in GiB that released checkpoints need on one GPU", title_justify="left", box=None, padding=(0, 2, 0, 0))
    models.add_column("model", style="bold")
    models.add_column("pictures", justify="right")
    for mode in REFERENCE_MODES:
        models.add_column(_MEANING[mode], justify="right")
    for name, needs in found["models"].items():
        models.add_row(name, str(needs["num_images"]), *(_need(needs[mode]["gib"], needs[mode]["fits"]) for mode in REFERENCE_MODES))
    return Group(table, Text(), models, Text(), Text(_legend(bool(found["gpus"])), style="dim"))


def render_plans(found: dict[str, Plan]) -> RenderableType:
    """What `plans` returns: of one size in full, of several the ways that fit, and which is chosen."""
    if len(found) == 1:
        (one,) = found.values()
        return _plan(one)
    some = next(iter(found.values()))
    table = Table(title=f"Peak in GiB on each of {_fleet(some.fleet)}", title_justify="left", box=None, padding=(0, 1, 0, 0))
    for name in ("model", "pictures", *_WAYS.values(), "choose", "micro-batch", "GB within", "GB between"):
        table.add_column(name, justify="left" if name in ("model", "choose") else "right", no_wrap=True)
    settings = _grid()
    for name, plan in found.items():
        ways = [plan.ways.get(way) for way in _WAYS]
        peaks = ["" if way is None else f"{_amount(way.memory.total)} {_yes(way.fits, 'red')}" for way in ways]
        row = [name, str(plan.document.num_images), *peaks]
        if plan.choice is None:
            table.add_row(*row, "[red]nothing fits[/]")
            continue
        way = plan.ways[plan.choice]
        sent = way.traffic.sampling + way.traffic.scoring + way.traffic.update
        table.add_row(*row, _WAYS[plan.choice], str(way.micro_batch_size), _sent(sent.within), _sent(sent.between))
        settings.add_row(name, way.settings)
    sentence = (
        f"{_documents(some.document, pictures=False)}. yes: fits, at most {USABLE:.0%} of a GPU's memory. GB: what each GPU sends in one "
        "step, sampling, scoring and update together, within its machine and between machines."
    )
    return Group(table, Text(), settings, Text(), Text(f"{sentence} {some.counted} {some.sent}", style="dim"))


def _plan(plan: Plan) -> RenderableType:
    unit, times = ("GiB", 1) if max(way.memory.total for way in plan.ways.values()) >= 0.1 else ("MiB", 1024)
    title = f"Memory in {unit} on each of {_fleet(plan.fleet)}: {_documents(plan.document)}"
    memory = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    terms = {term: name for term, name in _GPU_TERMS.items() if plan.kl or term != "reference"}
    memory.add_column("", no_wrap=True)
    for term, name in terms.items():
        memory.add_column(name, justify="right", style="bold" if term in _PEAKS else "")
    memory.add_column(f"fits {plan.fleet.gpu_gib:.0f}?", justify="right")
    title = "GB that each GPU sends, within its machine + between machines"
    sent = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("", "sampling phase", "scoring", "update", "micro-batches of"):
        sent.add_column(name, justify="right" if name else "left")
    for name, way in plan.ways.items():
        memory.add_row(_WAYS[name], *(_amount(times * getattr(way.memory, term)) for term in terms), _yes(way.fits, "red"))
        parts = (way.traffic.sampling, way.traffic.scoring, way.traffic.update)
        sent.add_row(_WAYS[name], *(_link(part) for part in parts), str(way.micro_batch_size))
    if plan.choice is None:
        choice = Text("Nothing fits. Fewer or shorter documents together, or GPUs with more memory.", style="red")
    else:
        choice = Text(f"Choose {_WAYS[plan.choice]}: {plan.ways[plan.choice].settings}", style="green")
    judged = (
        "Columns up to the bold one are there together: what is always there, and what sampling or training adds. It fits if the larger is "
        f"at most {USABLE:.0%} of a GPU's memory."
    )
    return Group(memory, Text(), sent, Text(), choice, Text(), Text(f"{judged} {plan.counted} {plan.sent}", style="dim"))


def _fleet(fleet: Fleet) -> str:
    machines = f"{fleet.nodes} machines of {fleet.gpus}" if fleet.nodes > 1 else "one machine"
    shard = f", a copy on {fleet.shard}" if fleet.processes > 1 else ""
    return f"{fleet.processes} GPU{'s' * (fleet.processes > 1)} of {fleet.gpu_gib:.0f} GiB ({machines}{shard})"


def _documents(document: DocumentSize, pictures: bool = True) -> str:
    some = f"{document.num_images} picture{'s' * (document.num_images != 1)} and " if pictures else ""
    return f"{document.rows} documents of {some}{document.text_tokens} text tokens on each GPU"


def _sent(count: float) -> str:
    gigabytes = count / 1e9
    return "0" if count == 0 else f"{gigabytes:.2g}" if gigabytes < 1 else f"{gigabytes:.1f}" if gigabytes < 10 else f"{gigabytes:.0f}"


def _link(link: Link) -> str:
    return f"{_sent(link.within)} + {_sent(link.between)}"


def _facts(diagnosis: Diagnosis) -> Table:
    table = _grid()
    table.add_row("model", escape(diagnosis.source))
    if diagnosis.folder not in (None, diagnosis.source):
        table.add_row("folder", escape(str(diagnosis.folder)))
    if diagnosis.adapter is not None:
        adapter = diagnosis.adapter
        full = f", in full: {', '.join(adapter.train_in_full)}" if adapter.train_in_full else ""
        loaded = "4 bits" if adapter.load_in_4bit else adapter.dtype
        table.add_row("adapter", escape(f"rank {adapter.rank}, alpha {adapter.alpha}, {_short(adapter.parameters)} parameters{full}"))
        table.add_row("its base", escape(f"{adapter.base} ({loaded})"))
    if diagnosis.family is not None:
        table.add_row("family", diagnosis.family)
    if diagnosis.parameters is not None:
        parts = [f"{_short(count)} {name}" for name, count in diagnosis.parameters.items() if name != TOTAL and count]
        table.add_row("parameters", f"[bold]{_short(diagnosis.parameters[TOTAL])}[/]: {', '.join(parts)}")
    if diagnosis.dtypes is not None:
        table.add_row("stored as", ", ".join(f"{kind} ({_short(count)} numbers)" for kind, count in diagnosis.dtypes.items()))
    if (a := diagnosis.architecture) is not None:
        kv = f", {a['kv_heads']} for keys and values" if a["kv_heads"] != a["heads"] else ""
        table.add_row("architecture", f"{a['layers']} layers of {a['hidden_size']}, {a['heads']} heads{kv}")
        table.add_row("", f"context {a['context']}, vocabulary {a['vocab_size']}")
    if (i := diagnosis.image) is not None:
        codes = f" of {i['depth']} codes" if i["depth"] > 1 else ""
        pixels, length = f"{i['pixel_size']} x {i['pixel_size']} pixels", f"{i['length']} in the sequence"
        table.add_row("a picture", f"{pixels}, {i['positions']} positions{codes} out of {i['codebook_size']}; {length}")
        drawn = "" if diagnosis.decodes else "; [yellow]codes cannot be decoded[/]"
        table.add_row("", f"in prompts read as {diagnosis.prompt_pictures}{drawn}")
    if diagnosis.special_tokens is not None:
        tokens = [f"{name} {number} {escape(token)}" for name, (number, token) in diagnosis.special_tokens.items()]
        table.add_row("special tokens", ", ".join(tokens))
    if (d := diagnosis.defaults) is not None:
        image = [f"guidance {d['guidance_scale']:g}", *_cuts(d["image_top_k"], d["image_top_p"])]
        text = [f"temperature {d['text_temperature']:g}", *_cuts(d["text_top_k"], d["text_top_p"])]
        table.add_row("sampled with", f"pictures: {', '.join(image)}; text: {', '.join(text)}")
    if diagnosis.lora_targets is not None:
        table.add_row("LoRA", f"{diagnosis.lora_targets} matrices")
    return table


def _memory(diagnosis: Diagnosis) -> RenderableType:
    assert diagnosis.memory is not None
    assert diagnosis.document is not None
    assert diagnosis.architecture is not None
    document = diagnosis.document
    rows = int(document["num_prompts"]) * int(document["num_generations"])
    unit, times = ("GiB", 1) if max(memory.total for memory in diagnosis.memory.values()) >= 0.1 else ("MiB", 1024)
    size = f"{rows} documents of {document['num_images']} pictures and {document['text_tokens']} text tokens"
    title = f"Memory in {unit} on one GPU: {size}"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("", style="bold", no_wrap=True)
    for term, name in _TERMS.items():
        table.add_column(name, justify="right", style="bold" if term == "total" else "")
    kinds = {(gpu.name, gpu.gib): index for index, gpu in enumerate(diagnosis.gpus)}  # equal ones once
    for _, gib in kinds:
        table.add_column(f"fits {gib:.0f}?", justify="right")
    for mode, memory in diagnosis.memory.items():
        fits = [_yes((diagnosis.fits or {})[mode][index], "red") for index in kinds.values()]
        table.add_row(_MEANING[mode], *(_amount(times * getattr(memory, term)) for term in _TERMS), *fits)
    present = ", ".join(f"{name} ({gib:.0f} GiB)" for name, gib in kinds)
    notes = [Text(f"{_legend(bool(kinds))}{f' Here: {present}.' if present else ''}", style="dim")]
    return Group(table, *_too_long(diagnosis), *notes)


def _too_long(diagnosis: Diagnosis) -> list[Text]:
    if diagnosis.document is None or diagnosis.architecture is None or diagnosis.document["fits"]:
        return []
    positions, context = diagnosis.document["positions"], diagnosis.architecture["context"]
    sentence = f"Such a document takes {positions} positions, more than the context of {context}: give it fewer pictures."
    return [Text(sentence, style="yellow")]


def _verdict(diagnosis: Diagnosis) -> RenderableType:
    if not diagnosis.problems:
        return Text("No problems found. Values of weights were not read.", style="green")
    count = len(diagnosis.problems)
    table = Table.grid(padding=(0, 1))
    for number, problem in enumerate(diagnosis.problems, start=1):
        warns = problem.startswith(_WARNING)
        style = "yellow" if warns else "red"
        table.add_row(Text(f"{number}.", style=f"bold {style}"), Text(problem, style=style))
    kind, style = ("problem", "bold red") if any(not p.startswith(_WARNING) for p in diagnosis.problems) else ("warning", "bold yellow")
    return Group(Text(f"{count} {kind}{'s' * (count > 1)}:", style=style), table)


def _grid() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    return table


def _cuts(top_k: float | None, top_p: float | None) -> list[str]:
    return [*([f"top-k {top_k:g}"] if top_k else []), *([f"top-p {top_p:g}"] if top_p not in (None, 1) else [])]


def _short(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def _amount(value: float) -> str:
    return "" if value == 0 else "<0.01" if value < 0.01 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _need(gib: float, fits: bool | None) -> str:
    return _amount(gib) if fits is None else f"{_amount(gib)} {'[green]fits[/]' if fits else '[red]too large[/]'}"


def _yes(value: bool, otherwise: str = "yellow") -> str:
    return "[green]yes[/]" if value else f"[{otherwise}]no[/]"


def _or_missing(value: str | None) -> str:
    return value or "[yellow]not installed[/]"


def _legend(gpu: bool) -> str:
    judged = f"It fits if it is at most {USABLE:.0%} of a GPU's memory." if gpu else "No GPU here to compare with."
    return f"Estimates, training by GRPO. A total counts what is there at the same time: a run samples first, then trains. {judged}"
