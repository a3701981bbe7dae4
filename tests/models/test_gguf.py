import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BASE
from crafted_gguf import REFUSED, STRING, TEMPLATE, UINT32, gguf, listed, number, text

from stages.models import find_model
from stages.models.gguf import BLOCKS, Array, read_gguf
from stages.program import BadModelFile

READ_ALL = """
import json, sys, time
from pathlib import Path
from stages.models.gguf import read_gguf
from stages.program.errors import BadModelFile
found = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    started = time.process_time()  # whatever else the machine does
    try:
        read_gguf(path)
        said = ""
    except BadModelFile as error:
        said = str(error)
    found[path.name] = (said, time.process_time() - started)
lines = Path("/proc/self/status").read_text().splitlines()  # getrusage's maximum is that of the process it was forked from, too
print(json.dumps([found, next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))]))
"""


def test_a_header_gives_values_and_shapes(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(gguf())
    header = read_gguf(tmp_path / "a.gguf")
    assert header.values["tokenizer.chat_template"] == TEMPLATE
    assert header.values["tokenizer.ggml.tokens"] == Array(8, 2)
    assert header.tensors == {"token_embd.weight": (32, 2), "output_norm.weight": (32,)}


def test_a_model_that_people_use_is_read() -> None:
    header = read_gguf(find_model(BASE))
    assert (header.values["general.license"], header.values["llama.block_count"]) == ("apache-2.0", 30)
    assert header.values["tokenizer.ggml.tokens"].length == 49152 and len(header.tensors) == 272


def test_every_crafted_file_is_refused_within_a_second_and_200_mb(tmp_path: Path) -> None:
    for number_of, content in enumerate(REFUSED.values()):
        (tmp_path / f"{number_of:02}").write_bytes(content)
    for name, kind, length in (("a million empty texts", STRING, 1_900_000), ("many numbers", UINT32, 200_000_000)):
        with open(tmp_path / name, "wb") as sparse:
            content = gguf({"long": listed("long", kind, b"", length)})
            sparse.write(content[: content.index(b"long") + len("long") + 4 + 4 + 8])
            sparse.truncate(10**9)
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, str(tmp_path)],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])},
    )
    found, peak_kb = json.loads(done.stdout)
    assert len(found) == len(REFUSED) + 2 > 40
    names = [*REFUSED, "a million empty texts", "many numbers"]
    accepted = [name for name, (said, _) in zip(names, (found[key] for key in sorted(found)), strict=True) if not said]
    assert not accepted
    assert all("is not a GGUF model that is safe to open: " in said and "\n" not in said for said, _ in found.values())
    assert len({said.split(": ", 1)[1] for said, _ in found.values()}) > 25, "each is refused for its own fault"
    assert max(seconds for _, seconds in found.values()) < 1
    assert peak_kb < 200_000


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("version 99", "its version is 99, not 2 or 3"),
        ("2^63 values", "it claims 2 tensors and 9,223,372,036,854,775,808 values"),
        ("alignment 13", "general.alignment is 13, not a power of two"),
        ("cut in the weights", "its tensors end at"),
        ("an offset in the tensor before", "w begins at 32, and the tensor before it ends at 256"),
        ("tokens that are numbers", "tokenizer.ggml.tokens is missing or of another type"),
        ("2^32 x 2^32 x 2 values", r"w cannot have the shape \(4294967296, 4294967296, 2\)"),
    ],
)
def test_a_refusal_names_the_fault(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "a.gguf").write_bytes(REFUSED[name])
    with pytest.raises(BadModelFile, match=said):
        read_gguf(tmp_path / "a.gguf")


def test_another_alignment_moves_the_weights(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(gguf({"alignment": number("general.alignment", 64)}) + bytes(32))
    assert len(read_gguf(tmp_path / "a.gguf").tensors) == 2


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    from gguf.constants import GGML_QUANT_SIZES

    assert BLOCKS.items() <= {kind.value: sizes for kind, sizes in GGML_QUANT_SIZES.items()}.items()
    assert len(BLOCKS) >= 30 and text("a") == b"\1\0\0\0\0\0\0\0a"
