"""The C++ kernels on every instruction set that this machine can run: what the tests of the ops do not reach.

Those compare the implementations on small cases with the best instruction set. Here the shapes cross the kernels' own
blocks, the other instruction sets run, and threads, strides and the environment vary.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import head_cases
import pytest
import torch
from head_cases import Case, gradients
from torch import Tensor

import cdas_fast
from cdas_fast import clamp, interchange, linear_cross_entropy, linear_jsd, linear_kl, linear_logprob
from cdas_fast.errors import InvalidInputError, MissingDependencyError
from cdas_fast.ops import cpu_library

CSRC = Path(__file__).resolve().parents[1] / "csrc"

if not cpu_library.available():
    pytest.skip(cpu_library.why_not(), allow_module_level=True)

pytestmark = pytest.mark.usefixtures("nan_filled_empty")

SETS = cpu_library.instruction_sets()
DIVERGENCES: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "jsd": (linear_jsd, {}),
    "jsd_beta": (linear_jsd, {"beta": 0.2}),
    "forward_kl": (linear_kl, {"direction": "forward"}),
    "reverse_kl": (linear_kl, {"direction": "reverse"}),
    "logprob": (linear_logprob, {}),
}
SHAPES = [
    pytest.param((70, 40, 500), id="two_panels_of_rows"),
    pytest.param((3, 1000, 70), id="width_in_several_blocks_that_do_not_divide_it"),
    pytest.param((20, 577, 205), id="odd_width"),
    pytest.param((130, 6, 49), id="one_row_beyond_a_tile_of_the_head"),
    pytest.param((17, 33, 3), id="fewer_entries_than_threads_and_lanes"),
]


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels of one instruction set in use."""
    library, best = cpu_library.load(), cpu_library.instruction_set()
    assert library.cdas_use_instruction_set(request.param.encode())
    yield request.param
    assert library.cdas_use_instruction_set(best.encode())


def make_case(kind: str, shape: tuple[int, int, int], dtype: torch.dtype, *options: str) -> Case:
    function, given = DIVERGENCES[kind]
    rows, width, vocabulary = shape
    case = head_cases.make_case(
        function,
        *options,
        rows=(rows,),
        width=width,
        vocabulary=vocabulary,
        dtype=dtype,
        labels=kind == "logprob",
        **given,
    )
    case.weight.mul_(4 / math.sqrt(width))  # logits of some units, whatever the width
    return case


def truth(case: Case, dtype: torch.dtype = torch.float64) -> Tensor:
    """The loss of each row from whole logits, whose product is made at `dtype`."""
    log_p = case.log_p(dtype)
    if case.function is linear_logprob:
        return log_p.gather(-1, case.target[:, None])[:, 0]
    log_q = case.log_q(dtype)
    p, q = log_p.exp(), log_q.exp()
    if case.function is linear_kl:
        forward = case.options["direction"] == "forward"
        return (q * (log_q - log_p)).sum(-1) if forward else (p * (log_p - log_q)).sum(-1)
    beta = case.options.get("beta", 0.5)
    log_m = torch.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta))
    return (1 - beta) * (p * (log_p - log_m)).sum(-1) + beta * (q * (log_q - log_m)).sum(-1)


def run(case: Case, **extra: Any) -> Tensor:
    return case.loss(None if case.function is linear_logprob else "none", impl="cpp", **extra)


def assert_right(case: Case, **extra: Any) -> None:
    scale = 64.0 if case.hidden.dtype == torch.float64 else 4.0  # the truth is float64 itself
    head_cases.assert_right(case, run(case, **extra), lambda c: truth(c, c.hidden.dtype), truth, scale)


# Every instruction set


@pytest.mark.parametrize("dtype", head_cases.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_right_across_the_kernels_blocks(
    kind: str, shape: tuple[int, int, int], dtype: torch.dtype, instruction_set: str
) -> None:
    assert_right(make_case(kind, shape, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_right_with_every_option(kind: str, dtype: torch.dtype, instruction_set: str) -> None:
    assert_right(make_case(kind, (20, 50, 301), dtype, "bias", *head_cases.SCALARS))


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_gradcheck(kind: str, instruction_set: str) -> None:
    case = make_case(kind, (5, 7, 23), torch.float64, "bias", *head_cases.SCALARS)
    torch.autograd.gradcheck(
        lambda hidden: run(Case(case.function, hidden, case.target, case.weight, case.options)), case.hidden
    )


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("indexed", [False, True])
def test_gradcheck_of_the_intervention(rank: int, masked: bool, indexed: bool, instruction_set: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, source = (
        torch.randn(*s, 19, generator=generator, dtype=torch.float64).requires_grad_() for s in ((3, 5), (3,))
    )
    shape = (2, rank, 19) if indexed else (rank, 19)
    direction = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    mask = torch.rand(3, 5, generator=generator) < 0.6 if masked else None
    index = torch.tensor([1, 0, 1]) if indexed else None
    torch.autograd.gradcheck(
        lambda h, s, w: interchange(h, s, w, mask=mask, direction_index=index, impl="cpp"), (hidden, source, direction)
    )


@pytest.mark.parametrize("dtype", head_cases.DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 16, 37, 130])
def test_the_intervention_at_every_width(width: int, dtype: torch.dtype, instruction_set: str) -> None:
    """Widths around the vectors' own; the reference in float64 is the truth, in `dtype` it bounds the error."""
    generator = torch.Generator().manual_seed(0)
    hidden, source = (torch.randn(*s, width, generator=generator).to(dtype) for s in ((2, 9), (2,)))
    direction = torch.randn(2, width, generator=generator, dtype=torch.float64) / math.sqrt(width)
    upstream = torch.randn(2, 9, width, generator=generator, dtype=torch.float64)

    def results(cast: torch.dtype, impl: Any) -> list[Tensor]:
        inputs = [x.to(cast).requires_grad_() for x in (hidden, source)] + [
            direction.to(cast).double().requires_grad_()
        ]
        out = interchange(*inputs, impl=impl)
        return [out, *torch.autograd.grad(out, inputs, upstream.to(cast))]

    exact = results(torch.float64, "reference")
    for name, ours, plain, true in zip(
        ("out", "hidden", "source", "direction"), results(dtype, "cpp"), results(dtype, "reference"), exact, strict=True
    ):
        head_cases.assert_as_right_as_torch(
            name, ours, plain, true.detach(), scale=64.0 if dtype == torch.float64 else 8.0
        )


def test_nan_and_infinity_stay_in_their_rows(instruction_set: str) -> None:
    for kind in DIVERGENCES:
        for dtype in (torch.float32, torch.bfloat16):
            case = make_case(kind, (70, 40, 500), dtype)
            spoilt = case.copy()
            with torch.no_grad():
                spoilt.hidden[3, 5], spoilt.hidden[66, 0] = math.nan, math.inf
            loss = run(spoilt)
            (gradient,) = gradients(loss, spoilt.hidden)
            clean = torch.ones(70, dtype=torch.bool)
            clean[3] = clean[66] = False
            assert loss[~clean].isnan().all()
            assert gradient[~clean].isnan().all(-1).all()
            expected = run(case)
            assert torch.equal(loss[clean], expected[clean])
            assert torch.equal(gradient[clean], gradients(expected, case.hidden)[0][clean])


@pytest.mark.parametrize("kind", ["jsd", "forward_kl", "reverse_kl"])
def test_equal_passes_have_no_divergence(kind: str, instruction_set: str) -> None:
    case = make_case(kind, (20, 50, 301), torch.float32)
    same = Case(case.function, case.hidden, case.hidden.detach().clone(), case.weight, case.options)
    loss = run(same)
    assert (loss.abs() < 1e-6).all()
    assert gradients(loss, same.hidden)[0].abs().max() < 1e-5


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_logits_of_ten_thousand_stay_finite(kind: str, instruction_set: str) -> None:
    case = make_case(kind, (20, 50, 301), torch.float32)
    case.weight.mul_(3000)
    loss = run(case)
    assert loss.isfinite().all()
    assert gradients(loss, case.hidden)[0].isfinite().all()
    if kind == "jsd":
        assert (loss <= math.log(2) * (1 + 1e-6)).all()


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_entries_that_a_bias_forbids(kind: str, instruction_set: str) -> None:
    """Minus infinity in the bias is the vocabulary without those entries."""
    case = make_case(kind, (9, 20, 101), torch.float32, "bias")
    if kind == "logprob":
        case.target.fill_(7)
    kept = torch.arange(101) % 3 == 1
    case.options["bias"][~kept] = -math.inf
    fewer = Case(
        case.function,
        head_cases.leaf(case.hidden),
        case.target,
        case.weight[kept],
        {**case.options, "bias": case.options["bias"][kept]},
    )
    if kind == "logprob":
        fewer.target = torch.full_like(case.target, 2)
    ours, expected = run(case), run(fewer)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(*(gradients(loss, c.hidden)[0] for loss, c in ((ours, case), (expected, fewer))))


def test_an_impossible_entry_makes_kl_infinite(instruction_set: str) -> None:
    case = make_case("forward_kl", (4, 20, 101), torch.float32)
    forbid = torch.zeros(101)
    forbid[5] = -math.inf
    everything = torch.zeros(101)
    arguments = (case.hidden, case.target, case.weight)
    kl = linear_kl(*arguments, bias=forbid, target_bias=everything, reduction="none", impl="cpp")
    assert torch.equal(kl, torch.full((4,), math.inf))
    other = linear_kl(*arguments, bias=everything, target_bias=forbid, reduction="none", impl="cpp")
    assert other.isfinite().all()


# Memory layout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_strides_do_not_matter(dtype: torch.dtype, instruction_set: str) -> None:
    case = make_case("jsd", (20, 50, 301), dtype)
    expected = run(case)
    (gradient,) = gradients(expected, case.hidden)
    wide = torch.randn(301, 60).to(dtype)
    wide[:, 5:55] = case.weight
    for weight in (case.weight.T.contiguous().T, wide[:, 5:55], wide[:, 5:55].T.contiguous().T):
        hidden = case.hidden.detach().T.contiguous().T.requires_grad_()
        target = torch.stack([case.target, case.target], 1)[:, 1]
        other = Case(case.function, hidden, target, weight, case.options)
        loss = run(other)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(gradients(loss, hidden)[0], gradient, rtol=1e-2, atol=1e-5)


def test_one_row_repeated_by_a_stride_of_zero() -> None:
    case = make_case("jsd", (20, 50, 301), torch.float32)
    repeated = case.hidden.detach()[:1].expand(20, 50)
    loss = linear_jsd(repeated, case.target, case.weight, reduction="none", impl="cpp")
    torch.testing.assert_close(
        loss, linear_jsd(repeated.clone(), case.target, case.weight, reduction="none", impl="cpp")
    )


def test_dtypes_may_be_mixed(instruction_set: str) -> None:
    case = make_case("jsd", (20, 50, 301), torch.float32)
    for hidden_dtype, target_dtype, weight_dtype in (
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16, torch.float32),
    ):
        hidden = case.hidden.detach().to(hidden_dtype).requires_grad_()
        mixed = Case(linear_jsd, hidden, case.target.to(target_dtype), case.weight.to(weight_dtype), {})
        same = Case(linear_jsd, head_cases.leaf(hidden.float()), mixed.target.float(), mixed.weight.float(), {})
        torch.testing.assert_close(run(mixed), run(same), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            gradients(run(mixed), hidden)[0].float(), gradients(run(same), same.hidden)[0], rtol=2e-2, atol=1e-3
        )


# Accuracy that the library's own bfloat16 product cannot give


def test_bfloat16_value_of_a_small_divergence_is_right_to_a_thousandth() -> None:
    """Logits rounded to bfloat16 miss it by percents: the products must leave float32 behind."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(32, 576, generator=generator)
    target = (hidden + 0.04 * torch.randn(32, 576, generator=generator)).bfloat16()
    weight = (torch.randn(49152, 576, generator=generator) / 6).bfloat16()
    case = Case(linear_jsd, hidden.bfloat16().requires_grad_(), target, weight, {})
    true = truth(case).mean().item()
    assert 1e-3 < true < 1e-2
    assert run(case).mean().item() == pytest.approx(true, rel=1e-4)
    assert truth(case, torch.bfloat16).mean().item() != pytest.approx(true, rel=1e-3), "else this case shows nothing"


# Threads


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_threads_change_not_a_bit(kind: str) -> None:
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        case = make_case(kind, (70, 40, 15000), torch.float32)
        loss = run(case)
        results.append((loss.detach(), gradients(loss, case.hidden)[0]))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_threads_change_not_a_bit_of_the_intervention() -> None:
    hidden = torch.randn(3, 500, 40, generator=torch.Generator().manual_seed(0))
    direction = torch.randn(5, 2, 40, generator=torch.Generator().manual_seed(1)).requires_grad_()
    results = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        out = interchange(hidden, hidden[:, 0], direction, direction_index=torch.tensor([4, 0, 4]), impl="cpp")
        results.append((out.detach(), torch.autograd.grad((out * hidden).sum(), direction)[0]))
    for out, gradient in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(gradient, results[0][1])
    assert not results[0][1][1:4].any(), "concepts that no sequence has"


def test_torch_shares_its_threads() -> None:
    assert cpu_library.has_threads()


def test_without_an_openmp_runtime_one_thread_does_it() -> None:
    case = make_case("jsd", (70, 40, 1500), torch.float32)
    torch.set_num_threads(3)
    expected = run(case)
    library = cpu_library.load()
    library.cdas_use_openmp(None)
    try:
        assert torch.equal(run(case), expected), (
            "what a thread does depends on how many were asked for, not on how many came"
        )
    finally:
        library.cdas_use_openmp(cpu_library._openmp())


def test_several_python_threads_at_once() -> None:
    torch.set_num_threads(2)
    case = make_case("jsd", (20, 50, 3001), torch.float32)
    expected = run(case)
    found: list[Tensor] = []
    workers = [threading.Thread(target=lambda: found.append(run(case))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4
    assert all(torch.equal(loss, expected) for loss in found)


# Bounds on memory


def test_memory_does_not_grow_with_the_rows() -> None:
    """Of the tensors allocated, only the losses and gradient rows depend on N."""
    operations = []
    for rows in (256, 2048):
        case = make_case("jsd", (rows, 16, 4000), torch.float32)
        with head_cases.Operations() as recorded:
            run(case, chunk_bytes=2**20)
        operations.append(recorded.peak)
    assert operations[1] - operations[0] <= 1.1 * 1792 * (16 + 4) * 4
    assert operations[0] < 4 * 2**20


# Loading


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("name", SETS)
def test_an_environment_variable_chooses_the_instruction_set(name: str) -> None:
    code = "from cdas_fast.ops import cpu_library; print(cpu_library.instruction_set())"
    assert run_python(code, CDAS_FAST_CPU=name).stdout.strip() == name


def test_an_instruction_set_that_does_not_exist_is_refused() -> None:
    result = run_python("from cdas_fast.ops import cpu_library; cpu_library.load()", CDAS_FAST_CPU="mmx")
    assert result.returncode
    assert "CDAS_FAST_CPU: expected one of" in result.stderr
    assert "portable, got 'mmx'" in result.stderr


def test_show_config_names_what_runs() -> None:
    text = cdas_fast.show_config()
    assert "linear_jsd: auto takes cpp" in text
    assert f"C++ kernels: {cpu_library.instruction_set()}" in text


def test_without_the_library_cpp_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_library, "_file", lambda: None)
    hidden, weight = torch.zeros(2, 3), torch.zeros(5, 3)
    with pytest.raises(MissingDependencyError, match=r"impl='cpp'.*C\+\+ compiler"):
        linear_jsd(hidden, hidden, weight, impl="cpp")
    assert "linear_jsd: auto takes reference" in cdas_fast.show_config()
    assert linear_jsd(hidden, hidden, weight).item() == 0


def test_an_index_that_no_check_saw_is_refused() -> None:
    """Under torch.compile the values of indices are not looked at beforehand."""
    compiled = torch.compile(
        lambda hidden, index: clamp(hidden, 1.0, torch.eye(4).reshape(2, 2, 4), direction_index=index, impl="cpp"),
        backend="eager",
        fullgraph=True,
    )
    assert compiled(torch.zeros(3, 4), torch.tensor([0, 1, 0])).sum() == 6
    with pytest.raises(InvalidInputError, match="indices of the 2 directions"):
        compiled(torch.zeros(3, 4), torch.tensor([0, 2, 0]))


def test_ignored_labels_cost_nothing_and_have_no_gradient(instruction_set: str) -> None:
    case = make_case("logprob", (20, 50, 301), torch.bfloat16)
    case.target[::2] = -100
    loss = run(case)
    (gradient,) = gradients(loss, case.hidden)
    assert not loss[::2].any()
    assert not gradient[::2].any()
    assert gradient[1::2].any(-1).all()
    assert linear_cross_entropy(case.hidden, case.target, case.weight, impl="cpp").item() == pytest.approx(
        -loss[1::2].mean().item()
    )


# Other machines


@pytest.mark.slow
@pytest.mark.parametrize(
    "compiler",
    [
        pytest.param(["aarch64-linux-gnu-g++"], id="aarch64"),
        pytest.param(["clang++"], id="clang"),
    ],
)
def test_another_compiler_takes_the_sources_without_a_warning(compiler: list[str], tmp_path: Path) -> None:
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"needs {compiler[0]}")
    for source in ("isa_portable.cpp", "library.cpp"):
        command = [*compiler, "-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-c", str(CSRC / source)]
        done = subprocess.run([*command, "-o", str(tmp_path / "object.o")], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
