"""`diptych rewards`: what there is, and what one says of a document."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diptych.cli.app import Form, app, console, say

rewards_app = typer.Typer(help="The built-in rewards: what there is, and what one says of a document.", no_args_is_help=True)
app.add_typer(rewards_app, name="rewards")


@rewards_app.command("list", epilog="Example: diptych rewards list")
def list_rewards() -> None:
    """Every built-in reward: what it judges, the values it gives, what it needs."""
    from rich.table import Table

    from diptych.rewards.base import ABOUT

    table = Table("name", "judges", "values", "needs", caption="Your own: package.module:function. See docs/how-to/rewards.md")
    for name, about in ABOUT.items():
        table.add_row(name, *about)
    console.print(table)


@rewards_app.command(
    "try",
    epilog="Example: diptych rewards try document_judge --document answer.json --prompt 'Tell the story' "
    "--option base_url=http://localhost:8000/v1 --option model=Qwen/Qwen3-VL-8B-Instruct",
)
def try_reward(
    name: Annotated[str, typer.Argument(help="a built-in reward (see `diptych rewards list`) or package.module:function")],
    document: Annotated[Path, typer.Option(help="a JSON file of message blocks, as `diptych generate --out answer.json` writes it")],
    prompt: Annotated[str, typer.Option(help="the text of the request; unused where the file holds whole messages")] = "",
    option: Annotated[list[str] | None, typer.Option(help="key=value of the reward's options; may be repeated")] = None,
    form: Form = None,
    column: Annotated[list[str] | None, typer.Option(help="key=value of a data set column, such as num_images=3; may be repeated")] = None,
) -> None:
    """What a reward says of one document: what was sent, what came back, the value of each step. Exits with 1 if a value is missing."""
    from diptych.config import RewardConfig, build
    from diptych.document import Text
    from diptych.forms import AnswerForm
    from diptych.overrides import parse_pairs
    from diptych.rewards import call_rewards, load_reward
    from diptych.rewards.base import about, check_columns, configured, option_kind
    from diptych.rewards.judges import Judge, transcript
    from diptych.rewards.scorers.base import ImageScorer

    asked, answer = transcript.read_document(document, prompt)
    options = parse_pairs("option", option or [], lambda key: option_kind(load_reward(name), key))
    columns = parse_pairs("column", column or [])
    config = build(RewardConfig, {"name": name, "options": options})
    check_columns([(config, load_reward(name))], list(columns))
    reward = configured(config, load_reward(name))
    say(about(config, load_reward(name)))
    if isinstance(reward, Judge):
        reward.listen = lambda question, reply: say(f"--- sent ---\n{transcript.sent(question)}\n--- said ---\n{transcript.said(reply)}\n")
    elif isinstance(reward, ImageScorer):
        reward.listen = lambda judged: say(f"step {judged.step + 1} (picture): raw {judged.raw:.4f} against {judged.against}")
    given = {**columns, "answer_form": form or AnswerForm.FREE, "truncated": False}
    found = call_rewards([(config, load_reward(name))], [asked], [answer], {key: [value] for key, value in given.items()})
    for j, segment in enumerate(answer):
        kind = "text" if isinstance(segment, Text) else "picture"
        value = f"{float(found.steps[0, 0, j]):.4f}".replace("nan", "missing") if found.applies[0, 0, j] else "-"
        console.print(f"step {j + 1} ({kind}): {value}")
    if found.documents_apply[0, 0]:
        console.print(f"document: {float(found.documents[0, 0]):.4f}".replace("nan", "missing"))
    if found.missing[name]:
        raise ValueError(f"{found.missing[name]:.0%} of the values are missing: {found.errors.get(name, 'not finite')}")
