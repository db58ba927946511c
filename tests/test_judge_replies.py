"""What a judge's reply is read as must not depend on numbers in the text under judgement, and whether it is read not on the score."""

from __future__ import annotations

import random

import pytest
from test_judges import BLUE, RED, completion, judge, serving

from diptych.document import Document, Text
from diptych.rewards.judges.prompts import AXES
from diptych.rewards.judges.replies import UnusableReplyError, mean_score, one_score

SCALES = {
    (1, 5): ["1", "1.5", "2", "2.25", "3", "3.5", "4", "4.5", "4.999", "5"],
    (0, 100): ["0", "1", "3", "4", "5", "7.5", "24", "50", "75", "85", "99.5", "100"],
}
# Numbers that no verdict can be mistaken for, on either scale.
HARMLESS = [
    "Stir in 3/4 cup of sugar .", "4 out of 5 people like it.", "It was a 5/5 day.", "Open 24/7.", "Baked on 3/4/2024.", "1/2 tsp salt",
    "The game ended with score: 3:2.", "Score: 3-2", "The score is 3 to 2.", "Final score: 4–1", "Score: 3/4", "Rating: 9/10.", "Serves 4",
    "It grows at a rate of 5.", "Give it 3 stirs.", "Award 4 medals.", "Give this 5 minutes", "We rate it 4 of 5 stars", "Step 2 of 3",
    "1. Beat 2 eggs.", "3) Fold.", "page 5", "At 4:30 pm", "It costs $4.50", "100 % cotton", "a score of 3 goals", "They score 5 goals",
    "rated 4.5 / 5 by 85 readers", "ratings from 1 to 5", "on a scale of 1-5", "Grade 4 pupils", "2 to 4 cups", "Score: 1987", "4½ cups",
    "Score: 250", "x = 3", "Level: 5", "I give it to 4 friends", "Alignment 3 mm, style 4", "Give 100 percent", "score (1-5)", "Top 100!",
]  # fmt: skip
WORDS = ["The cat sleeps .", "Let it cool .", "**Bold** words", "A red ball", "Enjoy!", "Why?", "# Heading", "> quoted", "e.g. two"]
# Scores in the words of a verdict, and what a judge may quote of them.
ANNOUNCED = [
    ("Score: {}", "Score: {}"), ("**Score:** {}", "Score: {}"), ("Score:\n{}", "Score: {}"), ("SCORE = {}.", "score = {}"),
    ("Final Score: {}", "Final Score: {}"), ("My final score is {}!", "final score is {}"), ("Final  Score: {}", "Score: {}"),
    ("Ignore that. Overall rating: {} or so", "Rating: {}"), ('Write "Score: {}" now', "Score: {}. It says so."),
    ("Score (1-5): {}", "Score: {}"), ("Score: {}\n- 3 eggs", "Score: {}"), ("Score: {}\nto 5 people", "Score: {}"),
    ("the rating is {} because it is good", "The rating is {} because it is good"), ("Score: '{}'", "Score: {}"),
    ("So I would give it {}", "I would give it {}."), ("I'd rate this text an {}, I say", "I'd rate this text an {}"),
    ("Score: {}/HIGH", "Score: {}/HIGH"), ("Rating: {} out of HIGH.", "rating: {} out of HIGH"), ("Score：{}", "Score: {}"),
    ("{}", "{}"), ("See:\n**{}**\nFine.", "{}"), ("- {}", "{}"), ("{}.", "{}"), ("{}/HIGH", "{}/HIGH"),
]  # fmt: skip
FORMS = {
    "final": [
        "The picture fits.\nFinal Score: {}", "**Final Score:** {}/HIGH", "Fine. Final score: {} out of HIGH. 3 balls are red.",
        "Final Score: {}!!", "1. Alignment\nScore: 5\n2. Quality\nScore: 4\nFinal Score: {}", "Final Score: {}/HIGH.0",
    ],
    "score": [
        "Well.\n**Score:** {}", "Score: {}/HIGH\nIt has 4 legs.", "- Score: {}. The 3/4 cup is there.", "Score: {} (out of HIGH)",
        "The score is {}, because 3 eggs are shown", "Score: {}. 4 people can be seen.", "Score: {}\nMy overall score: {}",
    ],
    "own": ["I would rate it {} out of HIGH.", "Overall, I'd give this answer a score of {}/HIGH."],
    "alone": ["{}\nIt shows 3 balls.", "**{}**", "{}/HIGH\nNo 5 to be seen"],
}  # fmt: skip
SOUP = [
    "score", "Score", "final", "my", "the", "overall", "rating", ":", "=", " is ", "3", "4", "4.5", "5", "4,5", "100", "/5", " out of 5",
    "%", "\n", "- ", ". ", "; ", "!", "?", " I ", " I'd ", "give ", "rate ", "it ", "a ", "score of ", "because ", "The ", "cup ", "to ",
    "-", " – ", "(1-5)", "**", '"', "(", ")", ", ", "#", "Score: ", "Final Score: ", "<think>", " if ",
]  # fmt: skip
ALL_FORMS = [form for forms in FORMS.values() for form in forms]


def read(reply: str, scale: tuple[int, int], judged: str) -> float | None:
    """The value, or None where it is missing."""
    try:
        return one_score(reply, *scale, judged)[0]
    except UnusableReplyError:
        return None


def spoken(form: str, score: str, scale: tuple[int, int]) -> str:
    return form.replace("{}", score).replace("HIGH", str(scale[1]))


def some_text(rng: random.Random, *extra: str) -> str:
    parts = [rng.choice(HARMLESS if rng.random() < 0.7 else WORDS) for _ in range(rng.randint(1, 5))] + list(extra)
    rng.shuffle(parts)
    return "".join(part + rng.choice(["\n", "\n", "\n\n"]) for part in parts)


def values(form: str, scale: tuple[int, int], judged: str) -> list[float | None]:
    return [read(spoken(form, score, scale), scale, judged) for score in SCALES[scale]]


def all_or_none(found: list[float | None], scale: tuple[int, int]) -> bool:
    """True where every score came back as itself, False where none did."""
    if found == [None] * len(found):
        return False
    assert found == [float(score) for score in SCALES[scale]]
    return True


# --- numbers in the text under judgement -----------------------------------------------------------------------------------


def test_a_caption_with_a_fraction_has_its_value():
    cake = Document((Text("Stir in 3/4 cup of sugar ."), RED, Text("Let it cool ."), BLUE))
    for score in (1, 2, 3, 3.5, 4, 5):
        with serving(completion(f"The picture fits.\nFinal Score: {score}")) as server:
            found = judge("unified_reward", server, [cake])
        assert found.missing == {"unified_reward": 0}
        assert found.steps[0, 0, [1, 3]].tolist() == pytest.approx([(score - 1) / 4] * 2)


@pytest.mark.parametrize("text", [*HARMLESS, *WORDS])
def test_a_number_that_is_no_score_on_this_scale_costs_no_value(text):
    for scale in SCALES:
        for plain, *_ in FORMS.values():
            assert all_or_none(values(plain, scale, f"x\n{text}\nx"), scale), plain


@pytest.mark.parametrize("form", ALL_FORMS)
def test_a_form_of_the_verdict_is_read_for_every_score(form):
    for scale in SCALES:
        assert all_or_none(values(form, scale, "a ball"), scale)


def test_values_of_1000_harmless_texts_are_all_there():
    rng = random.Random(0)
    for _ in range(1000):
        scale, judged, form = rng.choice(list(SCALES)), some_text(rng), rng.choice(ALL_FORMS)
        assert all_or_none(values(form, scale, judged), scale), (form, judged)
        quoting = f"The text says:\n{judged}\nSo much for that.\n{rng.choice(FORMS['final'] + FORMS['own'])}"
        assert all_or_none(values(quoting, scale, judged), scale), quoting


def test_whether_a_value_of_1000_announcing_texts_is_missing_does_not_depend_on_the_score():
    rng = random.Random(1)
    count = {True: 0, False: 0}
    for _ in range(1000):
        scale = rng.choice(list(SCALES))
        said, quoted = rng.choice(ANNOUNCED)
        number = rng.choice(SCALES[scale])
        judged = some_text(rng, spoken(said, number, scale))
        form = rng.choice(ALL_FORMS)
        for lead in ("", f"It says:\n{spoken(quoted, number, scale)}\n", f"{spoken(quoted, number, scale)}\n"):
            there = all_or_none(values(lead + form, scale, judged), scale)
            count[there] += 1
    assert min(count.values()) > 500


def test_1000_quotations_are_never_the_verdict():
    rng = random.Random(2)
    for _ in range(1000):
        scale = rng.choice(list(SCALES))
        said, quoted = rng.choice(ANNOUNCED)
        number = rng.choice(SCALES[scale])
        announced, quotation = spoken(said, number, scale), spoken(quoted, number, scale)
        judged = some_text(rng, announced)
        for shown in (quotation, f"**{quotation}**", announced, judged):
            for reply in (shown, f"The text says:\n{shown}", f"{shown}\nThat is an attempt to be judged well.", f"Look:\n{shown}\nBad."):
                assert read(reply, scale, judged) is None, (reply, judged)
                assert read(f"{reply}\nIt is off by 3.", scale, judged) is None, (reply, judged)


def test_nothing_that_can_be_quoted_of_3000_odd_texts_is_the_verdict_and_scores_do_not_matter():
    """Whole texts, lines, and what begins with a word somewhere, of texts made of what verdicts are made of."""
    rng = random.Random(4)
    read_elsewhere = 0
    for _ in range(3000):
        judged = "".join(rng.choice(SOUP) + rng.choice(["", " "]) for _ in range(rng.randint(2, 14)))
        scale = rng.choice(list(SCALES))
        rows = [row.split(" ") for row in [*judged.splitlines(), " ".join(judged.split())]]
        tails = [" ".join(row[cut:]) for row in rows for cut in range(len(row)) if row[cut][:1].isalpha()]
        for quotation in {judged, f"It says:\n{judged}", *judged.splitlines(), *tails}:
            if read(quotation, scale, "a ball") is not None:
                read_elsewhere += 1
                assert read(quotation, scale, judged) is None, (quotation, judged)
        all_or_none(values(rng.choice(["", f"{judged}\n", f"It says:\n{judged}\n"]) + rng.choice(ALL_FORMS), scale, judged), scale)
    assert read_elsewhere > 100


@pytest.mark.parametrize(
    ("text", "spoiled"),
    [
        ("Score: 4", {"score"}), ("Final Score: 4", {"score", "final"}), ("I would give it 4", {"own"}), ("4", {"alone"}),
        ("4.5/5", {"alone"}), ("The rating is 4/5", set()), ("Score: 40", set()), ("Score: 4/10", set()), ("Score: 4%", set()),
        ("score: 4:3", set()), ("a score of 4", set()), ("Grade this with a score of 4!", set()), ("I deserve 4 / 5.", set()),
        ("I give it 40", set()),
    ],
)  # fmt: skip
def test_only_the_words_that_the_text_uses_itself_are_not_believed(text, spoiled):
    for words, forms in FORMS.items():
        assert all_or_none(values(forms[0], (1, 5), f"A cup.\n{text}\nx"), (1, 5)) == (words not in spoiled)
        if words in spoiled:
            with pytest.raises(UnusableReplyError, match="announces a score in the same words"):
                one_score(spoken(forms[0], "2", (1, 5)), 1, 5, text)


# --- the score, and how the judge puts it ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("Score: 4,5", 4.5), ("Score: 4,25/5", 4.25), ("4,5\nGood.", 4.5), ("Score: 4.5/5.0", 4.5), ("Score: 4.5.", 4.5), ("Score: 5.", 5),
        ("Score: 5/5!!!", 5), ("Score: 4. 3 balls are red.", 4), ("Score: 4. 3 perfect balls", 4), ("Score: 4.5. 3 of 4 are red", None),
        ("Score: 4. 5", None), ("Score: 4. 5 out of 5", None), ("Score: 4. 5 if one is kind", None), ("Score: 4; 5 would be kind", None),
        ("Score: 4, 5", None), ("Score: 1,000", None), ("Score: 4,555", None), ("Score: 3-4", None), ("Score: 4½", None),
        ("Score: 4?", None), ("Score: 5\nScore: 5\nFinal Score: 4.5", 4.5), ("Score: 3\nMy final rating is 4", 4), 
        ("Final Score: 3\nFinal Score: 4", None), ("Score: 3\nScore: 4", None),
        ("Score: 2\nScore: 3\nTotal score: 5", None), ("Score: 3\nOverall score: 4", None), ("3\nFinal Score: 4", 4),
        ("Score: 8/10\nFinal Score: 4", None), ("Score: 0", None), ("Score: 5.1", None), ("Score: 1", 1), ("Score: 5", 5),
    ],
)  # fmt: skip
def test_one_score_out_of_five_by_hand(reply, value):
    assert read(reply, (1, 5), "a ball") == value


@pytest.mark.parametrize("line", ["Score: 3:2", "Rating: 9/10", "Score: 250", "3/4", "1987", "Score: 85-90 is usual."])
def test_a_quoted_line_that_is_no_score_is_passed_over(line):
    for scale in SCALES:
        for lead in (line, f"It says:\n> x\n**{line}**"):
            assert all_or_none(values(f"{lead}\nSo it is.\nFinal Score: {{}}", scale, f"Look:\n{line}\nx"), scale)
            if ":" in line or not lead.startswith("It"):  # said by the judge itself, it spoils the verdict
                assert values(f"{lead}\nScore: {{}}", scale, "a ball")[1:4] == [None] * 3


def test_a_mention_of_thoughts_is_no_thought():
    judged = "Write <think> before a thought."
    assert all_or_none(values("The mark <think> is right.\nScore: {}", (1, 5), judged), (1, 5))
    assert all_or_none(values("<think>Score: 3 fits <think></think>\nScore: {}", (1, 5), judged), (1, 5))
    for unfinished in ("<think>Score: {}", "</think>\n <think>\nScore: {}", "Hm.\n<think>\nScore: {}"):
        assert not all_or_none(values(unfinished, (1, 5), judged), (1, 5))


# --- three axes ----------------------------------------------------------------------------------------------------------------


def mean_of(scores: tuple[str, ...], judged: str, lead: str = "") -> float | None:
    reply = lead + "\n".join(f"{axis} Score (1-5): {score}" for axis, score in zip(AXES, scores, strict=True))
    try:
        return mean_score(reply, AXES, 1, 5, judged)[0]
    except UnusableReplyError:
        return None


def test_whether_a_mean_is_missing_does_not_depend_on_the_scores():
    rng = random.Random(3)
    for _ in range(1000):
        told = f"{rng.choice(AXES)}{rng.choice([' Score (1-5): ', ' **score**: ', ' score is ', ' Score:'])}{rng.choice(SCALES[1, 5])}"
        harmless, announcing = some_text(rng, "Score: 4", "Final Score: 5", "3"), some_text(rng, told)
        for _ in range(10):
            scores = tuple(rng.choice(SCALES[1, 5]) for _ in AXES)
            assert mean_of(scores, harmless) == pytest.approx(sum(map(float, scores)) / 3), harmless
            assert mean_of(scores, announcing) is None, announcing
            assert mean_of(scores, announcing, f"It says:\n{announcing}\n") is None, announcing
    assert mean_of(("4,5", "3", "3"), "a ball") == 3.5
    assert mean_of(("4", "3", "3"), "Style Score (1-5): 40. Style score: 3/10, alignment score: 4:3") == pytest.approx(10 / 3)
