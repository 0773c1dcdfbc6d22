import io
import math

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from rlhf_jax.core.errors import UserError
from rlhf_jax.metrics.completions import (
    CompletionsTable,
    column_names,
    read_completions,
    write_completions,
)

ROWS = [
    {
        "prompt": "2+2=?",
        "completion": "[red]4[/red]\nso 4",
        "reward": 1.5,
        "length": 3,
        "reward/exact": 1.0,
        "reward/brief": 0.5,
        "advantage": 0.25,
        "logp": -1.25,
        "kl": 0.125,
        "answer": "4",
        "tags": ["sum", 2],
    },
    {"prompt": "3+2=?", "completion": "6", "reward": None, "length": 1, "answer": "5"},
]


def test_columns_stand_in_the_order_people_read_them():
    names = ["prompt", "completion", "reward", "reward/exact", "reward/brief", "advantage", "length", "logp"]
    assert column_names(ROWS) == [*names, "kl", "answer", "tags"]


def test_tables_are_parquet_by_step_and_come_back(tmp_path):
    write_completions(tmp_path, 20, ROWS[:1])
    write_completions(tmp_path, 3, ROWS)
    path = tmp_path / "completions" / "00000003.parquet"
    table = pq.read_table(path).to_pydict()
    assert table["step"] == [3, 3]
    assert table["reward"] == [1.5, None]
    assert table["length"] == [3.0, 1.0]
    assert table["tags"] == ['["sum", 2]', None]
    found = read_completions(tmp_path)
    assert list(found) == [3, 20]
    assert found[3][1]["completion"] == "6"
    assert found[20][0]["kl"] == 0.125


def test_what_belongs_to_single_tokens_stands_in_lists_and_in_no_table_for_people(tmp_path):
    of_tokens = {"token/text": ["a", "b"], "token/kl": [0.5, None]}
    path = write_completions(tmp_path, 3, [{**ROWS[0], **of_tokens}, ROWS[1]])
    table = pq.read_table(path).to_pydict()
    assert table["token/text"] == [["a", "b"], None]
    assert table["token/kl"] == [[0.5, None], None]
    assert read_completions(tmp_path)[3][0]["token/kl"] == [0.5, None]
    assert not any(name.startswith("token/") for name in column_names([{**ROWS[0], **of_tokens}]))


def test_a_step_done_again_replaces_its_table(tmp_path):
    for rows in (ROWS, ROWS[1:]):
        write_completions(tmp_path, 3, rows)
    assert [row["prompt"] for row in read_completions(tmp_path)[3]] == ["3+2=?"]


def test_a_damaged_table_is_named(tmp_path):
    assert read_completions(tmp_path) == {}
    path = write_completions(tmp_path, 3, ROWS)
    path.write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match=r"00000003\.parquet: not a table of completions"):
        read_completions(tmp_path)


def test_a_bit_of_a_table_is_named_or_changes_nothing(tmp_path):
    path = write_completions(tmp_path, 3, ROWS)
    whole, expected, refused = path.read_bytes(), read_completions(tmp_path), []
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            assert read_completions(tmp_path) == expected
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > len(whole) / 70
    assert all(text.startswith(f"{path}: not a table of completions") for text in refused)
    assert not any("\n" in text for text in refused)


def test_the_console_shows_texts_as_they_are_and_each_reward():
    console = Console(file=io.StringIO(), width=120)
    rows = [{**ROWS[0], "kl": math.nan}, *ROWS[1:], {**ROWS[1], "prompt": "not shown"}]
    console.print(CompletionsTable(rows, step=7, count=2))
    text = console.file.getvalue()
    for word in ("Completions at step 7", "[red]4[/red]", "exact", "brief", "0.25", "-1.25", "3+2=?"):
        assert word in text
    assert "not shown" not in text
    assert "reward/exact" not in text


def test_long_texts_are_cut():
    console = Console(file=io.StringIO(), width=100)
    console.print(CompletionsTable([{"prompt": "p", "completion": "word " * 400}], step=1, count=1))
    assert 240 // 5 <= console.file.getvalue().count("word") <= 240 // 5 + 1
    assert "…" in console.file.getvalue()


MANY = {
    "prompt": "How many? " * 9,
    "completion": "Twelve. " * 20,
    "reward": 0.1235,
    "reward/format_reward_function": 1.0,
    "reward/gsm8k_reward": -5e-8,
    "advantage": -1.234,
    "length": 123.0,
    "logp": -123.5,
    "kl": 1.23e-15,
}
SHOWN = ["0.1235", "1", "-5.00e-08", "-1.234", "123", "-123.5", "1.23e-15"]


@pytest.mark.parametrize(("width", "whole"), [(40, 1), (80, 5), (120, 7), (200, 7)])
def test_numbers_are_never_broken_and_what_has_no_room_is_named(width, whole):
    console = Console(file=io.StringIO(), width=width, _environ={})
    console.print(CompletionsTable([MANY], step=7, count=1))
    lines = console.file.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    below = next(place for place, line in enumerate(lines) if "───" in line)
    assert lines[below + 1].split()[-whole:] == SHOWN[:whole]
    said = " ".join(" ".join(lines).split()).partition("not shown in this width: ")[2]
    left_out = ["reward", "format_reward_function", "gsm8k_reward", "advantage", "length", "logp", "kl"][
        whole:
    ]
    assert said == ", ".join(left_out)


def test_headers_fold_behind_underscores_where_there_is_little_room():
    console = Console(file=io.StringIO(), width=80, _environ={})
    console.print(CompletionsTable([MANY], step=7, count=1))
    head = console.file.getvalue().partition("───")[0].split()
    assert {"format_", "reward_", "function", "gsm8k_", "advantage", "length"} <= set(head)
