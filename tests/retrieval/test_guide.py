# SPDX-License-Identifier: Apache-2.0
"""The commands of docs/retrieval.md, as they are written, on videos in MSR-VTT's layout."""

import re
import shlex

import pytest

from retrieval import compare, options, run
from support import ROOT
from support.retrieval import clip_weights, layout, results

PAGE = (ROOT / "docs/retrieval.md").read_text()


def commands() -> list[list[str]]:
    """Return the arguments of main.py in the block that trains on MSR-VTT, command by command."""
    (block,) = (text for text in re.findall(r"```bash\n(.*?)```", PAGE, re.S) if "--do_train" in text)
    lines = [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]
    assert lines.pop(0) == ["cd", "examples/stop_retrieval"]
    assert all(line[:2] == ["python", "main.py"] for line in lines)
    return [line[2:] for line in lines]


def test_flags_of_the_guide():
    told = [options.read(argv) for argv in commands()]
    assert [args.do_train for args in told] == [True, True, False, False, False, False, False]
    assert told[3].sweep == (0, 2, 4, 8)


@pytest.mark.slow  # a training of five epochs and five calls after it
def test_the_guide(tmp_path, monkeypatch, capsys):
    """Weights of CLIP's names, as small as they can be, where the guide wants them; folders as it names them."""
    made = layout(tmp_path / "data")
    (made / "videos").rename(made / "MSRVTT_Videos")
    (tmp_path / "path/to").mkdir(parents=True)
    (tmp_path / "path/to/videos").symlink_to(made / "MSRVTT_Videos")
    clip_weights(tmp_path / "home/models/pretrained")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "SECONDS", 0.1)
    for argv in commands():
        assert run.main(argv) == 0, (argv, capsys.readouterr().err)
    out = tmp_path / "output/tome_msrvtt"
    assert results(out)["tome"]["tome_r"] == 4
    assert {"sweep.json", "sweep.png", "traces", "index"} <= {path.name for path in out.iterdir()}
    assert "a man plays the guitar" in capsys.readouterr().out
