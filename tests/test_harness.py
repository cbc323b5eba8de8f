"""The adapter for lm-evaluation-harness, on a small checkpoint whose tokens are characters."""

import random

import numpy as np
import pytest
from duo_eval.methods.registry import method
from duo_eval.tasks.lm_eval import batches
from duo_eval.tasks.lm_eval.adapter import DuoLM
from duo_eval.tasks.lm_eval.batches import padded, plan
from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

import duo_jax
from duo_jax import LM, HeadPattern, KVCache, score
from tests.test_infer import dense_logits
from tests.text_models import make_model

TEXT = "The quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. "


PROMPTS = [TEXT + "Who?", TEXT + "What is it?", "Another", "Tiny"]


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk width and one length of cache: every other would be a program to compile."""
    monkeypatch.setattr(batches, "WIDTHS", (32,))
    monkeypatch.setattr(batches, "MIN_ROOM", 256)


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    """One layer, half of whose heads stream, with a window much shorter than the texts."""
    folder = make_model(tmp_path_factory.mktemp("harness") / "model", layers=1)
    pattern = HeadPattern.from_gates(np.array([[1.0, 0.0, 1.0, 0.0]]), sparsity=0.5, sink_size=4, recent_size=12)
    return duo_jax.load(folder, pattern=pattern)


@pytest.fixture(scope="module")
def greedy_texts(lm: LM) -> list[str]:
    """What greedy decoding says to each prompt."""
    return [str(reply) for reply in lm(PROMPTS, max_new_tokens=12)]


def adapter(lm: LM, **options) -> DuoLM:
    return DuoLM(lm, progress=False, **{"batch_size": 4, **options})


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


def likelihoods(model: DuoLM, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    return model.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)


def dense(lm: LM, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """Likelihoods of continuations from one dense forward pass over everything."""
    tokens = np.zeros((len(pairs), 128), np.int32)
    for row, (context, continuation) in enumerate(pairs):
        tokens[row, : len(context) + len(continuation)] = context + continuation
    logits = dense_logits(lm.model, tokens, lm.pattern).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    found = []
    for row, (context, continuation) in enumerate(pairs):
        at = np.arange(len(context) - 1, len(context) + len(continuation) - 1)
        is_top = bool((logits[row, at].argmax(-1) == continuation).all())
        found.append((float(logprobs[row, at, continuation].sum()), is_top))
    return found


def assert_equal(found: list[tuple[float, bool]], wanted: list[tuple[float, bool]]) -> None:
    np.testing.assert_allclose([one[0] for one in found], [one[0] for one in wanted], rtol=0, atol=1e-4)
    assert [one[1] for one in found] == [one[1] for one in wanted]


CHOICES = [" yes", " no", "A", "B", " perhaps, who knows"]
PAIRS = [
    *((TEXT + "Is it so?", choice) for choice in CHOICES),
    *((TEXT + "Is it not?", choice) for choice in CHOICES[:2]),
    ("A short one of other words", " and its end"),
    ("Tiny", "x"),
    ("", "no context at all"),
    ("   ", "only spaces"),
    (TEXT + "Is it so?", " yes"),
]


def test_likelihoods_equal_a_dense_forward_pass(lm):
    encode = lm.tokenizer.encode
    wanted = []
    for context, continuation in PAIRS:
        spaces = context[len(context.rstrip()) :]  # lm-eval's rule: they belong to the continuation
        wanted.append((encode(context.rstrip()) or [lm.tokenizer.bos_token_id], encode(spaces + continuation)))
    assert_equal(likelihoods(adapter(lm), PAIRS), dense(lm, wanted))


@pytest.mark.parametrize(("name", "budget"), [("full", 1.0), ("streamingllm:sink_size=2", 1.0), ("h2o:block=16", 0.5)])
def test_any_method_answers_at_its_budget(lm, greedy_texts, name, budget):
    plain = LM(lm.model, lm.tokenizer, None)
    other = adapter(plain, method=method(name), budget=budget)
    pairs = [(TEXT + "Is it so?", choice) for choice in CHOICES]
    settings = {"until": ["."], "max_gen_toks": 4, "do_sample": False}
    found, texts = likelihoods(other, pairs), generate(other, [(prompt, settings) for prompt in PROMPTS])
    if budget == 1.0:  # Then every method is full attention.
        assert_equal(found, likelihoods(adapter(plain), pairs))
        assert texts == generate(adapter(plain), [(prompt, settings) for prompt in PROMPTS])
    else:
        assert np.isfinite([one[0] for one in found]).all() and len(texts) == len(PROMPTS)
    drawn = [("Hello", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 2})]
    if method(name).is_fixed:
        assert generate(other, drawn) == generate(adapter(plain), drawn)
    else:
        with pytest.raises(NotImplementedError, match="greedily"):
            generate(other, drawn)
    with pytest.raises(ValueError, match="one of them"):
        adapter(lm, method=method(name))


def test_what_greedy_decoding_says_is_greedy(lm, greedy_texts):
    other = greedy_texts[0][:2] + ("~" if greedy_texts[0][2] != "~" else "!")
    found = likelihoods(
        adapter(lm), [(PROMPTS[0], greedy_texts[0][:3]), (PROMPTS[0], other), (PROMPTS[0], greedy_texts[0][0])]
    )
    assert [one[1] for one in found] == [True, False, True]


def test_batches_and_sharing_change_nothing(lm, monkeypatch):
    rng = random.Random(0)
    pairs = [(TEXT[: rng.randint(1, 60)].strip(), TEXT[rng.randint(0, 20) : 30]) for _ in range(7)]
    pairs += [(TEXT + question, answer) for question in ("Who?", "What is it?", "Why") for answer in (" I", " you two")]
    together = likelihoods(adapter(lm), pairs)
    assert [batch.shared for batch in shared_batches(lm, pairs)].count(0) < len(shared_batches(lm, pairs))
    monkeypatch.setattr(batches, "MIN_SHARED", 10**6)
    assert_equal(together, likelihoods(adapter(lm, batch_size=1), pairs))


def shared_batches(lm: LM, pairs: list[tuple[str, str]]) -> list[batches.Batch]:
    contexts = [tuple(lm.tokenizer.encode(context)) for context in dict.fromkeys(context for context, _ in pairs)]
    return plan(contexts, [8] * len(contexts), [1] * len(contexts), 4)


def test_every_context_is_prefilled_once(lm, monkeypatch):
    """Tokens that go through prefill: the shared beginning once, and the rest of each context once."""
    counted = []
    real = batches.prefill

    def counting(*args, lengths, **options):
        counted.extend(lengths)
        return real(*args, lengths=lengths, **options)

    monkeypatch.setattr(batches, "prefill", counting)
    pairs = [(TEXT + question, answer) for question in ("Who?", "Where?") for answer in (" I am", " you are", " they")]
    likelihoods(adapter(lm), pairs)
    # Both questions begin with "W", which is shared too.
    assert sum(counted) == len(TEXT) + len("Who?") + len("Where?") - 2


def test_a_plan_has_every_context_once_and_few_sizes():
    rng = random.Random(1)
    beginnings = [tuple(rng.randrange(90) for _ in range(100)) for _ in range(3)]
    contexts = [beginnings[n % 3] + tuple(rng.randrange(90) for _ in range(rng.randint(1, 30))) for n in range(20)]
    contexts += [tuple(rng.randrange(90) for _ in range(rng.randint(1, 300))) for _ in range(9)]
    found = plan(contexts, [5] * 29, [1] * 29, 6)
    assert sorted(row for batch in found for row in batch.rows) == list(range(29))
    assert {len(batch.rows) for batch in found} <= {1, 2, 4, 6}
    for batch in found:
        heads = {contexts[row][: batch.shared] for row in batch.rows}
        assert len(heads) == 1
        assert all(batch.shared < len(contexts[row]) <= batch.room - 5 for row in batch.rows)
    assert sum(batch.shared == 100 for batch in found) >= 3
    assert plan([(1, 2)], [1], [1], 8) == [batches.Batch((0,), 0, batches.MIN_ROOM)]


def test_rolling_equals_score(lm):
    texts = [TEXT, "short", TEXT * 2]
    found = adapter(lm).loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in texts]), True)
    tokens, lengths = padded([(lm.tokenizer.bos_token_id, *lm.tokenizer.encode(text)) for text in texts], 32)
    scores, _ = score(lm.model, tokens, KVCache.init(lm.model.config, lm.pattern, 3, 256), lengths=lengths)
    logprobs = np.asarray(scores.logprobs, np.float64)
    wanted = [row[: length - 1].sum() for row, length in zip(logprobs, lengths, strict=True)]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("text", [TEXT[:39], TEXT[:40], TEXT[:41], TEXT], ids=len)
def test_rolling_over_windows_scores_what_lm_eval_scores(lm, text):
    """lm-eval's own adapter gives the model windows of `max_length` inputs and scores every token once."""
    ids, size = lm.tokenizer.encode(text), 40
    windows = [make_disjoint_window(w) for w in get_rolling_token_windows(ids, lm.tokenizer.bos_token_id, size, 1)]
    assert [token for _, scored in windows for token in scored] == ids
    assert max(len(context) + len(scored) - 1 for context, scored in windows) == min(len(text), size)
    found = adapter(lm, max_length=size).loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]), True)
    np.testing.assert_allclose(found, [sum(one[0] for one in dense(lm, windows))], rtol=0, atol=1e-3)


def generate(model: DuoLM, pairs: list[tuple[str, dict]]) -> list[str]:
    return model.generate_until(requests("generate_until", pairs), disable_tqdm=True)


def test_generation_stops_at_strings_and_at_its_limit(lm, greedy_texts):
    stop = greedy_texts[0][4:6]
    settings = {"until": [stop], "max_gen_toks": 12, "do_sample": False}
    found = generate(adapter(lm), [(prompt, settings) for prompt in PROMPTS] + [(PROMPTS[1], {"max_gen_toks": 5})])
    assert found[:4] == [text.split(stop)[0] for text in greedy_texts]
    assert found[0] != greedy_texts[0] and found[4] == greedy_texts[1][:5]


def test_a_special_token_as_a_stop_string_ends_a_row(lm):
    options = adapter(lm)._options({"until": ["<unk>", "\n\n", ""], "max_gen_toks": 3})
    ends = lm.ends(options["stop"])
    assert ends.ids == (lm.tokenizer.eos_token_id, lm.tokenizer.unk_token_id) and ends.strings == ("\n\n",)


def test_a_stop_string_of_another_model_is_left_out_with_one_warning(lm):
    model = adapter(lm)
    with pytest.warns(UserWarning, match=r"stop strings \['<unk>\\n'\] never appear") as warned:
        for _ in range(2):
            assert model._options({"until": ["<unk>\n", "\n\n"], "max_gen_toks": 3})["stop"] == ("\n\n",)
    assert len(warned) == 1


def test_sampling_is_seeded(lm):
    settings = {"do_sample": True, "temperature": 1.5, "top_p": 0.95, "max_gen_toks": 8}
    one, again = (generate(adapter(lm), [("Hello", settings), ("Hello", settings)]) for _ in range(2))
    assert one == again and one[0] != one[1]


@pytest.mark.parametrize(
    ("pairs", "options", "words"),
    [
        ([(TEXT * 8, " x")], {}, ["687 tokens", "512", "--truncate"]),
        ([("Hello", TEXT * 8)], {"truncate": True}, ["continuation of 688"]),
        ([("Hello", "")], {}, ["no tokens", "Hello"]),
    ],
)
def test_what_cannot_be_scored_is_refused(lm, pairs, options, words):
    with pytest.raises(ValueError) as error:
        likelihoods(adapter(lm, **options), pairs)
    assert all(word in str(error.value) for word in words), error.value


def test_a_long_context_is_cut_at_the_left_where_asked(lm):
    size, ending, encode = 50, lm.tokenizer.encode(" xy"), lm.tokenizer.encode
    texts = [TEXT[:48], TEXT[:49], TEXT.strip()]  # just fitting, one token too many, far too many
    found = likelihoods(adapter(lm, truncate=True, max_length=size), [(text, " xy") for text in texts])
    # lm-eval's own adapter: the inputs are (context + continuation)[-(max_length + 1):][:-1].
    kept = [(encode(text) + ending)[-(size + 1) :][: -len(ending)] for text in texts]
    assert [len(context) for context in kept] == [48, 48, 48]
    assert_equal(found, dense(lm, [(context, ending) for context in kept]))


def test_a_text_of_max_length_and_one_token_fits(lm):
    assert likelihoods(adapter(lm, max_length=50), [(TEXT[:49], " x")])[0][0] < 0
    with pytest.raises(ValueError, match=r"context of 49 tokens and a continuation of 2.*the 49 of max_length"):
        likelihoods(adapter(lm, max_length=49), [(TEXT[:49], " x")])


def test_a_generation_that_has_no_room_or_an_unknown_setting_is_refused(lm):
    with pytest.raises(ValueError, match=r"500 to be generated.*--truncate"):
        generate(adapter(lm), [("Hello, this is long", {"max_gen_toks": 500})])
    with pytest.raises(NotImplementedError, match="num_beams"):
        generate(adapter(lm), [("Hello", {"num_beams": 4})])
    with pytest.raises(ValueError, match="512 positions"):
        adapter(lm, max_length=513)


def test_chat_templates(lm, chat_model):
    model = adapter(LM(lm.model, duo_jax.load_tokenizer(chat_model), None))
    talk = [{"role": "user", "content": "Hi"}]
    assert model.apply_chat_template(talk) == "[user] Hi[assistant] "
    assert model.apply_chat_template(talk, add_generation_prompt=False) == "[user] Hi"
    assert model.chat_template(True) and model.tokenizer_name
    with pytest.raises(ValueError, match="no chat template"):
        adapter(lm).apply_chat_template(talk)
