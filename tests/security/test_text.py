"""Text of untrusted files on the screen, and text that Python reads as a number though people would not."""

import pytest
import torch

from lora_nlu.adapters.adapter import Adapter
from lora_nlu.adapters.converting import write_published
from lora_nlu.adapters.reading import read_adapter
from lora_nlu.data.glue import load_glue_folder
from lora_nlu.data.tasks import TASKS
from lora_nlu.data.user_files import load_files
from lora_nlu.errors import UsageError, UserError, printable_lines
from lora_nlu.report.similarity import compare
from lora_nlu.training import processes
from lora_nlu.training.arguments import parse_names
from lora_nlu.training.parsing import parse_arguments

ESCAPE = "a\x1b[2Jb"


def test_what_a_program_prints_keeps_its_lines_and_has_no_control_characters(capsys):
    def fail(_):
        raise UserError(f"{ESCAPE}\nsecond line")

    with pytest.raises(SystemExit):
        processes.run(fail, ["run_glue.py"], {})
    assert capsys.readouterr().err == "run_glue.py: error: a\\x1b[2Jb\nsecond line\n"
    assert printable_lines("x" * 1000) == "x" * 1000


def test_a_glue_header_of_many_columns_is_shortened(tmp_path):
    (tmp_path / "RTE").mkdir()
    (tmp_path / "RTE" / "dev.tsv").write_text("\t".join(f"{ESCAPE}{i}" for i in range(10_000)) + "\n")
    with pytest.raises(UserError) as error:
        load_glue_folder(str(tmp_path), TASKS["rte"], ["validation"])
    assert len(str(error.value)) < 1000 and "\x1b" not in str(error.value)


@pytest.mark.parametrize("flag", ["--seed", "--max_seq_length", "--lora_r", "--learning_rate", "--lora_alpha"])
def test_a_flags_number_has_ascii_digits_and_no_underscores(flag, tmp_path):
    argv = ["--model_name_or_path", "a", "--task_name", "rte", "--output_dir", str(tmp_path), "--do_eval"]
    for number in ("1_0", "١٠"):
        with pytest.raises(UsageError, match=f"argument {flag}.*: invalid (int|float) value"):
            parse_arguments([*argv, flag, number], {})


@pytest.mark.parametrize("number", ["1_0.5", "٣.٥"])
def test_a_number_with_underscores_or_digits_of_another_script_is_no_score(tmp_path, number):
    path = tmp_path / "train.csv"
    path.write_text(f"text,label\na,1.5\nb,{number}\nc,2.5\n")
    with pytest.raises(UserError, match="is not a number"):
        load_files({"train": str(path)}, ())


def test_labels_with_a_line_break_are_a_wrong_flag():
    with pytest.raises(UsageError, match="give different names with commas"):
        parse_names("labels", "a\nb,c")


def lora(rank: int, layer: str) -> dict[str, torch.Tensor]:
    names = [f"roberta.encoder.layer.{layer}.attention.self.{kind}" for kind in ("query", "value")]
    return {f"{name}.lora_A": torch.ones(rank, 4) for name in names} | {
        f"{name}.lora_B": torch.ones(4, rank) for name in names
    }


def test_a_digit_that_is_no_number_in_a_tensors_name_is_written_as_text(tmp_path):
    write_published(Adapter(tmp_path / "source", lora(2, "²")), tmp_path / "a.bin")
    assert len(read_adapter(str(tmp_path / "a.bin")).state) == 4


def test_similarity_refuses_ranks_whose_square_fills_the_memory(tmp_path):
    adapter = Adapter(tmp_path, lora(5000, "0"))
    with pytest.raises(UserError, match="ranks up to 5,000 give 50,000,000 similarities; at most 16,777,216"):
        compare(adapter, adapter)
