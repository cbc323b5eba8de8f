"""A golden checkpoint with a tokenizer, small enough to run the command and the text interface quickly."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tests.shapes import GOLDEN


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


def make_model(folder: Path, *, chat: bool = False, layers: int = 2) -> Path:
    """The first layers of a golden checkpoint: each layer adds seconds of compilation to every program."""
    shutil.copytree(GOLDEN / "llama", folder)
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    for path in folder.glob("*.safetensors"):
        weights = {
            name: value
            for name, value in load_file(path).items()
            if not (found := re.search(r"layers\.(\d+)\.", name)) or int(found.group(1)) < layers
        }
        save_file(weights, path)
    rows = folder / "pattern" / "full_attention_heads.tsv"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:layers]))
    (folder / "generation_config.json").write_text('{"eos_token_id": null}')  # Runs continue to the end.
    save_tokenizer(folder, chat=chat)
    return folder


@dataclass(frozen=True)
class Result:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


def assert_refused(result: Result, *words: str) -> None:
    assert result.code == 2, result
    assert "Traceback" not in result.err and not result.out.strip(), result
    for word in words:
        assert word in result.err, result
    assert len(result.err) < 1500, "short"
