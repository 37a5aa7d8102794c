"""`cft init`, `cft data check` and `cft doctor`: what they see and say of data and machine."""

import csv
import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from shell import Cft

from constrained_ft import doctor
from constrained_ft.compose import compose
from constrained_ft.corpus import load_corpus
from constrained_ft.data_check import check_command
from constrained_ft.progress import Silent
from constrained_ft.tiny import byte_tokenizer

TEXTS = [f"sentence {i} says {'e' * (i % 5)} and no more" for i in range(40)]
TINY = ("llm=tiny", "constraint=letters", "constraint.scorer.at_most=4", "constraint.labels=hard")


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- init ---------------------------------------------------------------------------------------


def test_init_writes_a_commented_file_that_trains_and_prints_the_next_command(
    cft: Cft, tmp_path: Path
) -> None:
    jsonl(tmp_path / "mine.jsonl", [{"text": text} for text in TEXTS])
    ran = cft("init", "mine.jsonl", *TINY)
    assert ran.code == 0, ran.err
    assert ran.out.splitlines()[-1] == "cft train --config cft.yaml"
    text = (tmp_path / "cft.yaml").read_text()
    said = yaml.safe_load(text)
    assert (said["name"], said["data.path"], said["llm"]) == ("mine", "mine.jsonl", "tiny")
    assert said["evaluation.judge"] is None  # the default one is for toxicity
    assert text.count("#") > len(said)
    words = " ".join(text.replace("#", " ").split())
    assert "40 of text" in words
    longest = max(len(one) for one in TEXTS)  # a byte is a token
    assert f"to {longest} tokens a row" in words
    config = compose(["output_dir=x"], (), tmp_path / "cft.yaml")
    assert config.data.path == "mine.jsonl"
    assert config.constraint.scorer == compose(["experiment=smoke", TINY[2]]).constraint.scorer
    rejected = sum(one.count("e") > 4 for one in TEXTS) / len(TEXTS)
    assert f"it rejects: {100 * rejected:.1f} % (" in words
    assert cft("train", "--config", "cft.yaml", "--dry-run").code == 0


def test_init_never_overwrites(cft: Cft, tmp_path: Path) -> None:
    jsonl(tmp_path / "mine.jsonl", [{"text": text} for text in TEXTS])
    (tmp_path / "cft.yaml").write_text("mine")
    ran = cft("init", "mine.jsonl", *TINY)
    assert ran.code == 2
    assert "--output" in ran.err
    assert (tmp_path / "cft.yaml").read_text() == "mine"
    assert cft("init", "mine.jsonl", *TINY, "--output", "other.yaml").code == 0


def test_init_finds_the_column_of_the_text(cft: Cft, tmp_path: Path) -> None:
    with (tmp_path / "mine.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "body"])
        writer.writeheader()
        writer.writerows({"id": f"{i}", "body": text} for i, text in enumerate(TEXTS))
    assert cft("init", "mine.csv", *TINY).code == 0
    said = yaml.safe_load((tmp_path / "cft.yaml").read_text())
    assert said["data.text_column"] == "body"


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "Say", "completion": " hello there"}, "prompt + completion"),
        ({"messages": [{"role": "assistant", "content": "hello"}]}, "chat"),
    ],
)
def test_init_knows_prompts_and_chats(
    cft: Cft, tmp_path: Path, row: dict[str, Any], kind: str
) -> None:
    jsonl(tmp_path / "mine.jsonl", [row] * 3)
    assert cft("init", "mine.jsonl", *TINY).code == 0
    assert f"3 of {kind}" in (tmp_path / "cft.yaml").read_text()


def test_init_without_data_writes_the_default_run(cft: Cft, tmp_path: Path) -> None:
    assert cft("init", "seed=3", "trainer=sft").code == 0
    file = tmp_path / "cft.yaml"
    assert compose(["output_dir=x"], (), file) == compose(["output_dir=x", "seed=3", "trainer=sft"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere.txt"], 3, "there is no file nowhere.txt"),
        (["mine.jsonl", "llm=tinny"], 2, "did you mean tiny?"),
        (["mine.jsonl", "constraint=function"], 2, "constraint.scorer.path is not set"),
        (["a.txt", "b.txt"], 2, "2 files are given"),
        (["numbers.jsonl"], 3, "has no column of text"),
    ],
)
def test_init_refuses_what_it_cannot_use_and_writes_nothing(
    cft: Cft, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    jsonl(tmp_path / "mine.jsonl", [{"text": text} for text in TEXTS])
    jsonl(tmp_path / "numbers.jsonl", [{"a": 1}, {"a": 2}])
    ran = cft("init", *arguments)
    assert ran.code == code
    assert message in ran.err
    assert not (tmp_path / "cft.yaml").exists()


def test_init_says_why_a_scorer_could_not_be_asked(cft: Cft, tmp_path: Path) -> None:
    jsonl(tmp_path / "mine.jsonl", [{"text": text} for text in TEXTS])
    broken = ("constraint=function", "constraint.scorer.path=nowhere.py:score")
    ran = cft("init", "mine.jsonl", "llm=tiny", *broken)
    assert ran.code == 0
    assert "note: " in ran.out
    assert "nowhere.py" in ran.out


# --- data check ---------------------------------------------------------------------------------

LONG = "word " * 30


def checked(tmp_path: Path, rows: list[dict[str, Any]], *overrides: str, **options: Any) -> Any:
    path = jsonl(tmp_path / "rows.jsonl", rows)
    words = ("experiment=smoke", f"data.path={path}", "data.format=auto", "data.max_length=64")
    config = compose([*words, *overrides])
    return config, check_command(config, Silent(), **({"row": 1, "scored": None} | options))


def test_the_check_counts_what_the_corpus_counts(tmp_path: Path) -> None:
    rows = [{"text": text} for text in [*TEXTS, LONG, TEXTS[0]]]
    config, report = checked(tmp_path, rows)
    stats = load_corpus(config.data, byte_tokenizer()).stats
    facts = {row[0]: row[1] for row in report.groups[1]}
    assert facts["rows read"] == "42 (42 text)"
    assert facts["split into several"].startswith(f"{stats.split_documents:,} (")
    assert facts["cut at their end"].startswith("0 (")
    assert facts["the same as an earlier row"].startswith("1 (")
    assert facts["end of text is trained"].startswith("42 (100.0 %")
    assert facts["tokens a row: least, 5 %, half, 95 %, most"].endswith(f" {stats.longest}")
    assert any("repeat an earlier one: 1" in remark for remark in report.remarks)


def test_the_check_sees_rows_that_are_cut_and_lose_their_end(tmp_path: Path) -> None:
    rows = [{"prompt": "Say", "completion": LONG}, {"prompt": "Say", "completion": " a"}]
    _, report = checked(tmp_path, rows)
    facts = {row[0]: row[1] for row in report.groups[1]}
    assert facts["cut at their end"] == "1 (50.0 %)"
    assert facts["end of text is trained"] == "1 (50.0 %)"
    assert any("raise data.max_length, 154 would hold all" in one for one in report.remarks)


def test_the_check_shows_one_row_with_its_mask(tmp_path: Path) -> None:
    rows = [{"text": "first"}, {"prompt": "Say", "completion": " hi"}]
    _, report = checked(tmp_path, rows, row=2)
    assert report.shown.startswith("row 2 of ")
    cells = [(text, mark) for _, _, text, mark in report.tokens[1]]
    assert [text for text, _ in cells[:6]] == ["'S'", "'a'", "'y'", "' '", "'h'", "'i'"]
    assert [mark for _, mark in cells] == ["–"] * 3 + ["trained"] * 4
    assert cells[-1][0].endswith("(end of text)")


def test_the_check_says_how_much_the_scorer_rejects(tmp_path: Path) -> None:
    rows = [{"text": "e" * count} for count in range(1, 11)]
    _, report = checked(tmp_path, rows, "constraint.scorer.at_most=6", "constraint.scorer.letter=e")
    ((_, scored, rejected, missing),) = report.scores[1]
    assert (scored, missing) == ("10", "0 (0.0 %)")
    assert rejected.startswith("40.0 % (")
    _, silent = checked(tmp_path, rows, scored=0)
    assert silent.scores[1] == []
    assert any("--scored N" in remark for remark in silent.remarks)


def test_scores_that_fail_are_missing_and_not_rejected(tmp_path: Path) -> None:
    code = "return [None if 'x' in text else 0.0 for text in completions]"
    (tmp_path / "mine.py").write_text(f"def score(prompts, completions):\n    {code}\n")
    rows = [{"text": f"ab {'x' * (i % 2)}"} for i in range(10)]
    words = ("constraint=function", f"constraint.scorer.path={tmp_path}/mine.py:score")
    _, report = checked(tmp_path, rows, *words)
    ((_, _, rejected, missing),) = report.scores[1]
    assert rejected.startswith("100.0 %")
    assert missing == "5 (50.0 %)"


def test_the_command_prints_the_tables_and_what_to_do_next(cft: Cft, tmp_path: Path) -> None:
    ran = cft("data", "check", "experiment=smoke", "--row", "3")
    assert ran.code == 0
    for part in (
        "Corpus",
        "trained",
        "What the constraint says",
        "next: cft train experiment=smoke",
    ):
        assert part in ran.out
    assert cft("data", "check", "data=file", "data.path=nowhere").code == 3
    assert cft("data", "check", "data=fil").code == 2


# --- doctor -------------------------------------------------------------------------------------


def test_doctor_says_what_is_installed_and_how_to_get_the_rest(
    cft: Cft, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [*(metadata.requires("constrained-ft") or []), 'no-such-thing>=1; extra == "more"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: asked)
    out = cft("doctor").out
    assert re.search(rf"torch +{re.escape(metadata.version('torch'))}", out)
    assert "pip install 'constrained-ft[more]' (no-such-thing is not installed)" in out
    assert re.search(r"demo +installed", out)
    for part in ("device", "spare memory", "cache", "GB free", "python"):
        assert part in out


def test_doctor_finds_what_is_too_old_and_leaves_with_3(
    cft: Cft, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["torch>=99", "absent-thing"])
    ran = cft("doctor")
    assert ran.code == 3
    version = metadata.version("torch")
    assert f"torch is {version}, and has to be >=99; pip install 'torch>=99'" in ran.err
    assert "absent-thing is not installed; pip install 'absent-thing'" in ran.err
    assert Requirement("torch>=99").specifier.contains(version) is False


def test_doctor_prints_no_secret(cft: Cft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "SECRETNAME"
    home.mkdir()
    secrets = {
        "HF_TOKEN": "hf_SECRETSECRET",
        "WANDB_API_KEY": "SECRETSECRET",
        "OPENAI_API_KEY": "SECRETSECRET",
        "PIP_INDEX_URL": "https://user:SECRETSECRET@localhost/simple",
        "HTTPS_PROXY": "http://user:SECRETSECRET@localhost",
        "HOME": str(home),
        "HF_HOME": str(home / "hub"),
    }
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    ran = cft("doctor")
    assert ran.code == 0, ran.err
    assert "SECRET" not in ran.out + ran.err
    assert re.search(r"hub login +yes", ran.out)
    assert re.search(r"HF_HOME +~/hub", ran.out)
