"""strop.kernels.report: what the compiler makes of the kernels, which needs no GPU."""

import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: there is nothing to compile")

from strop.kernels import report

ALL = [*report.launches(torch.bfloat16)]
BF16 = {report.name_of(launch): (shape, launch) for shape, launch in reversed(ALL)}  # the first of each name


def rows(dtype, sm):
    return [report.read(shape, dtype, launch, sm) for shape, launch in report.launches(dtype)]


@pytest.fixture(scope="module", autouse=True)
def fresh_cache(tmp_path_factory):
    """Compiles anew, and leaves nothing in the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def test_every_kernel_is_in_the_report():
    names = {launch.kernel.__name__ for _, launch in report.launches(torch.float32)}
    modules = (report.adaln_triton, report.adaln_backward_triton, report.ddim_triton)
    assert names == {name for module in modules for name in vars(module) if name.endswith("_kernel")}


def test_arguments_are_specialised_as_triton_does_it():
    """A whole number that is 1 becomes a constant, guidance 1.0 does not; what begins off 16 bytes is not aligned."""
    find = lambda kernel, label: next(one for shape, one in ALL if report.name_of(one) == kernel and label in shape)
    token, step = find("adaln_fwd gated", "(40, 1, 1280) frozen"), find("ddim_branch", "k=1")
    source = report.compiled(token, 90).src
    assert (source.signature["length"], source.signature["width"]) == ("constexpr", "i32")
    for launch, stride in ((token, "scale_stride"), (step, "table_col")):  # what all rows share
        assert launch.args[launch.kernel.arg_names.index(stride)] == 0
    shifted = step.args[2].flatten()[1:]
    source = report.compiled(step._replace(args=(*step.args[:2], shifted, *step.args[3:])), 90).src
    assert source.signature["guidance"] == "fp32"
    assert [(i,) in source.attrs for i in (1, 2)] == [True, False]


@pytest.mark.parametrize("kernel", [name for name in BF16 if name.startswith("adaln_fwd") or "guided" in name])
def test_numbers_in_float64_are_rounded_before_they_are_used(kernel):
    """As torch.compile passes them; else it would not compile, or compute in float64 what eager mode does not."""
    ptx = report.compiled(BF16[kernel][1], 90, "fp64").asm["ptx"]
    assert "cvt.rn.f32.f64" in ptx
    assert not re.search(r"\b(add|sub|mul|fma|div|neg|sqrt)\S*\.f64", ptx)


@pytest.mark.parametrize("kernel", ["adaln_fwd", "adaln_bwd", "adaln_fwd gated", "adaln_bwd gated"])
def test_vit_h_in_bfloat16_does_not_spill_and_moves_16_bytes_at_a_time(kernel):
    shape, launch = BF16[kernel]
    assert shape == "(40, 257, 1280)"
    row = report.read(shape, torch.bfloat16, launch, 90)
    assert (row.spilled, row.load, row.store) == (0, 16, 16)
    ptx = report.compiled(launch, 90).asm["ptx"]
    assert not re.search(r"\b(ld|st)\.global\S*\.b16\b", ptx)  # no number of a row goes alone
    assert "cvt.rn.bf16" in ptx  # to nearest, where the interpreter of the tests cuts


@pytest.mark.slow
@pytest.mark.parametrize("sm", report.ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_nothing_spills_and_rows_move_16_bytes_at_a_time(dtype, sm):
    for row in rows(dtype, sm):
        assert row.spilled == 0, row
        if "sum" not in row.kernel:
            assert row.load == 16, row
            assert row.store == 16, row


@pytest.mark.parametrize("kernel", BF16)
def test_offsets_into_tensors_are_64_bits_wide(kernel):
    """What multiplies by a length or a width is 64 bits wide; 32 bits count programs, and rows within one b."""
    ttir = report.compiled(BF16[kernel][1], 90).asm["ttir"]
    products = re.findall(r"arith\.muli (\S+), (\S+).*? : (\S+)", ttir)
    narrow = [(a, b) for a, b, kind in products if "i64" not in kind]
    assert any("i64" in kind for *_, kind in products)
    assert all(b.startswith("%c") for _, b in narrow), narrow  # by a constant: the block of a program


@pytest.mark.parametrize(
    "line, kind, expected",
    [
        ("ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];", "ld", 16),
        ("@%p1 st.global.b32 [ %rd1 + 0 ], { %r1 };", "st", 4),
        ("ld.global.L1::evict_last.v2.b64 { %r1, %r2 }, [ %rd1 ];", "ld", 16),
        ("ld.global.nc.b16 %rs1, [%rd1];", "ld", 2),
        ("st.shared.v4.b32 [%r1], {%r2, %r3, %r4, %r5};", "st", 0),
        ("st.global.v4.b32 [ %rd1 + 0 ], { %r1, %r2, %r3, %r4 };", "ld", 0),
    ],
)
def test_the_widest_access_is_read_from_ptx(line, kind, expected):
    assert report.widest(line, kind) == expected


def test_the_table_names_its_columns():
    row = report.Row("adaln_fwd", "(1, 2, 3)", "bf16", 90, 4, 32, 0, 1024, 16, 16)
    head, line = report.table([row]).splitlines()
    assert head.split() == list(report.HEADER)
    assert line.split() == ["adaln_fwd", "(1,", "2,", "3)", "bf16", "90", "4", "32", "0", "1024", "16", "16"]
