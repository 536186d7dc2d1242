"""Request traces: the published formats, what is left out or estimated, and errors that name file, line and column."""

from __future__ import annotations

import gzip
import json

import flagsaver
import pytest

from paged_dist.launch.common import flag_registry
from paged_dist.launch.serving import workload_flags
from paged_dist.launch.serving.traces import read_trace
from paged_dist.launch.serving.workload import MOST_TOKENS, Request, shorten

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURSTGPT = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
SHAREGPT = [
    {
        "id": "a",
        "conversations": [
            {"from": "human", "value": "12345678"},
            {"from": "gpt", "value": "123456789"},
            {"from": "human", "value": "and then?"},
            {"from": "gpt", "value": "nothing"},
        ],
    },
    {"id": "empty", "conversations": []},
    {"id": "asked", "conversations": [{"from": "human", "value": "hello?"}]},
    {
        "id": "goes on",  # an answer without a question is part of the prompt
        "conversations": [
            {"from": "gpt", "value": "four"},
            {"from": "user", "value": "é€"},
            {"from": "assistant", "value": "a"},
        ],
    },
]


def write(tmp_path, content, name="trace.csv"):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lengths(trace):
    assert [r.id for r in trace.requests] == list(range(len(trace.requests)))
    return [(r.context, r.generated) for r in trace.requests]


FILES = {
    "azure 2023": (
        "azure",
        HEADER + "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n",
        [(374, 44), (396, 109)],
    ),
    "azure 2024": ("azure", HEADER + "2024-05-10 00:00:00.009930+00:00,2162,5\n", [(2162, 5)]),
    "burstgpt": (
        "burstgpt",
        BURSTGPT
        + "5,ChatGPT,472,18,490,Conversation log\n45,ChatGPT,1087,0,1087,API log\n118,GPT-4,417.0,276,693,API log\n",
        [(472, 18), (417, 276)],
    ),
    "mooncake": (
        "mooncake",
        '{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1, 2]}\n\n'
        '{"timestamp": 3000, "input_length": 7322, "output_length": 490, "hash_ids": [0, 14]}\n',
        [(6758, 500), (7322, 490)],
    ),
    "mooncake in a list": ("mooncake", '[\n{"input_length": 6, "output_length": 5.0}]', [(6, 5)]),
    "sharegpt": ("sharegpt", json.dumps(SHAREGPT, indent=1, ensure_ascii=False), [(2, 3), (3, 1)]),
    "sharegpt in lines": ("sharegpt", "\n".join(map(json.dumps, SHAREGPT)), [(2, 3), (3, 1)]),
}
SKIPPED = {"burstgpt": 1, "sharegpt": 2, "sharegpt in lines": 2}


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", FILES)
def test_a_published_format_is_found_out_and_named_plain_or_gzipped(tmp_path, name, zipped):
    format, text, want = FILES[name]
    # The name says nothing of what is in it.
    path = write(tmp_path, gzip.compress(text.encode()) if zipped else text, "trace")
    found = read_trace(path)
    assert lengths(found) == want and (found.format, found.skipped) == (format, SKIPPED.get(name, 0))
    assert read_trace(path, format=format) == found
    assert read_trace(path, limit=1).requests == found.requests[:1]
    assert read_trace(path, limit=1).skipped == 0


@pytest.mark.parametrize("before", ["\ufeff", "# made by hand\n#\n\n", "\ufeff# both\n"])
@pytest.mark.parametrize("name", FILES)
def test_a_byte_order_mark_and_comments_before_the_header_are_passed_over(tmp_path, name, before):
    _, text, want = FILES[name]
    assert lengths(read_trace(write(tmp_path, before + text))) == want


def test_columns_may_come_in_another_order_with_spaces_others_and_line_ends_of_windows(tmp_path):
    path = write(tmp_path, "GeneratedTokens, ContextTokens,x,x\r\n7,8,,\r\n\r\n9, 10.0 ,1,2\r\n")
    assert lengths(read_trace(path)) == [(8, 7), (10, 9)]


def test_the_name_in_reports_says_what_was_left_out_and_what_is_estimated(tmp_path):
    azure = write(tmp_path, HEADER + "t,5,6\nt,5,0\nt,0,3\nt,7,8\n", "azure.csv")
    assert read_trace(azure).name == "azure.csv (azure), 2 without prompt or answer left out"
    assert read_trace(azure, limit=1).name == "azure.csv (azure)"
    sharegpt = write(tmp_path, json.dumps(SHAREGPT), "sharegpt.json")
    assert read_trace(sharegpt).name == (
        "sharegpt.json (sharegpt, token counts estimated, 4 bytes of text each), 2 without prompt or answer left out"
    )
    flag_registry.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(trace=str(sharegpt), trace_format="sharegpt", num_requests=1, repeat_requests=2):
        requests, name = workload_flags.requests_from_flags()
    assert requests == [Request(0, 2, 3), Request(1, 2, 3)]
    assert name == "sharegpt.json (sharegpt, token counts estimated, 4 bytes of text each), 2 times over"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (HEADER + "t,5,6\nt,five,6\n", "line 3 has ContextTokens 'five'"),
        (HEADER + "t,5,6\n\nt,7\n", "line 4 has 2 fields, the header 3: 't,7'"),
        (BURSTGPT + "5,GPT,4,with a comma,472,18,490,log\n", "line 2 has 8 fields, the header 6"),
        ("# a comment\n" + HEADER + "t,5,\n", "line 3 has GeneratedTokens ''"),
        (HEADER + "t,5,0\n", "holds no request but 1 without prompt or answer"),
        (HEADER + "t,-5,1\n", "line 2 has ContextTokens '-5'"),
        (HEADER + "t,5,1.5\n", "line 2 has GeneratedTokens '1.5'"),
        (HEADER + "t,1_0,1\n", "line 2 has ContextTokens '1_0'"),
        (HEADER + "t,nan,1\n", "line 2 has ContextTokens 'nan'"),
        (HEADER + "t,٣,1\n", "line 2 has ContextTokens '٣'"),
        (HEADER + f"t,{2**31},1\n", "line 2 has ContextTokens '2147483648'; it must be a whole number"),
        (HEADER + 't,"5\n', "line 2 is no CSV"),
        (HEADER, "holds no request"),
        ("", "line 1 has no columns of a known trace: ''"),
        ("a,ContextTokens\n1,2\n", "line 1 has no column GeneratedTokens, only ContextTokens: 'a, ContextTokens'"),
        ("a,b\n1,2\n", "line 1 has no columns of a known trace: 'a, b'"),
        ("ContextTokens,GeneratedTokens,ContextTokens\n1,2,3\n", "line 1 names column ContextTokens twice"),
        (b"\x80\x04\x95\xff\x00", "is no text file"),
        ('{"input_length": 5, "output_length": 6}\n{"input_length": 5}\n', "line 2 has no column output_length"),
        ('{"input_length": 5, "output_length": 6}\n{"input_length": 5,\n', "line 2 column 20 is no JSON"),
        ('{"input_length": 5, "output_length": 6}\n[5, 6]\n', "line 2 is no JSON object: [5, 6]"),
        ('{"input_length": 5, "output_length": true}\n', "line 1 has output_length True"),
        ('{"input_length": null, "output_length": 1}\n', "line 1 has input_length None"),
        ('{"input_length": 5, "input_length": 6, "output_length": 1}\n', "line 1 names input_length twice"),
        ('{"input_length": 5}\n', "line 1 has no column output_length, only input_length"),
        ("[]", "holds no request"),
        ("[1]", "item 0 is no JSON object: 1"),
        ('[\n{"id": 1},\nx]', "line 3 column 1 is no JSON"),
        ('[{"conversations": [{"from": "human"}]}]', """item 0 has conversations[0] {"from": "human"}"""),
        ('[{"conversations": []}, {"conversations": 5}]', "item 1 has no list of conversations"),
        ("[" * 100000, "nested too deep"),
        (gzip.compress(f"{HEADER}t,5,6\n".encode(), mtime=0)[:-9], "is a broken gzip file"),
        (b"\x1f\x8bnot gzip at all", "is a broken gzip file"),
    ],
)  # fmt: skip
def test_what_is_no_trace_is_refused_by_file_line_and_column(tmp_path, text, says):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=r"trace\.csv") as e:
        read_trace(path)
    assert str(e.value).startswith(f"--trace={str(path)!r}: ") and says in str(e.value)


@pytest.mark.parametrize(
    ("format", "text", "says"),
    [
        ("azure", BURSTGPT + "5,ChatGPT,472,18,490,log\n", "line 1 has no column ContextTokens"),
        ("burstgpt", HEADER + "t,5,6\n", "line 1 has no column Request tokens"),
        ("mooncake", HEADER + "t,5,6\n", "line 1 has no column input_length"),
        ("mooncake", json.dumps(SHAREGPT), "item 0 has no column input_length: 'id, conversations'"),
        ("sharegpt", HEADER + "t,5,6\n", "--trace_format='sharegpt': "),
        ("sharegpt", '{"input_length": 5, "output_length": 6}\n', "line 1 has no list of conversations"),
        ("csv", HEADER + "t,5,6\n", "--trace_format='csv': must be one of azure, burstgpt, mooncake, sharegpt"),
    ],
)
def test_a_named_format_is_kept_to(tmp_path, format, text, says):
    with pytest.raises(ValueError, match="trace") as e:
        read_trace(write(tmp_path, text), format=format)
    assert says in str(e.value)


def test_a_file_in_two_formats_is_read_in_the_one_that_is_named(tmp_path):
    path = write(tmp_path, "ContextTokens,GeneratedTokens,Request tokens,Response tokens\n1,2,3,4\n")
    with pytest.raises(ValueError, match=r"line 1 has the columns of azure and burstgpt: .* give --trace_format=azure"):
        read_trace(path)
    assert lengths(read_trace(path, format="azure")) == [(1, 2)]
    assert lengths(read_trace(path, format="burstgpt")) == [(3, 4)]


@pytest.mark.parametrize("name", ["absent.csv", "."])
def test_a_trace_that_cannot_be_opened_is_a_value_error(tmp_path, name):
    with pytest.raises(ValueError, match="cannot be read"):
        read_trace(tmp_path / name)


def test_more_tokens_than_a_position_can_number_are_refused_with_what_works(tmp_path):
    flag_registry.FLAGS.mark_as_parsed()
    path = str(write(tmp_path, HEADER + "t,5,6\nt,2000000000,147483393\n"))
    with flagsaver.flagsaver(trace=path), pytest.raises(ValueError, match="request 1 has 2147483393 tokens") as e:
        workload_flags.requests_from_flags()
    assert str(e.value).startswith("--trace=") and f"at most {MOST_TOKENS}" in str(e.value)
    advised = dict(part.removeprefix("--").split("=") for part in str(e.value).split(";")[-1].split()[:2])
    with flagsaver.flagsaver(trace=path, **{name: int(value) for name, value in advised.items()}):
        requests, _ = workload_flags.requests_from_flags()
    assert max(r.tokens for r in requests) <= MOST_TOKENS
    with flagsaver.flagsaver(length_scale=1e308), pytest.raises(ValueError, match=r"--length_scale=1e.308: request"):
        workload_flags.requests_from_flags()
    assert shorten([Request(0, 3, 4)], 1e308, 10, 9) == [Request(0, 10, 9)]
    with flagsaver.flagsaver(trace_format="azure"), pytest.raises(ValueError, match="'azure': needs --trace"):
        workload_flags.requests_from_flags()
