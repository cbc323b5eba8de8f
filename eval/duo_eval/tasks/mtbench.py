"""`duo eval mtbench`: answers to MT-Bench's questions in FastChat's file format, for its judges to read.

Both turns of a question are one conversation on one cache. FastChat judges them, with a strong model.
"""

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from tqdm import tqdm

from duo_eval.runner.record import Record, fingerprint, sha256
from duo_eval.tasks.rows import read_rows
from duo_jax import LM, Categorical, Greedy, HeadPattern, Temperature
from duo_jax.arguments import whole_number
from duo_jax.checkpoint.fingerprint import weights_fingerprint
from duo_jax.cli.options import ModelOptions, PatternOptions
from duo_jax.files import append_text, check_output, write_text
from duo_jax.reading import decode, json_lines, read_bytes
from duo_jax.text.chat import Chat

QUESTION_FIELDS = ("question_id", "category", "turns")
ANSWER_FIELDS = ("question_id", "answer_id", "model_id", "choices", "tstamp")
# How a line begins.
ANSWER = b'{"question_id": '
# Sampling temperatures by category, as in FastChat; 0 takes the likeliest token.
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
OTHERWISE = 0.0


@dataclass(frozen=True)
class MtBench:
    """Answer MT-Bench's two-turn questions in FastChat's file format."""

    model: tyro.conf.OmitArgPrefixes[ModelOptions]
    questions: Path
    """FastChat's question.jsonl."""
    out: Path
    """Answers, one line a question; questions that have one are not asked again. Settings go into OUT.about.json."""
    pattern: tyro.conf.OmitArgPrefixes[PatternOptions] = PatternOptions()
    model_id: str | None = None
    """Name of the model in the answers; by default its own, with the pattern's."""
    max_new_tokens: int = 1024
    """Most tokens of an answer."""
    max_length: int = 4096
    """Tokens of cache for a conversation."""
    seed: int = 0
    """Seed of answers that are drawn at random."""

    def run(self) -> None:
        """Answer the missing questions, one by one."""
        whole_number("max_new_tokens", self.max_new_tokens, 1)
        whole_number("max_length", self.max_length, 2)
        asked = read_rows(self.questions, QUESTION_FIELDS, _wrong, texts=("category",))
        record = Record.open(self.out.with_name(f"{self.out.name}.about.json"), self._about(), self._sources(asked))
        done = self._done()
        if done and not record.head["runs"]:
            raise ValueError(f"{self.out} has answers, but no {record.path} with their settings; choose another --out")
        left = [row for row in asked if row["question_id"] not in {answer["question_id"] for answer in done}]
        if not left:
            print(f"{self.out} is already complete")
            return
        pattern = self.pattern.load(self.max_length)
        model = self.model.load(pattern=pattern)
        chat = Chat(LM(model, self.model.tokenizer(), pattern), max_length=self.max_length)
        with record.writing(dtype=str(model.dtype)):
            # Written again without an answer that a kill cut off.
            write_text(self.out, "".join(json.dumps(answer) + "\n" for answer in done))
            for row in tqdm(left, unit="question", dynamic_ncols=True):
                append_text(self.out, json.dumps(self._answer(chat, row), ensure_ascii=False) + "\n")
        print(f"{self.out} is complete")

    def _answer(self, chat: Chat, row: dict[str, Any]) -> dict[str, Any]:
        """Ask all turns of a question, on one cache."""
        temperature = float(row.get("required_temperature", TEMPERATURES.get(row["category"], OTHERWISE)))
        sampler = Categorical((Temperature(temperature),)) if temperature else Greedy()
        chat.reset()
        turns = []
        for turn in row["turns"]:
            running = chat.say(turn, max_new_tokens=self.max_new_tokens, sampler=sampler, seed=self.seed)
            for _ in running:
                pass
            turns.append(str(running.reply).strip())
        return {
            "question_id": row["question_id"],
            "answer_id": uuid.uuid4().hex,
            "model_id": self._model_id,
            "choices": [{"index": 0, "turns": turns}],
            "tstamp": time.time(),
        }

    def _done(self) -> list[dict[str, Any]]:
        """The answers in the file, without one that a kill cut off.

        Raises:
            ValueError: a line that is not an answer.
        """
        check_output(self.out)
        content = read_bytes(self.out) if self.out.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        cut = content[len(whole) :]
        if cut and not cut.startswith(ANSWER[: len(cut)]):
            raise ValueError(f"{self.out} ends in a line that is not an answer; choose another --out")
        answers = []
        for place, row in json_lines(decode(whole, self.out), self.out):
            if not set(ANSWER_FIELDS) <= set(row) or not isinstance(row["question_id"], int | str):
                raise ValueError(f"{place} is not an answer, with {', '.join(ANSWER_FIELDS)}; choose another --out")
            answers.append(row)
        return answers

    def _about(self) -> dict[str, Any]:
        """The settings that answers depend on."""
        settings = {name: value for name, value in asdict(self).items() if name not in ("out", "questions")}
        return {"task": "mtbench", **settings, "model_id": self._model_id}

    def _sources(self, asked: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        """Fingerprints of the gates, and of every question: questions may join, but none may become another."""
        gates = {"weights": weights_fingerprint(self.model.model)}
        if self.pattern.pattern:
            gates["pattern"] = fingerprint(HeadPattern.load(self.pattern.pattern))
        return gates | {f"question {row['question_id']}": sha256(json.dumps(row["turns"]).encode()) for row in asked}

    @property
    def _model_id(self) -> str:
        parts = [Path(self.model.model).name]
        parts += [Path(self.pattern.pattern).name] if self.pattern.pattern else []
        return self.model_id or "-".join(parts)


def _wrong(row: dict[str, Any]) -> str | None:
    turns = row["turns"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        return f"turns must be a list of texts, got {turns!r:.80}"
    if not isinstance(row["question_id"], int | str):
        return f"question_id must be a number or a text, got {row['question_id']!r:.80}"
    heat = row.get("required_temperature", 0.0)
    if not isinstance(heat, int | float) or heat < 0:
        return f"required_temperature must be a number of at least 0, got {heat!r:.80}"
    return None
