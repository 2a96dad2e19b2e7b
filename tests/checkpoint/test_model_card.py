"""README.md of an exported DMC model: what the checkpoint and the flags say, and what is unknown."""

import json
from argparse import Namespace
from dataclasses import replace

import pytest
from hf_models import model_of, save_with_code

from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.checkpoint.model_card import model_card, report_facts, training_facts
from megatron_dmc.cli.main import main
from megatron_dmc.config import DMCConfig
from megatron_dmc.errors import CheckpointError

CONFIG = {"architectures": ["DMCLlamaForCausalLM"], "auto_map": {}}
REPORT = {"base_perplexity": 9.0, "dmc_perplexity": 9.25, "measured_cr": 3.987}


def card_of(facts=None, config=CONFIG, **dmc):
    description = replace(ModelDescription(2, 8, 8, 2, 2, 4, 8, 8), dmc=DMCConfig(**dmc))
    card = model_card(description, config, facts=facts)
    _, metadata, text = card.split("---\n", 2)
    lines = [line for line in text.splitlines() if line.count("|") == 3 and line != "| | |"]
    rows = dict(line.strip("| ").split(" | ") for line in lines)
    return metadata, rows, text


def test_what_nobody_said_is_unknown():
    metadata, rows, text = card_of(stage="finetune", target_cr=4.0, merge_delay=16)
    for name in ("Base model", "Licence", "Training", "Data", "Evaluation"):
        assert rows[name] == "unknown"
    assert rows["Measured compression ratio"].startswith("unknown")
    assert (
        rows["Target compression ratio"].startswith("4 ") and "16 tokens stay raw" in rows["Method"]
    )
    assert 'license: "unknown"' in metadata and "base_model" not in metadata
    assert "megatron-dmc serve FOLDER" in text and "trust_remote_code=True" in text


def test_what_megatron_saved_is_told_without_paths():
    args = Namespace(
        train_data_path=["0.7", "/home/me/data/code_text_document", "0.3", "/data/english_text_document"],
        global_batch_size=2, seq_length=512, lr=2e-4, dmc_teacher="/home/me/runs/base",
    )  # fmt: skip
    facts = training_facts(args, 100)
    assert facts == {
        "Data": "code_text_document, english_text_document (last stage)",
        "Training": "last stage: 100 steps of 2 x 512 tokens, learning rate 0.0002, distilled from base",
    }
    assert training_facts(Namespace(), 0) == {}
    _, rows, _ = card_of(facts)
    assert rows["Data"].startswith("code_text_document") and rows["Evaluation"] == "unknown"


def test_flags_of_convert_fill_the_card(tmp_path, capsys):
    save_with_code(model_of(), tmp_path / "model")
    (tmp_path / "model" / "README.md").unlink()
    report = tmp_path / "report.json"
    report.write_text(json.dumps(REPORT))
    convert = ["convert", "--to", "hf", str(tmp_path / "model"), str(tmp_path / "out"), "--base-model",
               "owner/tiny", "--license", "apache-2.0", "--report", str(report)]  # fmt: skip
    assert main(convert) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    for text in ('license: "apache-2.0"', 'base_model: "owner/tiny"', "| Base model | owner/tiny |",
                 "| Measured compression ratio | 3.99 |", "perplexity 9.250, of the base model 9.000"):  # fmt: skip
        assert text in card, text
    report.write_text("{}")
    assert main([*convert, "--force"]) == 2
    assert "not a report.json" in capsys.readouterr().err


def test_a_wrong_report_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        report_facts(tmp_path / "nowhere.json")
    assert "perplexity 9.250" in report_facts_of(tmp_path, REPORT)["Evaluation"]


def report_facts_of(folder, content):
    (folder / "report.json").write_text(json.dumps(content))
    return report_facts(folder / "report.json")
