"""Corpus, tokenizer and preprocessing tools, on corpora small enough to train on in a second."""

import json
import random
import resource
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import sentencepiece

TOOLS = Path(__file__).parents[1] / "tools"
sys.path.insert(0, str(TOOLS))

import build_corpus
import preprocess_data
import train_tokenizer

VOCAB_SIZE = 600
HARD_TEXTS = [
    "def f(x):\n    if x:\n\treturn  x\n\n\n\n\nclass A:\n        pass\n",
    "\n",
    "\n\n  \n \t\n",
    " leading and trailing ",
    "crlf\r\nform feed\x0c nul\0 no-break\u00a0space",
    "naïve 日本語 🙂 e\u0301 \u200b",
    "0123456789 1e-05 0xFF",
    "special <s> </s> <unk> <0x0A> pieces</s>",
    "=" * 97 + " " * 61 + "-" * 33,
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A JSONL corpus of a few real source files."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    rows = [{"text": file.read_text(), "path": file.name} for file in sorted(TOOLS.glob("*.py"))]
    rows += [{"text": text, "path": "hard"} for text in HARD_TEXTS] + [
        {"text": "", "path": "empty"}
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def tokenizer(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    argv = ["--input", str(corpus), "--output-dir", str(folder), "--vocab-size", str(VOCAB_SIZE)]
    assert train_tokenizer.main(argv) == 0
    return folder


@pytest.fixture(scope="module")
def sp(tokenizer) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer / "tokenizer.model"))


@pytest.fixture(scope="module")
def hf(tokenizer):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(tokenizer)


def texts_of(corpus: Path) -> list[str]:
    return [json.loads(line)["text"] for line in corpus.read_text().splitlines()]


def preprocess_argv(tokenizer: Path, prefix: Path, *inputs: Path) -> list[str]:
    return [
        *("--input", *map(str, inputs)),
        *("--output-prefix", str(prefix)),
        *("--tokenizer-type", "SentencePieceTokenizer"),
        *("--tokenizer-model", str(tokenizer / "tokenizer.model")),
        "--append-eod",
    ]


class TestTokenizer:
    def test_ids(self, sp, hf):
        assert (sp.unk_id(), sp.bos_id(), sp.eos_id(), sp.pad_id()) == (0, 1, 2, -1)
        assert (hf.unk_token_id, hf.bos_token_id, hf.eos_token_id) == (0, 1, 2)
        assert sp.get_piece_size() == len(hf) == VOCAB_SIZE

    @pytest.mark.parametrize("text", HARD_TEXTS)
    def test_hard_texts_round_trip(self, sp, hf, text):
        ids = sp.encode(text)
        assert sp.decode(ids) == text
        assert hf.encode(text) == ids
        assert hf.decode(ids) == text

    def test_corpus_round_trips(self, sp, hf, corpus):
        for text in texts_of(corpus):
            ids = sp.encode(text)
            assert sp.decode(ids) == text
            assert hf(text)["input_ids"] == ids

    def test_random_strings_are_the_same_for_both(self, sp, hf):
        rng = random.Random(0)
        atoms = [" ", "  ", "\n", "\t", "</s>", "<s>", "a", "aa", "=", "é", "日", "\r", "\0", "12"]
        atoms += [sp.id_to_piece(i).replace("\u2581", " ") for i in range(259, VOCAB_SIZE)]
        for _ in range(2000):
            text = "".join(rng.choices(atoms, k=rng.randrange(30)))
            ids = sp.encode(text)
            assert sp.decode(ids) == text
            assert hf.encode(text) == ids

    def test_whitespace_compresses(self, sp):
        assert len(sp.encode("\n\n")) == len(sp.encode(" " * 4)) == 1
        assert len(sp.encode("1234")) == 4

    def test_eos_is_skipped_on_request(self, hf):
        ids = [*hf.encode("x </s>"), hf.eos_token_id]
        assert hf.decode(ids, skip_special_tokens=True) == "x </s>"

    def test_training_is_deterministic(self, corpus, tokenizer, tmp_path):
        argv = ["--input", str(corpus), "--vocab-size", str(VOCAB_SIZE)]
        assert train_tokenizer.main([*argv, "--output-dir", str(tmp_path)]) == 0
        for file in tokenizer.iterdir():
            assert (tmp_path / file.name).read_bytes() == file.read_bytes()

    @pytest.mark.parametrize("line", ["{", "[]", "{}", '{"text": 1}'])
    def test_bad_corpus(self, tmp_path, capsys, line):
        (tmp_path / "bad.jsonl").write_text(f'{{"text": "fine"}}\n{line}\n')
        argv = ["--input", str(tmp_path / "bad.jsonl"), "--output-dir", str(tmp_path / "out")]
        assert train_tokenizer.main(argv) == 2
        assert "bad.jsonl:2" in capsys.readouterr().err.splitlines()[-1]

    def test_vocabulary_too_large(self, tmp_path, capsys):
        (tmp_path / "small.jsonl").write_text('{"text": "one line"}\n')
        argv = ["--input", str(tmp_path / "small.jsonl"), "--output-dir", str(tmp_path / "out")]
        assert train_tokenizer.main(argv) == 2
        assert "training failed" in capsys.readouterr().err


class TestPreprocess:
    @pytest.mark.parametrize("workers", [1, 2])
    def test_reads_back(self, tokenizer, sp, corpus, tmp_path, workers):
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        plain = tmp_path / "plain.txt"
        plain.write_text("one\n\tdocument\n")
        argv = preprocess_argv(tokenizer, tmp_path / "new" / "data", corpus, plain)
        assert preprocess_data.main([*argv, "--workers", str(workers)]) == 0
        dataset = IndexedDataset(str(tmp_path / "new" / "data_text_document"))
        texts = [text for text in texts_of(corpus) if text] + [plain.read_text()]
        assert [list(row) for row in dataset] == [[*sp.encode(t), sp.eos_id()] for t in texts]
        assert list(dataset.document_indices) == list(range(len(texts) + 1))
        assert dataset.index.dtype == numpy.uint16
        names = {file.name for file in (tmp_path / "new").iterdir()}
        assert names == {"data_text_document.bin", "data_text_document.idx"}

    def test_hugging_face_tokenizer_writes_the_same(self, tokenizer, hf, corpus, tmp_path):
        argv = preprocess_argv(tokenizer, tmp_path / "sp", corpus)
        assert preprocess_data.main(argv) == 0
        argv = ["--input", str(corpus), "--output-prefix", str(tmp_path / "hf"), "--append-eod"]
        argv += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer)]
        assert preprocess_data.main(argv) == 0
        for suffix in ("bin", "idx"):
            ours, theirs = (tmp_path / f"{name}_text_document.{suffix}" for name in ("sp", "hf"))
            assert ours.read_bytes() == theirs.read_bytes()

    def test_large_vocabulary_gets_int32(self, tmp_path):
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        writer = preprocess_data.DatasetWriter(str(tmp_path / "large"), 128256)
        writer.add([128000, 1])
        writer.finalize()
        writer.commit()
        dataset = IndexedDataset(str(tmp_path / "large"))
        assert list(dataset[0]) == [128000, 1]
        assert dataset.index.dtype == numpy.int32

    def test_several_keys(self, tokenizer, sp, tmp_path):
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        (tmp_path / "in.jsonl").write_text('{"a": "one", "b": "two"}\n\n{"a": "", "b": "3"}\n')
        argv = preprocess_argv(tokenizer, tmp_path / "out", tmp_path / "in.jsonl")
        assert preprocess_data.main([*argv, "--json-keys", "a", "b"]) == 0
        assert len(IndexedDataset(str(tmp_path / "out_a_document"))) == 1
        dataset = IndexedDataset(str(tmp_path / "out_b_document"))  # its rows die with it
        assert list(dataset[1]) == [*sp.encode("3"), 2]

    @pytest.mark.parametrize("workers", ["1", "2"])
    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (b"{", "in.jsonl:2: malformed JSON"),
            (b"[]", "in.jsonl:2: not a JSON object"),
            (b"{}", "in.jsonl:2: no key 'text'"),
            (b'{"text": 1}', "in.jsonl:2: the value of 'text' is not a string"),
            (b'{"text": "\xff"}', "in.jsonl:2: not UTF-8"),
            (b'{"text": "\\ud800"}', "in.jsonl:2: lone surrogate"),
        ],
    )
    def test_bad_lines(self, tokenizer, tmp_path, capsys, line, message, workers):
        if workers == "2" and line != b"{" and b"\xff" not in line:
            pytest.skip("one error of the workers and one of the reader are enough")
        (tmp_path / "in.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
        argv = preprocess_argv(tokenizer, tmp_path / "out", tmp_path / "in.jsonl")
        assert preprocess_data.main([*argv, "--workers", workers]) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("preprocess_data: ") and message in last
        assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]

    def test_missing_files(self, tokenizer, corpus, tmp_path, capsys):
        argv = preprocess_argv(tokenizer, tmp_path / "out", tmp_path / "absent.jsonl")
        assert preprocess_data.main(argv) == 2
        assert "no input file" in capsys.readouterr().err
        argv = preprocess_argv(tmp_path / "absent", tmp_path / "out", corpus)
        assert preprocess_data.main(argv) == 2
        assert "no tokenizer model" in capsys.readouterr().err
        argv[argv.index("SentencePieceTokenizer")] = "HuggingFaceTokenizer"
        argv[argv.index(str(tmp_path / "absent" / "tokenizer.model"))] = str(tmp_path)
        assert preprocess_data.main(argv) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1

    def test_full_disk_leaves_the_old_output(self, tokenizer, corpus, tmp_path):
        """A limit on the size of a file fails a write as a full disk does."""
        old = tmp_path / "out_text_document.bin"
        old.write_bytes(b"old")
        result = subprocess.run(
            [
                *(sys.executable, str(TOOLS / "preprocess_data.py")),
                *preprocess_argv(tokenizer, tmp_path / "out", corpus),
            ],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
            env={"PYTHONDONTWRITEBYTECODE": "1", "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 2
        assert "preprocess_data: cannot write" in result.stderr.splitlines()[-1]
        assert "Traceback" not in result.stderr
        assert [file.name for file in tmp_path.iterdir()] == [old.name]
        assert old.read_bytes() == b"old"


class TestCorpus:
    @pytest.fixture
    def stdlib(self, tmp_path) -> Path:
        root = tmp_path / "stdlib"
        files = {f"pkg/m{i}.py": f"x = {i}\n" for i in range(200)}
        files |= {"test/t.py": "t", "pkg/tests/t.py": "t", "site-packages/s.py": "s"}
        files |= {"encodings/cp437.py": "c", "encodings/utf_8.py": "u = 8\n", "copy.py": "x = 0\n"}
        for path, text in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text)
        return root

    def build(self, stdlib: Path, output: Path) -> dict[str, list[dict]]:
        argv = ["--stdlib", str(stdlib), "--output-dir", str(output)]
        assert build_corpus.main(argv) == 0
        return {
            side: [json.loads(line) for line in (output / f"{side}.jsonl").read_text().splitlines()]
            for side in ("train", "validation", "heldout")
        }

    def test_split_is_stable_and_disjoint(self, stdlib, tmp_path):
        first = self.build(stdlib, tmp_path / "first")
        again = self.build(stdlib, tmp_path / "again")
        assert first == again
        sides = {side: {row["path"] for row in rows} for side, rows in first.items()}
        assert all(sides.values()) and len(set.union(*sides.values())) == sum(
            map(len, sides.values())
        )
        texts = [row["text"] for rows in first.values() for row in rows]
        assert len(set(texts)) == len(texts)
        assert all(build_corpus.side_of(p) == side for side, paths in sides.items() for p in paths)
        meta = json.loads((tmp_path / "first" / "meta.json").read_text())
        assert meta["train"]["documents"] == len(sides["train"])

    def test_sides_never_move(self):
        """The side of a path is part of the format: published numbers depend on it."""
        paths = [f"pkg/m{i}.py" for i in range(60)]
        sides = {p: side for p in paths if (side := build_corpus.side_of(p)) != "train"}
        assert sides == {
            "pkg/m25.py": "heldout", "pkg/m46.py": "validation", "pkg/m50.py": "heldout",
        }  # fmt: skip

    def test_contents(self, stdlib, tmp_path):
        sides = self.build(stdlib, tmp_path / "out")
        paths = {row["path"]: row["text"] for rows in sides.values() for row in rows}
        assert {"doc:itertools", "doc:math", "topic:assert", "encodings/utf_8.py"} <= set(paths)
        assert "itertools.chain" in paths["doc:itertools"]
        assert ("copy.py" in paths) != ("pkg/m0.py" in paths)
        assert not [p for p in paths if p.startswith(("test/", "pkg/tests", "site-packages/"))]
        assert "encodings/cp437.py" not in paths

    def test_heldout_copies_of_training_texts_go(self):
        paths = [f"m{i}.py" for i in range(100)]
        sides = build_corpus.split((path, "same") for path in paths)
        assert len(sides["train"]) == 1 and not sides["heldout"]

    def test_no_sources(self, tmp_path, capsys):
        argv = ["--stdlib", str(tmp_path), "--output-dir", str(tmp_path / "out")]
        assert build_corpus.main(argv) == 2
        assert "no standard library sources" in capsys.readouterr().err
