"""wikiHow to records: both published layouts, what is broken in them, and that a benchmark's articles and pictures stay out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from family_data import picture
from test_data_convert import PUBLISHED, converted, texts

from diptych.data.convert.wikihow import Guide, Step

VISUALHOW, VGSI = PUBLISHED / "wikiHow_data.json", PUBLISHED / "WikihowText_data.json"


def pictures_of_visualhow(folder: Path) -> Path:
    for seed, name in enumerate(("033313_0_0", "033313_0_1", "033313_1_0", "044400_0_0")):
        path = folder / name.split("_")[0] / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(path)
    return folder


def pictures_of_vgsi(folder: Path) -> Path:
    """In each of the places where they may stand; that of step 10000798_1_1 is missing."""
    names = ("train/10000798_0_0", "train/10000798_0_2", "test/10000798_1_0", "20_0_0")
    for seed, name in enumerate(names):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(path)
    return folder


def seeds(out: Path, line: dict, count: int = 4) -> list[int]:
    """Which of the pictures above an answer shows, in order (JPEG changes a little)."""
    shown = [np.asarray(PIL.Image.open(out / block["image"]), dtype=int) for block in line["messages"][1]["content"] if "image" in block]
    return [min(range(count), key=lambda seed: np.abs(pixels - np.asarray(picture(seed), dtype=int)).mean()) for pixels in shown]


def causes(report: dict) -> dict[str, str]:
    return {item["id"]: f"{item['cause']}: {item.get('detail', '')}" for item in report["items"] if "id" in item}


def test_visualhow(tmp_path):
    _, lines = converted("wikihow", tmp_path / "out", VISUALHOW, media=pictures_of_visualhow(tmp_path / "images"))
    first, second = lines
    assert texts(first, 0) == ["Explain step by step, with pictures: How to Fold a Boat: Folding the Hull"]
    assert texts(first) == ["Fold the sheet in half.", "*", "Turn it over.", "*"]
    assert seeds(tmp_path / "out", first) == [0, 1]
    assert {key: value for key, value in first.items() if key != "messages"} == {
        "source": "wikihow", "id": "033313_0", "article_id": "033313", "category": "Hobbies and Crafts > Papercraft",
        "url": "https://www.example.org/Fold-a-Boat", "license": "cc-by-nc-sa-3.0; single pictures differ",
    }  # fmt: skip
    assert texts(second, 0) == ["Explain step by step, with pictures: How to Fold a Boat"]  # the method says the same again
    assert texts(second) == ["Let it swim.", "*"]
    assert seeds(tmp_path / "out", second) == [2]
    assert "url" not in second


def test_visualhow_broken_and_missing(tmp_path):
    folder = pictures_of_visualhow(tmp_path / "images")
    report, _ = converted("wikihow", tmp_path / "out", VISUALHOW, media=folder)
    assert report["skipped"] == {"not a record": 5, "missing picture": 1, "too few pictures": 1}
    found = causes(report)
    assert found["044400_0"] == "not a record: ValueError: 1 pictures and 2 steps; two lists of one length are needed"
    assert found["044400_1"] == f"missing picture: 044400/gone.jpg is not in {folder}"
    assert found["044400_2"] == "not a record: ValueError: a title is ' '; words are needed"
    assert "'https://pictures.example.org/../033313_0_0.jpg'; the last two parts" in found["044400_3"]
    assert found["044400_4"] == "not a record: KeyError: 'step_list'"
    assert found["044400_5"] == "too few pictures: 0"
    assert found["044400_6"].startswith("not a record: TypeError")
    with pytest.raises(ValueError, match=r"044400_0: not a record: .*--strict stops"):
        converted("wikihow", tmp_path / "strict", VISUALHOW, media=folder, strict=True)


def test_vgsi(tmp_path):
    _, lines = converted("wikihow", tmp_path / "out", VGSI, media=pictures_of_vgsi(tmp_path / "wiki_images"))
    wall, nap = lines
    assert texts(wall, 0) == ["Explain step by step, with pictures: How to Hang a Shelf: On a Wall"]
    assert texts(wall) == ["Find a wall.", "*", "Think.", "Drill holes.", "*"]  # a step that names no picture stays text
    assert seeds(tmp_path / "out", wall) == [0, 1]
    assert {key: value for key, value in wall.items() if key not in ("messages", "license")} == {
        "source": "wikihow", "id": "10000798_0", "article_id": "10000798", "category": "Home > Walls",
        "picture_license": "Creative Commons; Public Domain",
    }  # fmt: skip
    assert (nap["id"], texts(nap), seeds(tmp_path / "out", nap)) == ("20_0", ["Lie down.", "*"], [3])


def test_vgsi_broken_missing_and_twice(tmp_path):
    folder = pictures_of_vgsi(tmp_path / "wiki_images")
    report, _ = converted("wikihow", tmp_path / "out", VGSI, media=folder)
    assert report["skipped"] == {
        "not a record": 4, "broken line": 2, "duplicate id": 1, "missing picture": 1, "too few pictures": 1,
    }  # fmt: skip
    assert {item["where"].split("WikihowText_data.json:")[1]: item["cause"] for item in report["items"]} == {
        "1:method 1": "missing picture", "2:method 1": "not a record", "2:method 2": "too few pictures", "2:method 3": "not a record",
        "3:method 0": "duplicate id", "4": "broken line", "5": "not a record", "6": "not a record", "7": "broken line",
    }  # fmt: skip
    assert causes(report)["10000798_1"] == f"missing picture: 10000798_1_1.png is not in {folder}"
    assert "'../20_3_0', which is no file name" in causes(report)["20_3"]


def test_whole_steps_up_to_max_images(tmp_path):
    folder = pictures_of_vgsi(tmp_path / "wiki_images")
    _, lines = converted("wikihow", tmp_path / "one", VGSI, media=folder, max_images=1)
    assert [texts(line) for line in lines] == [["Find a wall.", "*", "Think."], ["Find a door.", "*"], ["Lie down.", "*"]]
    assert lines[0]["picture_license"] == "Creative Commons"  # of the pictures shown
    report, lines = converted("wikihow", tmp_path / "two", VGSI, media=folder, min_images=2)
    assert [line["id"] for line in lines] == ["10000798_0"]
    assert report["skipped"]["too few pictures"] == 3  # method 0 of line 2 and of line 3, and the one without any


def test_prompt(tmp_path):
    folder = pictures_of_vgsi(tmp_path / "wiki_images")
    _, lines = converted("wikihow", tmp_path / "out", VGSI, media=folder, prompt="Show me: {title}", max_records=1)
    assert texts(lines[0], 0) == ["Show me: How to Hang a Shelf: On a Wall"]
    with pytest.raises(ValueError, match=r"allowed are \{title\}"):
        converted("wikihow", tmp_path / "other", VGSI, media=folder, prompt="{goal}")


def test_a_wrong_folder_of_pictures_is_named_with_what_it_holds(tmp_path):
    (tmp_path / "wrong" / "wiki_images" / "train").mkdir(parents=True)
    (tmp_path / "wrong" / "readme.txt").touch()
    match = r"holds none of the pictures of .*The first one would be .*/10000798_0_0\.png; found there: readme\.txt, wiki_images/\. "
    with pytest.raises(ValueError, match=match):
        converted("wikihow", tmp_path / "out", VGSI, media=tmp_path / "wrong")
    for number in range(10):
        (tmp_path / "wrong" / f"{number}.jpg").touch()
    with pytest.raises(ValueError, match=r"would be .*/033313/033313_0_0\.jpg; found there: 0\.jpg, .*, 7\.jpg and 4 more\. "):
        converted("wikihow", tmp_path / "out", VISUALHOW, media=tmp_path / "wrong")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"found there: nothing\. "):
        converted("wikihow", tmp_path / "out", VISUALHOW, media=tmp_path / "empty")
    with pytest.raises(ValueError, match=r"--media is nothing; this kind needs the folder of the downloaded pictures"):
        converted("wikihow", tmp_path / "out", VISUALHOW)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('{"a": {"title": "x", "steps": []}}', r"a dict with the keys a$"),
        ('[{"title": "x", "text": "y"}]', r"a list with the keys title, text$"),
        ('{"title": "x"}\n{"title": "y"}\n', r"JSON lines with the keys title$"),
        ("[]", r"a list with no keys$"),
        ("title,text\n", r"cannot read .*\. Give the JSON file as it was published"),
    ],
)
def test_another_file_is_named_with_what_it_holds(tmp_path, content, match):
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=match):
        converted("wikihow", tmp_path / "out", path, media=tmp_path)
    with pytest.raises(ValueError, match=r"is a folder; give VisualHow's wikiHow_data\.json or VGSI's .*Found there: data\.json"):
        converted("wikihow", tmp_path / "out", tmp_path, media=tmp_path)


def test_the_layout_is_seen_from_the_content(tmp_path):
    """Not from the name, the first line alone, or how the JSON is laid out."""
    lines = VGSI.read_text().splitlines()
    (tmp_path / "a.json").write_text("\n".join(["{broken", "", *lines]))
    (tmp_path / "b.jsonl").write_text(json.dumps(json.loads(VISUALHOW.read_text())))
    _, found = converted("wikihow", tmp_path / "out", tmp_path / "a.json", media=pictures_of_vgsi(tmp_path / "wiki_images"))
    assert [line["id"] for line in found] == ["10000798_0", "20_0"]
    _, found = converted("wikihow", tmp_path / "other", tmp_path / "b.jsonl", media=pictures_of_visualhow(tmp_path / "images"))
    assert [line["id"] for line in found] == ["033313_0", "033313_1"]


@pytest.mark.parametrize(
    ("file", "listed", "kept"),
    [
        (VISUALHOW, "033313_0", ["033313_1"]),  # a problem
        (VISUALHOW, "033313_0_1.jpg", ["033313_1"]),  # a picture's name
        (VISUALHOW, "033313_0_1", ["033313_1"]),
        (VISUALHOW, "033313/033313_1_0.jpg", ["033313_0"]),
        (VGSI, "10000798", ["20_0"]),  # an article
        (VGSI, "10000798_0_2", ["20_0"]),  # a step
        (VGSI, "10000798_0_2.png", ["20_0"]),
        (VGSI, "000020", ["10000798_0"]),  # as VisualHow would write it
        (VGSI, "999", ["10000798_0", "20_0"]),
    ],
)
def test_exclusion_by_id(tmp_path, file, listed, kept):
    folder = (pictures_of_vgsi if file is VGSI else pictures_of_visualhow)(tmp_path / "pictures")
    (tmp_path / "ids.txt").write_text(f"{listed}\n")
    report, lines = converted("wikihow", tmp_path / "out", file, media=folder, exclude=[tmp_path / "ids.txt"])
    assert [line["id"] for line in lines] == kept
    assert len({item["id"] for item in report["items"] if item["cause"] == "excluded"}) == 2 - len(kept)  # 20_0 stands there twice


def test_source_ids_by_hand():
    guide = Guide("0000007_0", "", "0000007", "", "", (Step("a"), Step("b", ("x/y.jpg", "z/x/y.jpg"))))
    assert guide.source_ids() == ("0000007", "7", "000007", "x/y.jpg", "y.jpg", "y")
    assert Guide("0_0", "", "0", "", "", ()).source_ids() == ("0", "0", "000000")  # never the empty id, which a list may hold


@pytest.mark.parametrize("listed", ["033313", 33313])
def test_exclusion_of_an_article_with_and_without_zeros(tmp_path, listed):
    (tmp_path / "data.json").write_text(json.dumps([{"article_id": listed}]))
    with pytest.raises(ValueError, match=r"nothing of .* was kept; skipped: .*'excluded': 2"):
        converted(
            "wikihow", tmp_path / "out", VISUALHOW, media=pictures_of_visualhow(tmp_path / "images"), exclude=[tmp_path / "data.json"]
        )


def test_exclusion_by_picture(tmp_path):
    (tmp_path / "bench").mkdir()
    picture(1).resize((200, 260)).save(tmp_path / "bench" / "q1.jpg")  # the second picture of both, scaled and encoded again
    report, lines = converted(
        "wikihow", tmp_path / "a", VISUALHOW, media=pictures_of_visualhow(tmp_path / "images"), exclude=[tmp_path / "bench"]
    )
    assert [line["id"] for line in lines] == ["033313_1"]
    report, lines = converted(
        "wikihow", tmp_path / "b", VGSI, media=pictures_of_vgsi(tmp_path / "wiki_images"), exclude=[tmp_path / "bench"]
    )
    assert [line["id"] for line in lines] == ["20_0"]
    assert [(item["id"], item["detail"][:40]) for item in report["items"] if item["cause"] == "excluded"] == [
        ("10000798_0", "picture 2 is that of a benchmark (0 of 6"),
    ]  # fmt: skip
