"A folder of somebody's texts becomes a retrieval set, or one line says why not."
from pathlib import Path

import pytest

from embedlab.collections import load
from embedlab.config import InputError
from embedlab.documents import own_set, passages, read_folder, sections


def write(folder: Path, n: int, ending: str = "md") -> Path:
    for i in range(n):
        p = folder / f"part{i % 3}" / f"note_{i}.{ending}"
        p.parent.mkdir(parents=True, exist_ok=True)
        p.write_text(f"# Note {i}\n\nThis is what note number {i} says about boats and harbours.\n\n## Sails {i}\n\nSail number {i} is made of cloth that number {i} has woven.\n")
    return folder


def test_files_are_held_out_whole_and_the_set_is_read_by_its_path(tmp_path):
    made = own_set(write(tmp_path / "notes", 20), tmp_path / "set")
    files = {s: {q.split("#")[0] for q in r.queries} for s, r in made.items()}
    assert [len(files[s]) for s in ("train", "dev", "test")] == [14, 2, 4]
    assert not files["train"] & (files["dev"] | files["test"]) and not files["dev"] & files["test"]
    for s, r in made.items(): assert load(str(tmp_path / "set"), s).fingerprint == r.fingerprint
    q = next(q for q, t in made["train"].queries.items() if "Sails" in t)
    assert made["train"].queries[q].startswith("Note ") and "woven" in made["train"].answers[q][0], "title and heading ask"
    more = own_set(write(tmp_path / "notes", 24), tmp_path / "set")
    assert {q.split("#")[0] for r in more.values() for q in r.queries} > set().union(*files.values()) and load(str(tmp_path / "set")).fingerprint == more["test"].fingerprint, "written anew"


def test_what_is_no_text_of_the_user_is_passed_over(tmp_path):
    notes = write(tmp_path, 10)
    (notes / ".git").mkdir(); (notes / ".git/old.md").write_text("# Old\n\nA text of many words that nobody should find in here again.")
    (notes / "empty.md").write_text(""); (notes / "short.txt").write_text("Three words only."); (notes / "code.py").write_text("print('no text')")
    (notes / "plain.txt").write_text("A plain text has no headings,\nso its name asks for its paragraphs, joined.\n\nA second paragraph.")
    files = read_folder(notes)
    assert len(files) == 11 and files["plain.txt"] == [("plain", ["A plain text has no headings, so its name asks for its paragraphs, joined.\nA second paragraph."])]


def test_markdown_as_it_is_written():
    text = "Title here\n==========\n\nFirst *paragraph* with `code`,\non two lines.\n\nPart\n----\n\n- one [link](http://x)\n- two ![picture](y.png)\n\n| a | b |\n|---|---|\n| c | d |\n\n<!-- hidden -->\n\n```\n# comment\n```\n\n### Part\n\nSame heading again.\n"
    assert sections(text, "file") == [("Title here", ["First paragraph with code, on two lines."]),
                                      ("Title here: Part", ["one link", "two", "a", "b", "c", "d", "# comment"]), ("Title here: Part", ["Same heading again."])]
    assert sections("No heading at all.", "my file")[0] == ("my file", ["No heading at all."])
    assert passages(["", "few words"]) == []


@pytest.mark.parametrize("spoil, says", [
    (lambda d: (d / "part0/note_0.md").write_bytes(b"# Caf\xe9"), "note_0.md: not UTF-8 text"),
    (lambda d: [p.unlink() for p in [*d.rglob("*.md")][:4]], "8 files hold a passage of 8 words or more; it takes 10"),
    (lambda d: [p.unlink() for p in d.rglob("*.md")], "no file that ends in .md, .markdown, .txt"),
    (lambda d: (d.parent / "set").mkdir() or (d.parent / "set/thesis.pdf").write_text("x"), "holds other files; give an empty folder")])
def test_bad_folders(tmp_path, spoil, says):
    notes = write(tmp_path / "notes", 12)
    spoil(notes)
    with pytest.raises(InputError, match=says) as e: own_set(notes, tmp_path / "set")
    assert "\n" not in str(e.value) and not (tmp_path / "set/corpus.jsonl").exists()


def test_a_heading_of_a_part_is_no_title():
    assert sections("## Part\n\nText under a part.\n", "my file") == [("my file", []), ("my file: Part", ["Text under a part."])]


def test_the_set_is_not_written_among_the_texts(tmp_path):
    "A saved model's card would be read as a text of the user's the next time."
    notes = write(tmp_path / "notes", 12)
    for out in (notes, notes / "model"):
        with pytest.raises(InputError, match="lies in .*notes, whose texts are read"): own_set(notes, out)
    assert not (notes / "corpus.jsonl").exists() and not (notes / "model").exists()
