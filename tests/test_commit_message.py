"""The commit-msg hook accepts the messages that CONTRIBUTING.md describes, and names the fault of others."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / ".ci" / "commit_message.py"
BODY = "\n\nThe reason for it.\n"


def load():
    spec = importlib.util.spec_from_file_location("commit_message", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


faults = load().faults


@pytest.mark.parametrize(
    "message",
    [
        f"Add ring slots to the streaming pool{BODY}",
        f"cache: split the spec from the store{BODY}",
        f"duo_eval/runner: Feed every method the same items{BODY}",
        f"{'x' * 72}{BODY}",
        f"# a comment of git\nAdd a page{BODY}# Please enter the commit message\n",
        "Merge branch 'main' into docs",
        "fixup! Add a page",
        'Revert "Add a page"',
    ],
)
def test_good_messages_pass(message):
    assert faults(message) == []


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        (f"{'x' * 73}{BODY}", "73 characters"),
        (f"Add a page.{BODY}", "period"),
        (f"Added a page{BODY}", "imperative"),
        (f"docs: Adding a page{BODY}", "imperative"),
        (f"wip{BODY}", "imperative"),
        (f"The page is new{BODY}", "imperative"),
        ("Add a page\nwith more", "not blank"),
        ("Add a page", "no body"),
        ("Add a page\n\n# only a comment\n", "no body"),
        ("Add a page\n# ------------------------ >8 ------------------------\n+ a diff", "no body"),
        ("\n# nothing\n", "empty"),
    ],
)
def test_each_fault_is_named(message, fault):
    assert any(fault in each for each in faults(message))


def test_the_hook_fails_for_a_bad_message(tmp_path):
    path = tmp_path / "COMMIT_EDITMSG"
    path.write_text("wip\n")
    bad = subprocess.run([sys.executable, SCRIPT, path], capture_output=True, text=True, check=False)
    assert bad.returncode == 1 and "imperative" in bad.stderr
    path.write_text(f"Add a page{BODY}")
    assert subprocess.run([sys.executable, SCRIPT, path], check=False).returncode == 0
