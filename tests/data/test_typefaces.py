"""Glyphs: their number, their parts, their classes, and the file that keeps them."""

import os
import sys
import unicodedata

import matplotlib
import numpy as np
import pytest
import torch

from diffusionkit.data import glyphs, typefaces


@pytest.fixture
def few(tmp_path, monkeypatch):
    """Two typefaces of 16 only, in an empty cache folder."""
    monkeypatch.setattr(typefaces, "_TYPEFACES", ("STIXGeneralItalic", "STIXGeneralBolIta"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "diffusionkit"


@pytest.mark.slow
def test_numbers_of_images() -> None:
    """Exact at the versions of constraints.txt; other typefaces may have some more signs."""
    train, test = glyphs("train"), glyphs("test")
    counts = [len(train), len(test)]
    scripts = dict(zip(train.classes, train.class_labels.bincount().tolist(), strict=True))
    expected = {
        "Latin": 10686, "Greek": 3087, "Cyrillic": 2359, "Armenian": 887, "Georgian": 988,
        "Hebrew": 256, "Arabic": 1034, "Lao": 290, "Braille": 870, "Canadian syllabics": 1355,
        "Other scripts": 479, "Letterlike signs": 1859, "Digits": 259, "Operators": 2388,
        "Symbols": 2431, "Arrows": 1319,
    }  # fmt: skip
    if (matplotlib.__version__, unicodedata.unidata_version) == ("3.11.2", "14.0.0"):
        assert counts == [30547, 3240]
        assert scripts == expected
    assert counts == pytest.approx([30547, 3240], rel=0.05)
    assert scripts.keys() == expected.keys()
    typeface = glyphs("train", labels="typeface")
    assert len(typeface.classes) == 16
    assert int(typeface.class_labels.bincount().min()) > 500


def test_images_are_distinct_signs_of_disjoint_characters(few) -> None:
    train, test = glyphs("train"), glyphs("test")
    assert train.shape == test.shape == (1, 32, 32)
    assert train.classes == test.classes
    pixels = [image[0].numpy().tobytes() for part in (train, test) for image, _ in part]
    assert len({*pixels}) == len(pixels) > 1500
    assert all(len({*image}) > 1 for image in pixels)
    drawn = typefaces._kept(32)
    in_test = np.array([typefaces._is_test(code) for code in drawn["groups"].tolist()])
    assert (len(train), len(test)) == (int((~in_test).sum()), int(in_test.sum()))
    assert 0.05 < in_test.mean() < 0.15
    assert not {*drawn["codes"][in_test]} & {*drawn["codes"][~in_test]}


def test_characters_that_look_alike_are_one(few) -> None:
    """A Greek letter is not in the test part if the Latin one, drawn alike, is in the other."""
    folder = os.path.join(matplotlib.get_data_path(), "fonts", "ttf")
    font = sys.modules["matplotlib.ft2font"].FT2Font
    drawn = typefaces._draw(typefaces.Path(folder), font, 32)
    groups = dict(zip(drawn["codes"].tolist(), drawn["groups"].tolist(), strict=True))
    assert groups[ord("A")] == ord("A")
    assert ord("\u0391") not in groups or groups[ord("\u0391")] == ord("A")  # capital alpha
    assert groups[ord("B")] != groups[ord("A")]
    assert all(group <= code for code, group in groups.items())


def test_the_part_of_a_character_is_a_hash_of_it() -> None:
    codes = range(20_000)
    share = sum(map(typefaces._is_test, codes)) / len(codes)
    assert abs(share - 26 / 256) < 0.01
    assert [code for code in range(65, 91) if typefaces._is_test(code)] == [65, 84]


@pytest.mark.parametrize(
    ("character", "kind"),
    [
        ("A", "Latin"),
        ("\u03b1", "Greek"),
        ("\u0416", "Cyrillic"),
        ("\u0661", "Arabic"),  # ARABIC-INDIC DIGIT ONE
        ("7", "Digits"),
        ("+", "Operators"),
        ("\u2192", "Arrows"),
        ("\u21c0", "Arrows"),  # a harpoon
        ("\u28ff", "Braille"),
        ("\u1403", "Canadian syllabics"),
        ("\u16a0", "Letterlike signs"),
        ("\U00010300", "Other scripts"),
        ("\u2602", "Symbols"),
        ("\u211d", "Letterlike signs"),
    ],
)
def test_classes_of_characters(character, kind) -> None:
    assert typefaces._script(character) == kind


def test_drawn_images_are_kept_and_damaged_ones_drawn_again(few, monkeypatch) -> None:
    first = glyphs("test", size=8)
    (kept,) = few.iterdir()
    assert kept.name.startswith("glyphs-8-")
    drawn, calls = typefaces._kept(8), []
    monkeypatch.setattr(typefaces, "_draw", lambda *args: calls.append(args) or drawn)
    assert glyphs("test", size=8).fingerprint == first.fingerprint
    assert calls == []
    content = kept.read_bytes()
    for damaged in (content[:-100], content[:200] + b"\0" * 50 + content[250:], b""):
        kept.write_bytes(damaged)
        assert glyphs("test", size=8).fingerprint == first.fingerprint
        assert len(calls) == 1
        calls.clear()
        assert kept.read_bytes()[:4] == b"PK\3\4"


def test_a_folder_that_cannot_be_written_does_no_harm(few, monkeypatch) -> None:
    few.write_text("a file where the folder should be")
    assert len(glyphs("test", size=8)) > 50


def test_typefaces_are_classes(few) -> None:
    data = glyphs("train", size=8, labels="typeface")
    assert data.classes == ("STIXGeneralItalic", "STIXGeneralBolIta")
    assert {*data.class_labels.tolist()} == {0, 1}
    assert torch.equal(data[0][0], glyphs("train", size=8)[0][0])


def test_without_matplotlib_it_says_so(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.ft2font", None)
    with pytest.raises(ImportError, match=r"glyphs needs matplotlib: pip install"):
        glyphs()


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match=r"part: expected .*train.*test.*, got 'all'"):
        glyphs("all")
    with pytest.raises(ValueError, match="labels: expected"):
        glyphs(labels="name")
    with pytest.raises(ValueError, match="size: expected"):
        glyphs(size=4)
