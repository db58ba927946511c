"""Sampling, scoring and both trainings on a CUDA device that is not there (`cuda_stand_in`), in every family: no tensors of two devices
meet, the numbers are those of a CPU, and no step of the decode loop waits for the device."""

from __future__ import annotations

import contextlib
import copy
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_stand_in import Machine, stand_in
from family_data import SIZE, eager, params, prompts, write_records
from toy_checkpoints import MAKERS, make_emu3_5
from toy_scorers import write_clip

from diptych.config import GRPOConfig, SamplingParams, WarmupConfig, build
from diptych.document import Document, Text
from diptych.models import UnifiedModel, load_model
from diptych.rewards import base
from diptych.rewards.scorers.clip import ClipScore
from diptych.runs import read_jsonl
from diptych.sampling import batch, stream
from diptych.sampling.engine import sample
from diptych.sampling.logprobs import score
from diptych.sampling.rollout import Rollout
from diptych.tokens import AnswerForm, collate
from diptych.training.grpo import grpo
from diptych.training.warmup import warmup

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
TESTS = Path(__file__).parent
FAMILIES = ["storyboard", *MAKERS, "emu3_5"]


@pytest.fixture
def machine() -> Iterator[Machine]:
    with stand_in() as made:
        yield made


@pytest.fixture(autouse=True)
def _own_rewards(monkeypatch):
    monkeypatch.syspath_prepend(str(TESTS))
    monkeypatch.setattr(base, "_made", {})  # a reward that was made is kept, with its device


@pytest.fixture(scope="module")
def all_folders(folders, tiny_model, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("more_toys")
    tiny_model.save_pretrained(root / "storyboard")
    return {**folders, "storyboard": root / "storyboard", "emu3_5": make_emu3_5(root / "emu3_5")}


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    return write_records(tmp_path_factory.mktemp("records"))


# --- the stand-in ------------------------------------------------------------------------------------------------------

C0, C1 = torch.device("cuda:0"), torch.device("cuda:1")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda a: a + torch.ones(3), "found at least two devices: cpu, cuda:0"),
        (lambda a: a.add_(torch.ones(3)), "found at least two devices: cpu, cuda:0"),
        (lambda a: torch.tensor(1.0).add_(a.sum()), "found at least two devices: cpu, cuda:0"),
        (lambda a: a + a.to(C1), "found at least two devices: cuda:0, cuda:1"),
        (lambda a: torch.cat([a, torch.ones(1)]), "found at least two devices: cpu, cuda:0"),
        (lambda a: a.index_select(0, torch.tensor([1])), "found at least two devices: cpu, cuda:0"),
        (lambda a: a.masked_fill(torch.tensor([True, False, True]), 0), "found at least two devices: cpu, cuda:0"),
        (lambda a: torch.nn.Linear(3, 3)(a), "found at least two devices: cpu, cuda:0"),
        (lambda a: torch.nn.functional.embedding(torch.tensor([1]), a[:, None]), "found at least two devices: cpu, cuda:0"),
        (lambda a: torch.ones(3)[a.long()], "indices should be either on cpu or on the same device as the indexed tensor"),
        (lambda a: a.__setitem__(torch.tensor([0, 1]), torch.ones(2)), "found at least two devices: cpu, cuda:0"),
        (lambda a: torch.rand(2, device=C0, generator=torch.Generator()), "Expected a 'cuda' device type for generator"),
        (lambda a: a.numpy(), "Use Tensor.cpu"),
        (lambda a: np.asarray(a), "Use Tensor.cpu"),
        (lambda a: a.to("cuda:2"), "invalid device ordinal 2"),
        (lambda a: a[torch.tensor([0, 2])] + torch.where(a > 0, a, torch.tensor(0.0))[:2] + torch.tensor(1.0), None),
        (lambda a: a.__setitem__(0, torch.ones(1).copy_(a[:1])), None),
        (lambda a: torch.arange(3, device=C0) + a.new_tensor([1, 2, 3]) + torch.eye(3).cuda(), None),
    ],
)
def test_what_cuda_refuses_is_refused(machine, fault, message):
    """None: allowed."""
    a = torch.ones(3, device=C0)
    if message is None:
        fault(a)
    else:
        with pytest.raises((RuntimeError, TypeError), match=re.escape(message)):
            fault(a)


def test_times_that_the_host_waits_are_counted(machine):
    a = torch.tensor([1.0, 0.0], device=C0)
    assert [line.split()[0] for line in machine.waits] == ["upload"]
    free = [lambda: a + 1, lambda: a.sum().mul_(2), lambda: a[:1], lambda: a[0], lambda: a.to(C1), lambda: torch.full((2,), 3, device=C0)]
    free += [lambda: a.__setitem__(0, 1), lambda: a.repeat_interleave(torch.tensor([1, 2], device=C1).to(C0), output_size=3)]
    costs = [lambda: a.sum().item(), lambda: bool(a[0]), lambda: a.tolist(), lambda: a.cpu(), lambda: a.nonzero(), lambda: a[a > 0]]
    costs += [lambda: a[torch.tensor([0])], lambda: a.masked_select(a > 0), lambda: torch.equal(a, a), lambda: torch.ones(2).to(C0)]
    costs += [torch.cuda.synchronize, lambda: a.repeat_interleave(a.long()), lambda: float(a[0]), lambda: torch.unique(a)]
    counts = []
    for run in (*free, *costs):
        machine.waits.clear()
        run()
        counts.append(len(machine.waits))
    assert counts == [0] * (len(free) - 1) + [1] + [1] * len(costs)  # the last of `free` uploads its repeats


def test_autograd_and_fused_adamw_give_the_numbers_of_a_cpu(machine):
    """Tied weights stay tied, and parameters keep their identity from device to device and back."""
    plain = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.GELU(), torch.nn.Linear(3, 3))
    plain[2].weight = plain[0].weight
    moved = copy.deepcopy(plain)
    tied, inputs = moved[0].weight, torch.randn(5, 3)
    moved.to(C1)
    assert moved[2].weight is moved[0].weight is tied
    for model in (plain, moved):
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for _ in range(3):
            model(inputs.to(model[0].weight.device)).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    assert tied.device == C1
    moved.to("cpu")
    assert moved[0].weight is tied
    for a, b in zip(plain.parameters(), moved.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_graph_repeats_what_the_device_did_and_no_python(machine):
    count, seen, graph = torch.zeros(2, device=C0), [], torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seen.append(1)
        double = count * 2
        count += 1
    assert count.tolist() == [0, 0]  # recorded, not computed
    assert double.isnan().all()
    for number in range(3):
        graph.replay()
        assert double.tolist() == [2 * number] * 2  # at the same address
    assert seen == [1]
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"), torch.cuda.graph(graph):
        count.sum().item()
    with pytest.raises(RuntimeError, match=r"the graph of cuda:0, .* does not record cuda:1"), torch.cuda.graph(graph):
        torch.zeros(2, device=C1)


def elsewhere(run: Callable[[], None]) -> None:
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


def test_a_recording_forbids_other_threads_to_wait_unless_it_says_otherwise(machine):
    value, told = torch.zeros(1, device=C0), []

    def ask() -> None:
        with contextlib.suppress(RuntimeError):
            told.append(value.item())

    for mode in ("global", "thread_local"):
        with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode=mode):
            elsewhere(ask)
        told.append(mode)
    assert told == ["global", 0.0, "thread_local"]


def test_each_thread_has_a_current_device(machine):
    found = []

    def look() -> None:
        made = [
            torch.zeros(1, device="cuda"),
            torch.ones(1).to("cuda"),
            torch.tensor([1], device="cuda"),
            torch.nn.Linear(1, 1).to("cuda").bias,
        ]
        found.append([one.device for one in made])

    torch.cuda.set_device(1)
    elsewhere(look)
    look()
    assert found == [[C0] * 4, [C1] * 4]


# --- sampling and scoring ----------------------------------------------------------------------------------------------


Told = tuple[list[Rollout], torch.Tensor]


def rolled(model: UnifiedModel, settings: SamplingParams, forms: list[AnswerForm | None], group: int = 1) -> Told:
    """Documents, and what the scorer says of them."""
    asked = prompts()[:1] if model.family == "storyboard" else prompts()
    rows = [model.encode_prompt(asked[i % len(asked)], form) for i, form in enumerate(forms)]
    found = sample(model, rows, settings, num_generations=group, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return found, score(model, collate([rollout.row for rollout in found]).to(model.device), settings).logprobs.cpu()


def same(ours: list[Rollout], theirs: list[Rollout]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.row.text_ids, b.row.text_ids)
        assert torch.equal(a.row.codes, b.row.codes)
        torch.testing.assert_close(a.rollout_logprobs, b.rollout_logprobs, atol=5e-5, rtol=0)
        assert a.rollout_logprobs.device.type == a.row.text_ids.device.type == "cpu"
        for one, two in zip(a.document.images, b.document.images, strict=True):
            apart = np.asarray(one.pixels, int) - np.asarray(two.pixels, int)
            assert np.abs(apart).max() <= 1  # attention in picture decoders is another kernel


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_samples_and_scores_as_on_a_cpu(all_folders, family, monkeypatch):
    """Every form of answer, guidance with one branch and with two, on the GPU that is not the thread's own; graphs that are full."""
    monkeypatch.setattr(stream, "POSITIONS_PER_GRAPH", 7)
    model = load_model(all_folders[family], image_size=SIZE.get(family))
    cases = [
        (params(2.0), [None, AnswerForm.IMAGE, AnswerForm.TEXT, AnswerForm.TEXT_IMAGE], 2),
        (params(3.0, image_guidance_scale=1.5), [None, AnswerForm.IMAGE], 1),
    ]
    with eager(model):
        expected = [rolled(model, *case) for case in cases]
    with stand_in() as machine:
        model.to(C1)
        with eager(model):
            found = [rolled(model, *case) for case in cases]
    assert machine.num_replays > 30
    for (documents, logprobs), (others, values) in zip(expected, found, strict=True):
        assert any(rollout.document.images for rollout in documents)
        same(documents, others)
        torch.testing.assert_close(logprobs, values, atol=5e-5, rtol=0)


@pytest.mark.parametrize("fault", ["a tensor on the CPU", "a number for the host"])
def test_a_fault_in_the_decode_loop_is_seen(machine, tiny_model, monkeypatch, fault):
    """The test of the tests above and below."""
    plain = stream.Stream.select, stream.Steps._step
    if fault == "a tensor on the CPU":

        def select(self, rows, room):
            plain[0](self, rows, room)
            self.hidden = self.hidden.cpu()

        monkeypatch.setattr(stream.Stream, "select", select)
        message = "at least two devices: cpu, cuda:0"
    else:
        monkeypatch.setattr(stream.Steps, "_step", lambda self: (plain[1](self), bool(self.active.all())))
        message = "not permitted when stream is capturing"
    model = copy.deepcopy(tiny_model).to(C0)
    with pytest.raises(RuntimeError, match=message):
        rolled(model, params(), [None])


# --- the decode loop does not wait -------------------------------------------------------------------------------------


def waits_of(machine: Machine, model: UnifiedModel, settings: SamplingParams, form: AnswerForm, graphs: bool) -> Counter[str]:
    machine.waits.clear()
    row = model.encode_prompt(Document((Text("a ball"),)), form)
    sample(model, [row], settings, num_generations=3, generator=torch.Generator().manual_seed(0), graphs=graphs)
    return Counter(machine.waits)


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_code_of_a_picture_waits_for_the_device(machine, all_folders, family, graphs, monkeypatch):
    """A picture of many codes costs as many waits as one of few: with the loop cut short, the same."""
    model = load_model(all_folders[family], image_size=SIZE.get(family)).to(C0)
    drawn, plain = [], batch.Batch._draw_position
    counted = lambda *given: (drawn.append(len(machine.waits)), plain(*given))[1]  # noqa: E731
    monkeypatch.setattr(batch.Batch, "_draw_position", counted)
    waits_of(machine, model, params(2.0), AnswerForm.IMAGE, graphs)
    assert len(drawn) == model.image_spec.num_positions
    after_first = drawn[2:] if graphs else drawn[1:]  # the first position that is fed begins the one graph
    assert len(set(after_first)) == 1


@pytest.mark.parametrize("graphs", [True, False])
def test_text_waits_for_the_device_once_every_few_tokens(machine, tiny_model, graphs, monkeypatch):
    """`ASK_EVERY` tokens (8 on a GPU) for two questions: is anybody fed, who still writes. At the end three results come back."""
    model = copy.deepcopy(tiny_model).to(C0)
    plain = type(model).text_logits
    ends = torch.tensor([model.eos_id, model.image_spec.begin_id], device=C0)
    monkeypatch.setattr(type(model), "text_logits", lambda self, hidden: plain(self, hidden).index_fill(-1, ends, -1e4))
    found = []
    for length in (33, 17, 33):
        settings = build(SamplingParams, {"max_text_tokens": length, "max_images": 1})
        waits = waits_of(machine, model, settings, AnswerForm.TEXT, graphs)
        found.append(Counter({line: count for line, count in waits.items() if "outside" not in line}))
    more = found[2] - found[1]  # the first made what a model keeps on the device
    assert sum(more.values()) == 2 * 2, more  # 16 more tokens: two more times two questions
    assert all(line.startswith("aten._local_scalar_dense") for line in more)


def test_documents_of_benchmarks_have_their_shape_on_a_gpu_too(machine, tiny_model, monkeypatch):
    """`benchmarks/_shapes.py` says which token comes; a GPU is asked for a few more, after all rows have begun their pictures."""
    monkeypatch.syspath_prepend(str(TESTS.parent / "benchmarks"))
    from _shapes import documents_of

    model = copy.deepcopy(tiny_model).to(C0)
    settings = build(SamplingParams, {"max_text_tokens": 9, "max_images": 2})
    with documents_of(model, images=2, words=3):
        found = rolled(model, settings, [None])[0][0]
    ids = found.row.text_ids[found.prompt_length :].tolist()
    begins = [place for place, token in enumerate(ids) if token == model.image_spec.begin_id]
    assert (begins, ids[-1]) == ([3, 3 + 1 + len(model.image_spec.layout) + 3], model.eos_id)


# --- training ----------------------------------------------------------------------------------------------------------


def settings_of(folder: Path, out: Path, family: str, **changes) -> dict:
    return {
        "model": str(folder), "output_dir": str(out), "image_size": SIZE.get(family), "max_steps": 1, "save_steps": 1, "num_threads": 1,
        "sampling": {"max_images": 1, "max_text_tokens": 12, "image": {"guidance_scale": 2.0}}, "optim": {"lr": 1e-3}, **changes,
    }  # fmt: skip


def sources_of(family: str, records: Path) -> dict:
    return {"name": "storyboard:interleaved" if family == "storyboard" else str(records), "weight": 1}


def same_training(ours: Path, theirs: Path) -> None:
    """Metrics and moments of the last step."""
    lines, states = [], []
    for folder in (ours, theirs):
        line = read_jsonl(folder / "metrics.jsonl")[-1].items()
        lines.append({name: value for name, value in line if "seconds" not in name and "time" not in name})
        states.append(torch.load(max(folder.glob("checkpoints/*/trainer.pt")), weights_only=True)["optimizer"]["state"])
    assert lines[0] == pytest.approx(lines[1], rel=1e-4, abs=1e-5)
    assert states[0].keys() == states[1].keys()
    for one, two in zip(states[0].values(), states[1].values(), strict=True):
        torch.testing.assert_close(one["exp_avg"], two["exp_avg"], atol=float(1e-6 + 1e-4 * one["exp_avg"].norm()), rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_warms_up_as_on_a_cpu(all_folders, records, family, tmp_path):
    """With early samples, evaluation, and a second start that takes the moments from the checkpoint."""
    for device in ("cpu", "cuda:1"):
        given = {"sources": [sources_of(family, records)], "batch_size": 2, "num_eval_records": 2, "sample_steps": 2}
        settings = settings_of(all_folders[family], tmp_path / device, family, device=device, **given, eval_steps=1)
        with stand_in():
            warmup(build(WarmupConfig, settings))
            warmup(build(WarmupConfig, {**settings, "max_steps": 2}))
    same_training(tmp_path / "cpu", tmp_path / "cuda:1")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_a_grpo_step_as_on_a_cpu(all_folders, records, family, tmp_path):
    """As the second process of a machine: its GPU is `cuda:1`. With a reference of its own that is offloaded, as the moments are."""
    for device in ("cpu", "auto"):
        given = {
            "prompts": sources_of(family, records), "rewards": [{"name": "toy_rewards:per_step"}], "num_generations": 4,
            "prompts_per_step": 2, "text": {"beta": 0.01}, "image": {"beta": 0.01, "entropy_coef": 0.01},
            "offload": [] if device == "cpu" else ["reference", "optimizer"],
        }  # fmt: skip
        if family == "emu3":
            given["sampling"] = {"max_images": 1, "max_text_tokens": 6, "form": "text_image"}  # this toy hardly begins pictures
        if family != "storyboard":
            given["ptx"] = {"sources": [sources_of(family, records)], "batch_size": 2, "coef": 0.5}
        with stand_in() as machine:
            torch.cuda.set_device(1)
            model = grpo(build(GRPOConfig, settings_of(all_folders[family], tmp_path / device, family, **{"device": device, **given})))
            assert str(model.device) == ("cpu" if device == "cpu" else "cuda:1")
    assert machine.num_replays > 10
    assert read_jsonl(tmp_path / "auto" / "metrics.jsonl")[-1]["completions/mean_images"] > 0
    same_training(tmp_path / "cpu", tmp_path / "auto")


def test_rewards_in_a_thread_of_their_own_use_the_gpu_of_their_process(all_folders, tmp_path):
    """Image scorers and a likelihood with a model, in the thread whose current device is 0, while the second process trains on `cuda:1`."""
    clip, seen, plain = write_clip(tmp_path / "clip"), [], ClipScore.__call__

    def watched(self, *arguments, **named):
        seen.append((threading.current_thread().name, torch.cuda.current_device(), str(self.device)))
        return plain(self, *arguments, **named)

    rewards = [
        {"name": "toy_rewards:per_step"},
        {"name": "clip_score", "options": {"model": str(clip)}},
        {"name": "text_likelihood", "options": {"model": str(all_folders["storyboard"])}},
    ]
    with stand_in(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClipScore, "__call__", watched)
        for device in ("cpu", "auto"):
            patch.setattr(base, "_made", {})
            patch.setattr(torch.cuda, "is_available", lambda here=device: here == "auto")
            torch.cuda.set_device(1)
            given = {"rewards": rewards, "num_generations": 4, "prompts_per_step": 4, "rollout_batch_size": 1}
            given["prompts"] = sources_of("storyboard", Path())
            grpo(build(GRPOConfig, settings_of(all_folders["storyboard"], tmp_path / device, "storyboard", **given)))
    assert seen == [("MainThread", 1, "cpu")] * 4 + [("rewards", 0, "cuda:1")] * 4
    same_training(tmp_path / "cpu", tmp_path / "auto")
    line = read_jsonl(tmp_path / "auto" / "metrics.jsonl")[-1]
    assert line["rewards/clip_score/missing"] == line["rewards/text_likelihood/missing"] == 0


def test_nothing_of_the_stand_in_is_left_behind():
    with stand_in():
        kept = torch.zeros(1, device="cuda")
    with pytest.raises(AssertionError, match="outlived"):
        kept + 1
    assert not torch.cuda.is_available()
