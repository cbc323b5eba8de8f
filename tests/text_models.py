"""A golden checkpoint with a tokenizer, small enough to run the command and the text interface in no time."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

GOLDEN = Path(__file__).parent / "golden"


def save_tokenizer(folder: Path, *, chat: bool) -> None:
    """One token for each of the first 94 printable characters: 97 with the special tokens, as the model has."""
    tokens = ["<unk>", "<s>", "</s>", *map(chr, range(32, 126))]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )
    if chat:
        tokenizer.chat_template = (
            "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}[assistant] {% endif %}"
        )
    tokenizer.save_pretrained(folder)


def make_model(folder: Path, *, chat: bool = False) -> Path:
    shutil.copytree(GOLDEN / "llama", folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": null}')  # Runs go on to the end.
    save_tokenizer(folder, chat=chat)
    return folder


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str


def assert_refused(result: Result, *words: str) -> None:
    assert result.code == 2, result
    assert "Traceback" not in result.err and not result.out.strip(), result
    for word in words:
        assert word in result.err, result
    assert len(result.err) < 1500, "short"
