"""What the benchmarks cannot measure: one sentence that names it, and exit code 2."""

import pytest
import torch

from strop.bench import bench_attention, bench_settings, bench_step, full_size, judge_precision, precision


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "bench, command, words",
    [
        (bench_attention, "sd15", ["CPU"]),
        (bench_step, "sd15", ["stable-diffusion-v1-5/stable-diffusion-v1-5"]),
        (bench_step, "tinyworld --rounds 0", ["--rounds", "0"]),
        (bench_step, "tinyworld run.device=cuda", ["run.device", "cuda"]),
        (bench_step, "tinyworld --thresholds 0 1", ["--thresholds", "1"]),
        (bench_step, "tinyworld judge.kind=latent", ["judge.kind", "latent"]),
        (bench_step, "nothing", ["nothing.yaml"]),
        (bench_settings, "tinyworld --rounds 0", ["--rounds", "0"]),
        (full_size, "sd15", ["GPU"]),
        (judge_precision, "--prompts 0", ["--prompts", "0"]),
        (precision, "--iterations 0", ["--iterations", "0"]),
        (precision, "--iterations 100000", ["--iterations", "100000"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_measured_is_said_in_a_sentence(bench, command, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(command.split())
    sentence = capsys.readouterr().err
    assert (stopped.value.code, sentence.count("\n")) == (2, 1)
    assert [word for word in words if word not in sentence] == []
