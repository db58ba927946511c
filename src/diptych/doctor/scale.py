"""Memory and traffic of each GPU where several train together, from sizes alone: what `training/parallel.py` does, counted item by item.

Bytes a parameter, where weights are loaded in bf16:

    full         full training, `parallel.mode` shard: float32 weights (4), gradients (4) and Adam's moments (8), of which each GPU has
                 1 / shard_size; bf16 weights (2) gathered for a sampling phase, and unit by unit for a micro-batch
    lora         adapters on a whole bf16 base (2), `parallel.mode` replicate; 16 for each parameter of the adapters, float32
    lora_shard   adapters and their base (2), both in parts of 1 / shard_size, gathered in the types that they have
    qlora        adapters on a whole base whose decoder matrices are in NF4, `parallel.mode` replicate

Image tokenizer and vision encoder are whole in every process. With `optim.name` adamw_8bit the two moments take 1 byte each, and a float32
scale for 256 (arXiv:2110.02861).
"""

from __future__ import annotations

import dataclasses

from diptych.doctor.memory import GIB, USABLE, DocumentSize, Sizes

WAYS = ("full", "lora", "lora_shard", "qlora")  # in the order in which they are chosen: what trains most, then what sends least
_SHARDED = ("full", "lora_shard")
_SETTINGS = {
    "full": "--parallel.mode shard",
    "lora": "--parallel.mode replicate --lora.r 16",
    "lora_shard": "--parallel.mode shard --lora.r 16",
    "qlora": "--parallel.mode replicate --lora.r 16 --load_in_4bit true",
}
_ADAM, _ADAM_8BIT = 8.0, 2 * (1 + 4 / 256)  # bytes of the moments of a parameter
COUNTED = (
    "Counted on each GPU: its part of weights and Adam's moments, and frozen tokenizers whole; while documents are sampled all weights "
    "gathered, keys, values and logits; while they are trained on gradients, gathered layers, activations (gradient checkpointing) and "
    "logits. The peak is the larger of the two. Not counted: activations of tokenizers, rewards in the same process, the CUDA context, "
    "NCCL's buffers, gaps."
)
SENT = (
    "Sent by each GPU, and as much received, where a ring carries n bytes over k GPUs: n (k - 1) / k to gather, or to add up and scatter; "
    "twice that to add up. Sampling: one gather of all weights. Scoring: one for each micro-batch, and one more with a KL term. "
    "Update: two for each micro-batch (forward, backward), and its gradients in float32 added up and scattered within a copy; once an "
    "optimizer step they are added up over copies. Not counted: counts, norms and metrics, checkpoints."
)


@dataclasses.dataclass(frozen=True)
class Fleet:
    """`nodes` machines of `gpus` GPUs with `gpu_gib` GiB each; one process a GPU.

    shard_size: processes that hold one copy of the weights between them; None: those of one machine.
    Raises ValueError for numbers below 1, and a shard_size that does not divide the processes.
    """

    gpus: int
    gpu_gib: float
    nodes: int = 1
    shard_size: int | None = None

    def __post_init__(self) -> None:
        options = {"--gpus": self.gpus, "--nodes": self.nodes, "--shard-size": self.shard}
        for name, value in options.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; give at least 1")
        if not 0 < self.gpu_gib < float("inf"):
            raise ValueError(f"--gpu-memory is {self.gpu_gib:g}; give the GiB of one GPU, e.g. 80")
        if self.processes % self.shard:
            all_of_them = f"{self.processes} GPUs ({self.nodes} x {self.gpus})"
            raise ValueError(f"--shard-size is {self.shard}, which does not divide the {all_of_them}; choose a divisor")

    @property
    def processes(self) -> int:
        return self.gpus * self.nodes

    @property
    def shard(self) -> int:
        return self.gpus if self.shard_size is None else self.shard_size

    @property
    def copies(self) -> int:
        return self.processes // self.shard

    @property
    def gathers_leave_the_machine(self) -> bool:
        return self.nodes > 1 and self.gpus % self.shard != 0


@dataclasses.dataclass(frozen=True)
class GpuMemory:
    """GiB on each GPU.

    There always: weights, frozen, moments, reference. While sampling: gathered, kv_cache, drawing (logits). While training: gradients,
    units (gathered weights and gradients not yet added up), activations (with logits where these are at the peak). sampling, training:
    with what is there always. total: the larger of the two.
    """

    weights: float
    frozen: float
    moments: float
    reference: float
    gathered: float
    kv_cache: float
    drawing: float
    gradients: float
    units: float
    activations: float
    sampling: float
    training: float
    total: float


@dataclasses.dataclass(frozen=True)
class Link:
    """Bytes that each GPU sends: within its machine, or between machines where any link of the ring is."""

    within: float = 0.0
    between: float = 0.0

    def __add__(self, other: Link) -> Link:
        return Link(self.within + other.within, self.between + other.between)

    def __mul__(self, times: int) -> Link:
        return Link(times * self.within, times * self.between)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Of one GRPO step with one update: its sampling phase, the scoring of its rollouts, the optimizer step."""

    sampling: Link
    scoring: Link
    update: Link


@dataclasses.dataclass(frozen=True)
class Way:
    """micro_batch_size: the largest divisor of a GPU's rollouts that fits. settings: for the command line."""

    memory: GpuMemory
    traffic: Traffic
    micro_batch_size: int
    fits: bool
    settings: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """`ways` by name; `choice`: of those that fit the one that trains most, and None where none fits."""

    fleet: Fleet
    document: DocumentSize
    kl: bool
    adamw_8bit: bool
    ways: dict[str, Way]
    choice: str | None
    counted: str = COUNTED
    sent: str = SENT


def plan(
    sizes: Sizes, fleet: Fleet, document: DocumentSize, *, kl: bool = False, adamw_8bit: bool = False, four_bits: bool = True
) -> Plan:  # fmt: skip
    """What each way of training takes of a GPU.

    Args:
        document: num_prompts are those of one GPU; the step has as many for each.
        kl: the run's `beta` is not 0: full training keeps a frozen copy, and rollouts are scored once more.
        adamw_8bit: `optim.name`.
        four_bits: whether the family has a 4-bit form.
    """
    names = [name for name in WAYS if (name != "lora_shard" or fleet.shard > 1) and (name != "qlora" or four_bits)]
    ways = {name: _way(name, sizes, fleet, document, kl, adamw_8bit) for name in names}
    return Plan(fleet, document, kl, adamw_8bit, ways, next((name for name in names if ways[name].fits), None))


def _way(name: str, sizes: Sizes, fleet: Fleet, document: DocumentSize, kl: bool, adamw_8bit: bool) -> Way:
    for size in (n for n in range(document.rows, 0, -1) if document.rows % n == 0):
        memory = gpu_memory(name, sizes, fleet, document, size, kl=kl, adamw_8bit=adamw_8bit)
        if fits := memory.total <= USABLE * fleet.gpu_gib:
            break
    settings = (
        f"{_SETTINGS[name]}{f' --parallel.shard_size {fleet.shard}' if name in _SHARDED and fleet.processes > 1 else ''} "
        f"--gradient_checkpointing true --prompts_per_step {fleet.processes * document.num_prompts} "
        f"--num_generations {document.num_generations} --micro_batch_size {size}{' --optim.name adamw_8bit' if adamw_8bit else ''}"
    )
    return Way(memory, traffic(name, sizes, fleet, document.rows // size, kl=kl), size, fits, settings)


def gpu_memory(
    name: str, sizes: Sizes, fleet: Fleet, document: DocumentSize, micro_batch_size: int, *, kl: bool = False, adamw_8bit: bool = False
) -> GpuMemory:
    """Of one way, with micro-batches of so many documents. Raises ValueError for a name that is not among WAYS.

    Under `shard` the units of FSDP are the decoder layers one by one, and all else that is not frozen together (`Sizes.outer`). While a
    layer is computed it is there gathered, so is the next one, and the buffer into which that is received; its gradients are there in the
    type that it is computed in and, to be added up, in float32. All else is gathered for as long as a micro-batch lasts.
    """
    if name not in WAYS:
        raise ValueError(f"the way of training is {name!r}; allowed are {', '.join(WAYS)}")
    own, gathered, adapters = _weights(name, sizes, fleet)
    parts = fleet.shard if name in _SHARDED else 1
    trained = sizes.trained if name == "full" else adapters
    frozen, moments, gradients = sizes.frozen_bytes, (_ADAM_8BIT if adamw_8bit else _ADAM) * trained / parts, 4 * trained / parts
    reference = 2 * sizes.trained / parts + frozen if kl and name == "full" else 0
    always = own / parts + frozen + moments + reference
    kv_cache, drawing = sizes.sampling_bytes(document)
    inputs, layer, logits = sizes.scoring_bytes(document, name != "full", micro_batch_size)
    if gathered:  # units of FSDP
        outer = 2 * sizes.outer if name in _SHARDED else 0
        one = (gathered - outer) / sizes.layers
        if name == "full":
            phases = [(2 * outer + 3 * one + 3 * one, inputs + layer), (2 * outer, inputs + logits), (4 * outer, 0)]
        else:
            phases = [(outer + 3 * one + 8 * adapters / sizes.layers, inputs + layer), (outer, inputs + logits)]
    else:
        phases = [(0, inputs + layer), (0, inputs + logits)]
    units, activations = max(phases, key=sum)
    sampling, training = always + gathered + kv_cache + drawing, always + gradients + units + activations
    items = dict(
        weights=own / parts, frozen=frozen, moments=moments, reference=reference, gathered=gathered, kv_cache=kv_cache, drawing=drawing,
        gradients=gradients, units=units, activations=activations, sampling=sampling, training=training,
        total=max(sampling, training),
    )  # fmt: skip
    return GpuMemory(**{item: value / GIB for item, value in items.items()})


def _weights(name: str, sizes: Sizes, fleet: Fleet) -> tuple[int, int, int]:
    """Bytes of all weights that are not frozen tokenizers, as they are kept and as they are gathered; parameters of adapters.

    Replicated adapters of several processes are in FSDP too, on a mesh whose shards are whole: a copy of them is what is gathered.
    """
    adapters, base = sizes.lora(), 2 * sizes.trained
    if name == "full":
        return 2 * base, base, 0
    if name == "lora_shard":
        return base + 4 * adapters, base + 4 * adapters, adapters
    if name == "qlora":
        base += sizes.nf4_bytes() - 2 * sizes.linear
    return base + 4 * adapters, 4 * adapters if fleet.processes > 1 else 0, adapters


def traffic(name: str, sizes: Sizes, fleet: Fleet, micro_batches: int, *, kl: bool = False) -> Traffic:
    """Bytes that each GPU sends for a step whose rollouts are trained on in so many micro-batches, once. See `SENT`."""
    _, gathered, adapters = _weights(name, sizes, fleet)
    gradients = 4 * (sizes.trained if name == "full" else adapters)
    if name not in _SHARDED:
        return Traffic(Link(), Link(), _link(2 * _ring(gradients, fleet.processes), fleet.nodes > 1))
    gather = _link(_ring(gathered, fleet.shard), fleet.gathers_leave_the_machine)
    scatter = _link(_ring(gradients, fleet.shard), fleet.gathers_leave_the_machine)
    copies = _link(2 * _ring(gradients / fleet.shard, fleet.copies), fleet.nodes > 1)
    update = (gather * 2 + scatter) * micro_batches + copies
    return Traffic(gather, gather * (micro_batches * (2 if kl else 1)), update)


def _ring(total: float, members: int) -> float:
    return total * (members - 1) / members


def _link(sent: float, between: bool) -> Link:
    return Link(between=sent) if between else Link(within=sent)
