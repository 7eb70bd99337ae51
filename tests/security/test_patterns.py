"""Patterns in an untrusted adapter_config.json: as Python's `re` matches them, in bounded time, or refused by name."""

import json
import re
import time

import hypothesis
import pytest
from adapters.small_models import copied, lora_model, refused
from hypothesis import given
from hypothesis import strategies as st

from lora_nlu.adapters.patterns import check_pattern, matching
from lora_nlu.adapters.reading import read_adapter
from lora_nlu.adapters.writing import save_adapter
from lora_nlu.errors import UserError
from lora_nlu.files import ADAPTER_CONFIG

NAMES = [f"roberta.encoder.layer.{i}.attention.self.{part}" for i in (0, 1, 10) for part in ("query", "key", "value")]
SLOW = [
    "([a-z.0-9]+)+!", "(.*)*!", "(a|a)*" * 20 + "!", "(?:.*.*)*!", ".*" * 40 + "!", "(?=(.*.*)*!).*",
    "(.?){60}" * 9 + "!",
    "((((.*)*)*)*)*!", "(" * 60 + ".*" + ")*" * 60 + "!", "((.{0,500}){0,500}){0,500}!", "(?:){65535}" * 9 + "(.+)+!",
    "(r|ro|rob|robe|rober|robert|roberta|.)*" * 30 + "!",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    save_adapter(lora_model(), tmp_path / "right", {"task": "custom", "labels": ["a", "b", "c"]})
    return tmp_path / "right"


@pytest.mark.parametrize("pattern", SLOW, ids=range(len(SLOW)))
@pytest.mark.parametrize(
    "setting", ["target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"]
)
def test_a_pattern_that_takes_forever_in_re_is_refused_or_matched_within_seconds(setting, pattern, folder, tmp_path):
    value = {pattern: 2} if setting in ("rank_pattern", "alpha_pattern") else pattern
    copied(folder, tmp_path, **{setting: value, "layers_to_transform": [0, 1] if setting == "layers_pattern" else None})
    begun = time.process_time()
    try:
        read_adapter(str(tmp_path)).layers()
    except UserError as e:
        assert str(tmp_path) in str(e) and str(e).count("\n") < 3
    assert time.process_time() - begun < 8


def test_many_patterns_are_bounded_together(folder, tmp_path):
    many = [f"(x{i}+)+y" for i in range(4000)], [f"layer{i}" for i in range(6000)], [f"[{'a' * 9000}]"] * 99
    for patterns in many:
        begun = time.process_time()
        copied(folder, tmp_path, rank_pattern={f"{pattern}{i}": 2 for i, pattern in enumerate(patterns)})
        assert "too many" in refused(tmp_path)
        assert time.process_time() - begun < 8


PLAIN = st.sampled_from(
    ["query", "layer", r"\.", ".", "roberta", "1", "0", "[a-z]", "[^.]", r"\d", r"\w", "^", "$", r"\b"]
)
PARTS = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,}", "{,3}", "{0,2}?"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.tuples(st.sampled_from(["(?=", "(?!"]), inner).map(lambda pair: f"{pair[0]}{pair[1]})"),
    ),
    max_leaves=6,
)


@hypothesis.settings(max_examples=400, deadline=None)
@given(pattern=PARTS, prefix=st.sampled_from(["", ".*", r".*\."]))
def test_a_pattern_matches_what_it_matches_in_re(pattern, prefix):
    pattern, names = prefix + pattern, ["query", "layer.1.query", "roberta.layer.0", "1", "a.b"]
    full, ends = re.compile(pattern), re.compile(rf"(.*\.)?({pattern})$")
    check_pattern(pattern)
    assert [*matching([pattern], names)] == [name for name in names if full.fullmatch(name)]
    assert [*matching([pattern], names, ends_name=True)] == [name for name in names if ends.match(name)]


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(query|value)", ".*(self_attn|attention).*(query|value)$",
        "^roberta.encoder.layer.1.attention.self.query",
        r"(?:.*?(?:self|cross).*?(?:query|value).*?)|(?:\brob\.layers\.[\d]{1,}\.query)", r"(\w+\.)*query", "query",
        r"^(?!.*key).*layer\.(?:[0-9]|1[01])\..*(?:query|value)$", r"[\w.]+\.layer\.\d+\..*\.value", "layer.{1,3}a.*y",
    ],
)  # fmt: skip
def test_patterns_of_the_kinds_that_people_write_are_read(pattern):
    check_pattern(pattern)
    assert [*matching([pattern], NAMES)] == [name for name in NAMES if re.fullmatch(pattern, name)]


@pytest.mark.parametrize(
    "pattern",
    [r"(a)\1", "(?P<n>a)(?P=n)", "(?<=a)b", "(?<!a)b", "(?i:QUERY)", "(?>a*)b", "a*+b", "a++", "(?#x)a", "(?i)q"],
)
def test_other_forms_are_refused_by_name(pattern, folder, tmp_path):
    copied(folder, tmp_path, target_modules=pattern)
    message = refused(tmp_path)
    assert "target_modules" in message and pattern in message


def test_an_adapter_with_a_rank_for_each_of_its_layers_is_read(tmp_path):
    model = lora_model(num_hidden_layers=12, hidden_size=8, num_attention_heads=2, intermediate_size=8)
    save_adapter(model, tmp_path / "right", {})
    ranks = {f"roberta.encoder.layer.{i}.attention.self.{part}": 4 for i in range(400) for part in ("query", "value")}
    copied(tmp_path / "right", tmp_path, rank_pattern=ranks, r=3)
    assert len(read_adapter(str(tmp_path)).ranks) == 24
    config = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    assert len(config["rank_pattern"]) == 800
