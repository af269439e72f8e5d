"""onnxruntime-genai itself on bundles as they are, beside this package's own runtime."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import checkpoints
import older_checkpoints
import pytest
import watching
from conftest import TINY_CHECKPOINT
from environments import environment

import doge_onnx
from doge_onnx.runtime.text.tokenizer import TextStream, Tokenizer

pytestmark = pytest.mark.external

PROMPT = "It was a dark and stormy night"
# Of doge-tiny in int8, the 20th token is nearly as likely as another one: there, the order in which
# attention sums up decides, and genai has another one.
TOKENS = 16
# Lengths differ, and one is a single token.
PROMPTS = [PROMPT, "Hello", "The cat sat on the mat, and then it said"]
TEXTS = [
    "Hello world",
    "  two  spaces\n\nlines\t tab ",
    "naïve café — “quotes” … ½ Ⅳ",
    "日本語 テスト",
    "🐕 👩‍👩‍👧 e\u0301 \u200b",
    "<|begin_of_text|>special<|pad|> <|eot_id|>\n",
    "<|end_of",
    "don't we'll I'VE 'S 12345 6.78\r\n",
    "\n",
]
MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": " Hello, \n“you”! "},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Who are you?"},
]
# The form of the Doge models that are tuned on instructions. It says itself where newlines are:
# onnxruntime-genai does not drop those behind blocks.
TEMPLATE = (
    "{{- bos_token }}\n{%- for message in messages %}\n"
    "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n' }}\n"
    "    {{- message['content'] | trim + eos_token + '\\n\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n' }}\n"
    "{%- endif %}\n"
)
CONTEXT = 64
RANDOM = {"vocab_size": 4096, "max_position_embeddings": CONTEXT, "num_hidden_layers": 1}
MIXTURE = {"is_moe": True, "num_experts": 64, "num_experts_per_tok": 4}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}

# What is exported how. The first two are on the model that was trained, the others on random ones.
BUNDLES: dict[str, tuple[str, dict, dict]] = {
    "int8": ("tiny", {}, {"precision": "int8", "rounding": "nearest"}),
    "int4": ("tiny", {}, {"precision": "int4", "rounding": "nearest"}),
    "int8 state": (
        "native",
        {},
        {"precision": "int8", "rounding": "nearest", "kv_cache": "int8"},
    ),
    "mixture": ("native", {**MIXTURE, "num_hidden_layers": 2}, {}),
    "mixture, int8": ("native", MIXTURE, {"precision": "int8", "rounding": "nearest"}),
    "mixture, int4": ("native", MIXTURE, {"precision": "int4", "rounding": "nearest"}),
    "older, layout of the Hub": ("older", {}, {"layout": "hub"}),
    "older mixture, int4": ("older", MIXTURE, {"precision": "int4", "rounding": "nearest"}),
    # Longer than the trained context, and than the window.
    "beyond": (
        "native",
        {"max_position_embeddings": 16, "keep_window_size": 24, "rope_parameters": DYNAMIC},
        {"context_length": CONTEXT},
    ),
}


def python() -> Path:
    """What runs in an environment with onnxruntime-genai."""
    return environment(Path(__file__).parent / "requirements" / "genai.txt")


class Genai:
    """A process with onnxruntime-genai in it."""

    def __init__(self, bundle: Path | None = None, process: subprocess.Popen | None = None) -> None:
        self.bundle = bundle
        self.process = process or subprocess.Popen(
            [
                python(),
                Path(__file__).parent / "genai_worker.py",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def of(self, bundle: Path) -> Genai:
        """The same process for another bundle."""
        return Genai(bundle, self.process)

    def __call__(self, call: str, **arguments):
        reply = self.reply(call, **arguments)
        assert "error" not in reply, reply["error"]
        return reply["result"]

    def reply(self, call: str, **arguments) -> dict:
        request = {"bundle": str(self.bundle), "call": call, **arguments}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def genai():
    started = Genai()
    yield started
    started.process.stdin.close()
    assert started.process.wait() == 0


@pytest.fixture(scope="module")
def chat_bundle(tmp_path_factory):
    """examples/doge-tiny as if it were tuned on instructions, with sampling recommended."""
    checkpoint = shutil.copytree(TINY_CHECKPOINT, tmp_path_factory.mktemp("chat") / "checkpoint")
    path = checkpoint / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    generation = {
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "min_length": 9,
        "max_length": 1000,
        # The full stop, too.
        "eos_token_id": [19, 1],
        "bos_token_id": 0,
        "pad_token_id": 3,
    }
    (checkpoint / "generation_config.json").write_text(json.dumps(generation))
    return doge_onnx.export(checkpoint, checkpoint.parent / "bundle", verify=False).path


@pytest.fixture(scope="module")
def make(tmp_path_factory, tiny_bundle, tiny_portable_bundle):
    made = {"fp32": tiny_bundle, "portable": tiny_portable_bundle}

    def get(name: str) -> Path:
        if name not in made:
            kind, overrides, options = BUNDLES[name]
            directory = tmp_path_factory.mktemp("genai")
            checkpoint = TINY_CHECKPOINT
            if kind != "tiny":
                checkpoint = directory / "checkpoint"
                older_checkpoints.make(checkpoint, kind, **{**RANDOM, **overrides})
                for tokenizer in TINY_CHECKPOINT.glob("tokenizer*.json"):
                    shutil.copy(tokenizer, checkpoint)
            made[name] = doge_onnx.export(
                checkpoint, directory / "bundle", verify=False, **options
            ).path
        return made[name]

    return get


@pytest.fixture(params=["fp32", "portable", *BUNDLES])
def any_bundle(request, make):
    return make(request.param)


def own(bundle: Path) -> doge_onnx.Model:
    """A bundle with the kernels that genai has, too."""
    return doge_onnx.load(bundle, native=False)


def continuations(bundle: Path, prompts: list, count: int, **options) -> list[list[int]]:
    model = own(bundle)
    completions = model.generate_batch(prompts, max_new_tokens=count, temperature=0, **options)
    return [completion.token_ids for completion in completions]


def test_greedy_text_streamed_is_that_of_the_own_runtime(any_bundle, genai):
    model = own(any_bundle)
    ours = list(model.stream(PROMPT, max_new_tokens=TOKENS))
    length = len(model.tokenizer.encode(PROMPT)) + TOKENS
    theirs = genai.of(any_bundle)("stream", prompt=PROMPT, max_length=length)
    # What ends in half a character comes at the end, or is held back until it is whole.
    assert "".join(theirs) == "".join(piece.text for piece in ours)
    assert [piece for piece in theirs if piece] == [piece.text for piece in ours if piece.text]
    assert len(theirs) == TOKENS


def test_a_padded_batch_gets_what_each_prompt_gets_alone(any_bundle, genai):
    ids = genai.of(any_bundle)("encode_batch", texts=PROMPTS)
    # It pads on the right.
    assert [row[-1] == 2 for row in ids] == [True, True, False]
    batch = genai.of(any_bundle)("generate", prompts=ids, max_length=len(ids[0]) + 16)
    assert batch == continuations(any_bundle, PROMPTS, 16)


def test_up_to_the_end_of_the_context(make, genai):
    for name in ("mixture", "beyond", "int8 state"):
        bundle = make(name)
        ids = checkpoints.random_ids(CONTEXT - 9, 4096, seed=2)
        theirs = genai.of(bundle)("generate", prompts=[ids])
        assert theirs == continuations(bundle, [ids], 100)
        assert len(theirs[0]) == 9
        full = checkpoints.random_ids(CONTEXT, 4096)
        assert "max_length" in genai.of(bundle).reply("generate", prompts=[full])["error"]
        reply = genai.of(bundle).reply("generate", prompts=[ids], max_length=CONTEXT + 1)
        assert "context_length" in reply["error"]


def test_a_prompt_longer_than_a_chunk(tiny_bundle, genai):
    # The end-of-text token is none of them.
    ids = [3 + i % 4000 for i in checkpoints.random_ids(700, 1 << 20, seed=1)]
    ours = continuations(tiny_bundle, [ids], 12)
    asked = {"prompts": [ids], "max_length": len(ids) + 12}
    assert genai.of(tiny_bundle)("generate", **asked) == ours
    assert genai.of(tiny_bundle)("generate", **asked, chunk_size=256) == ours


@pytest.mark.parametrize("name", ["fp32", "portable", "int8 state"])
def test_a_generator_that_is_continued_and_rewound(make, genai, name):
    bundle = make(name)
    model = own(bundle)
    first, then = ([3 + i % 4000 for i in checkpoints.random_ids(9, 1 << 20, s)] for s in (1, 2))
    answer = continuations(bundle, [first], 5)[0]
    assert 1 not in answer
    both, again, anew, further = continuations(
        bundle, [first + then, first + then + first, then, first + answer + then], 5
    )
    end = len(first) + len(answer)
    assert model.manifest.context_length >= end + len(then) + 5
    told = genai.of(bundle)(
        "script",
        actions=[
            ["append", first],
            ["append", then],
            ["generate", 5],
            ["rewind", len(first) + len(then)],
            ["append", first],
            ["generate", 5],
            ["rewind", len(first)],
            ["append", then],
            ["generate", 5],
            ["rewind", 0],
            ["append", then],
            ["generate", 5],
            ["rewind", 0],
            ["append", first],
            ["generate", 5],
            # The last token that it chose is not in the state yet, and it would go on without; and
            # it does not rewind by that one alone where the state is copied.
            ["rewind", end - 2],
            ["append", [*answer[-2:], *then]],
            ["generate", 5],
        ],
        max_length=50,
    )
    assert told == [both, again, both, anew, answer, further]


def test_several_generators_of_one_model(tiny_bundle, genai):
    tokenizer = Tokenizer(tiny_bundle / "tokenizer.json")
    ids = [tokenizer.encode(prompt) for prompt in PROMPTS]
    theirs = genai.of(tiny_bundle)("in_turn", prompts=ids, count=8, max_length=40)
    assert theirs == continuations(tiny_bundle, PROMPTS, 8)


@pytest.mark.parametrize("special", [True, False])
def test_text_becomes_the_same_tokens(chat_bundle, genai, special):
    tokenizer = Tokenizer(chat_bundle / "tokenizer.json")
    texts = [*TEXTS, "\ufffd"]
    theirs = genai.of(chat_bundle)("encode", texts=texts, add_special_tokens=special)
    assert theirs == [tokenizer.encode(text, add_special_tokens=special) for text in texts]


def test_tokens_become_the_same_text_piece_by_piece(chat_bundle, genai):
    tokenizer = Tokenizer(chat_bundle / "tokenizer.json")
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        whole, pieces = genai.of(chat_bundle)("decode", ids=ids)
        stream = TextStream(tokenizer, [])
        assert pieces == [stream.push(token_id) for token_id in ids]
        assert whole == "".join(pieces)


def test_the_chat_template_gives_the_same_prompt_and_answer(chat_bundle, genai):
    model = own(chat_bundle)
    for messages in (MESSAGES, MESSAGES[1:2]):
        prompt = genai.of(chat_bundle)("template", messages=messages)
        assert prompt == model.apply_chat_template(messages)
        # It adds special tokens only if it is told to; the template has them.
        ids = genai.of(chat_bundle)("encode", texts=[prompt], add_special_tokens=False)[0]
        assert ids == watching.prompt_ids(model, messages)
        theirs = genai.of(chat_bundle)(
            "generate", prompts=[ids], max_length=len(ids) + 40, do_sample=False
        )
        ours = model.generate(messages, max_new_tokens=40, temperature=0)
        assert theirs == [ours.token_ids[:-1]] or theirs == [ours.token_ids]


def test_the_turns_of_a_conversation(chat_bundle, genai):
    model = own(chat_bundle)
    chat = model.chat(temperature=0, max_new_tokens=40)
    tokenizer = Tokenizer(chat_bundle / "tokenizer.json")
    actions, answers, before = [], [], ""
    for content in ("Hello", "And then?"):
        answer = chat.send(content)
        # So the end-of-text token, which it does not keep, is written by the template.
        assert answer.finish_reason == "eos"
        assert answer.token_ids[-1] == 19
        text = model.apply_chat_template(chat.messages[:-1])
        ids = tokenizer.encode(text.removeprefix(before), add_special_tokens=False)
        actions += [["append", ids], ["generate", len(answer.token_ids)]]
        answers.append(answer.token_ids)
        before = text + answer.text
    theirs = genai.of(chat_bundle)("script", actions=actions, max_length=300, do_sample=False)
    assert theirs == answers


def test_the_configuration_is_that_of_the_checkpoint(chat_bundle, tiny_bundle, genai):
    recommended = genai.of(chat_bundle)("search_options")
    expected = {
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "min_length": 9,
        "max_length": 1000,
        "past_present_share_buffer": True,
        "bos": 0,
        "eos": [1, 19],
        "pad": 3,
    }
    for name, value in expected.items():
        assert recommended[name] == pytest.approx(value), name
    plain = genai.of(tiny_bundle)("search_options")
    # Its own default of top_k is 50.
    assert (plain["do_sample"], plain["top_k"], plain["top_p"]) == (False, 0, 1)
    assert (plain["bos"], plain["eos"], plain["pad"]) == (0, [1], 2)


def test_what_its_configuration_takes_over_has_the_same_effect(chat_bundle, genai):
    model = own(chat_bundle)
    ids = model.tokenizer.encode(PROMPT)
    texts = []
    longer = {"min_length": len(ids) + 20}
    for options in ({}, longer, {**longer, "no_repeat_ngram_size": 2}):
        options = {"max_length": len(ids) + 30, "repetition_penalty": 1.0, **options}
        ours = model.generate(ids, temperature=0, **options).token_ids
        theirs = genai.of(chat_bundle)("generate", prompts=[ids], do_sample=False, **options)
        # It drops the full stop that ends a text.
        assert theirs[0] == ours or [*theirs[0], 19] == ours
        texts.append(ours)
    assert len({tuple(text) for text in texts}) == 3


def test_sampling_as_the_checkpoint_recommends(chat_bundle, genai):
    run = genai.of(chat_bundle)
    model = own(chat_bundle)
    ids = model.tokenizer.encode("Hello")
    asked = {"prompts": [ids], "max_length": len(ids) + 12}
    texts = [run("generate", **asked, random_seed=seed)[0] for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert len({tuple(text) for text in texts}) > 1
    # A penalty works as it does here, and any of several ids ends a text.
    greedy = model.generate(ids, max_new_tokens=12, temperature=0).token_ids
    assert run("generate", **asked, do_sample=False)[0] == [i for i in greedy if i != 19]
    unlike = model.generate(ids, max_new_tokens=12, temperature=0, repetition_penalty=1.0)
    assert unlike.token_ids != greedy
    # Without filters, tokens beyond the first fifty come up as well.
    logits, _ = model.forward([ids])
    best = set(logits[0, 0].argsort()[::-1][:50].tolist())
    wild = {"do_sample": True, "temperature": 3.0, "top_k": 0, "top_p": 1.0}
    asked["max_length"] = len(ids) + 1
    first = [run("generate", **asked, **wild, random_seed=seed)[0] for seed in range(40)]
    assert not best.issuperset(token for tokens in first for token in tokens)


def test_a_key_that_it_does_not_know_is_refused(tiny_bundle, tmp_path, genai):
    # So genai_config.json holds nothing that another release may lack without being seen here.
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    config = json.loads((bundle / "genai_config.json").read_text())
    config["search"]["min_p"] = 0.1
    (bundle / "genai_config.json").write_text(json.dumps(config))
    assert "min_p" in genai.of(bundle).reply("search_options")["error"]


def test_the_examples_in_the_documentation(chat_bundle, tmp_path):
    text = (Path(__file__).parent.parent / "docs" / "genai.md").read_text(encoding="utf-8")
    # The last one, which is indented, is a part of another.
    plain, chat = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    (tmp_path / "bundle").symlink_to(chat_bundle)
    model = own(chat_bundle)
    messages = [{"role": "user", "content": "Hello"}]
    for code, prompt, printed in ((plain, "Once upon a time", ""), (chat, messages, None)):
        result = subprocess.run(
            [python(), "-c", code],
            cwd=tmp_path,
            capture_output=True,
            encoding="utf-8",
            check=True,
        )
        length = 40 - len(watching.prompt_ids(model, prompt))
        answer = model.generate(prompt, max_new_tokens=length, temperature=0).text
        assert answer
        if printed is None:
            # All of it, without special tokens.
            printed = "user\nHello\n\nassistant\n"
            answer += "\n"
        assert result.stdout.removesuffix(".") == printed + answer
