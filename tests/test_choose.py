"""kernels/choose.py and kernels/trial.py: a wrong, failing, hanging or slow kernel is left out and named.

The kernels here are made up, and right or wrong on purpose; tests/test_kernels.py tries the project's own.
`in_place` runs the trial in this process and compiles nothing, on a clock that only these functions advance:
which one is faster does not depend on luck.
"""
import json
import math
import os
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dit
import finetune
import kernels
from kernels import choose, goals, trial
from support import ranks

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch, tmp_path):
    """KERNELS=auto, as if a CPU were interpreting kernels, and an empty cache; undone after each test."""
    monkeypatch.setattr(kernels, "KERNELS", "auto")
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    monkeypatch.setattr(choose, "SMALLEST", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for op in kernels.OPERATIONS.values():
        monkeypatch.setattr(op, "chosen", {})
        monkeypatch.setattr(op, "variants", op.variants.copy())
    monkeypatch.setattr(kernels, "OPERATIONS", kernels.OPERATIONS.copy())


@pytest.fixture
def tries(monkeypatch):
    """The names of the operations that were tried, in this process and without a compiler."""
    tried = []

    def in_place(calls, rows, device, compiled):
        for n, call in enumerate(calls):
            if rows[n] is None:
                tried.append(call["op"])
                rows[n] = trial.timed(*trial.judged(call, device, compiled, {}, lambda name: None), device)
            trial.adopt([rows[n]])
        return ""

    def no_compiler(function):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(choose, "try_apart", in_place)
    monkeypatch.setattr(trial, "time", CLOCK)
    monkeypatch.setattr(trial, "by_compiler", lambda function: no_compiler)
    return tried


# ---------------------------------------------------------------- a made-up operation


class Clock:
    """time.perf_counter and time.sleep, without a second of real time."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


CLOCK = Clock()


def scaled_ref(x, weight):
    """x * weight, slowly."""
    CLOCK.sleep(0.003)
    return x * weight


class Scaled(torch.autograd.Function):
    """x * weight, with errors: `forward` and `backward` are factors that should be 1."""

    @staticmethod
    def forward(ctx, x, weight, forward, backward):
        ctx.save_for_backward(x, weight)
        ctx.factor = backward
        return x * weight * forward

    @staticmethod
    def backward(ctx, dout):
        x, weight = ctx.saved_tensors
        return dout * weight * ctx.factor, (dout * x).sum(0), None, None


def fails(x, weight):
    raise RuntimeError("no kernel image is available\nfor this device")


def slow(x, weight):
    CLOCK.sleep(0.02)
    return x * weight


def exact(x, weight):
    return Scaled.apply(x, weight, 1, 1)


FAULTS = {                                             # the kernel, and part of the message about it
    "wrong by 1 %": (lambda x, w: Scaled.apply(x, w, 1.01, 1), "wrong by 1.0e-02"),
    "wrong in one number": (lambda x, w: exact(x, w) + torch.eye(*x.shape) * 1e-3, "wrong by"),
    "raises": (fails, "RuntimeError: no kernel image is available"),
    "no such module": (lambda x, w: exec("import no_such_triton"), "no_such_triton"),
    "NaN": (lambda x, w: Scaled.apply(x, w, math.nan, 1), "not finite"),
    "one infinity": (lambda x, w: exact(x, w) / (torch.arange(len(x)) != 1)[:, None], "not finite"),
    "takes 20 ms": (slow, "it takes 2"),
    "backward wrong by 1 %": (lambda x, w: Scaled.apply(x, w, 1, 0.99), "wrong by"),
    "backward NaN": (lambda x, w: Scaled.apply(x, w, 1, math.nan), "not finite"),
    "no gradient": (lambda x, w: exact(x.detach(), w), "wrong by 1.0e+00"),
    "another shape": (lambda x, w: exact(x, w)[:1], "RuntimeError: Mismatch in shape"),
    "another dtype": (lambda x, w: exact(x, w).double(), "gives torch.float64, wanted torch.float32"),
    "two results": (lambda x, w: (exact(x, w), x), "ValueError"),
}


@pytest.fixture
def scaled():
    """scaled(kernel) -> the operation, registered with this kernel."""
    def make(kernel):
        kernel.__name__ = "scaled"
        return kernels.operation(scaled_ref)(kernel)
    return make


def inputs(rows=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 6, generator=generator).to(dtype).requires_grad_()
    return x, torch.nn.Parameter(torch.ones(6, dtype=dtype))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_kernel_that_is_wrong_fails_or_is_slow_is_left_out_and_named(
        fault, scaled, tries, tmp_path, capsys):
    kernel, said = FAULTS[fault]
    op = scaled(kernel)
    rows = choose.choose(lambda: op(*inputs()), tmp_path, CPU)
    assert [row["chosen"] for row in rows] == ["plain"]
    line, = [line for line in capsys.readouterr().out.splitlines() if "kernel is left out" in line]
    assert line.strip().startswith("scaled: ")
    assert said in line
    assert kernels.OPERATIONS["scaled"].chosen == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_correct_and_faster_kernel_is_used_for_every_batch_size_but_no_other_shape(
        dtype, scaled, tries, tmp_path, capsys):
    calls = []

    def kernel(x, weight):
        calls.append(x.shape)
        return exact(x, weight)

    op = scaled(kernel)
    rows = choose.choose(lambda: op(*inputs(dtype=dtype)), tmp_path, CPU)
    assert rows[0]["chosen"] == "kernel"
    assert rows[0]["ms"] == pytest.approx({"plain": 3, "kernel": 0})
    assert " kernel\n" in capsys.readouterr().out + "\n"

    def used(x, weight):
        calls.clear()
        op(x, weight)
        return bool(calls)

    x, weight = inputs(rows=9, dtype=dtype)
    assert used(x, weight)
    assert not used(x[:, :3], weight[:3])
    assert not used(x.double(), weight.double())
    with kernels.specifications():
        assert not used(x, weight)
    assert used(x, weight)


def test_a_choice_made_under_autocast_is_used_under_autocast_only(scaled, tries, tmp_path):
    op = scaled(exact)

    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            op(*inputs())

    choose.choose(forward, tmp_path, CPU)
    x, _ = inputs()
    chosen = kernels.OPERATIONS["scaled"].chosen
    assert kernels.key(x) not in chosen
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.key(x) in chosen


def test_a_bfloat16_kernel_may_have_twice_plain_pytorchs_error_and_no_more(scaled, tries, monkeypatch):
    rounded = trial.Trial(call_of(scaled(exact), dtype=torch.bfloat16), CPU)
    plain = max(rounded.plain_errors)
    assert 0 < plain < 2**-7
    assert rounded.verdict(lambda x, w: Scaled.apply(x, w, 1 + 2**-9, 1)) == ""
    assert rounded.verdict(lambda x, w: Scaled.apply(x, w, 1.03, 1)).startswith("wrong by")

    for part, said in ((0.99, ""), (1.01, "wrong by")):            # of the limit: twice, and one rounding
        found = [part * (2 * error + 2**-8) for error in rounded.plain_errors]
        monkeypatch.setattr(trial, "errors", lambda results, truth, found=found: found)
        assert rounded.verdict(exact).startswith(said) and bool(rounded.verdict(exact)) == bool(said)


def test_the_truth_is_the_specification_in_a_wider_dtype_without_tf32(tries):
    seen = []

    def specification(x, weight):
        seen.append((x.dtype, trial.tf32()))
        return x * weight

    def seen_op(x, weight):
        return exact(x, weight)

    op = kernels.operation(specification)(seen_op)
    before = trial.tf32()
    trial.allow_tf32(True, True)
    try:
        for dtype, wider in ((torch.float32, torch.float64), (torch.bfloat16, torch.float32)):
            call = call_of(op, dtype=dtype)
            seen.clear()
            trial.Trial(call, CPU)
            assert seen == [(dtype, (True, True)), (wider, (False, False))]
            assert trial.tf32() == (True, True)
    finally:
        trial.allow_tf32(*before)


@pytest.mark.parametrize("dtype,autocast,rounding", [
    (torch.float32, "", 1e-6), (torch.bfloat16, "", 2**-8), (torch.float32, "bfloat16", 2**-8)])
def test_one_rounding_is_half_an_ulp_of_the_coarsest_dtype_but_at_least_1e_6(
        dtype, autocast, rounding, scaled, tries):
    call = call_of(scaled(exact), dtype=dtype) | {"autocast": autocast}
    call["arguments"][1]["dtype"] = "float32"
    assert trial.Trial(call, CPU).rounding == rounding


def test_a_variant_that_killed_its_process_is_not_run_again(scaled, tries):
    op = scaled(lambda x, weight: pytest.fail("run again"))
    began = []
    row, right = trial.judged(call_of(op), CPU, False, {"kernel": "it hung"}, began.append)
    assert row["left_out"]["kernel"] == "it hung" and right.keys() == {"plain"}
    assert began == ["plain", "compiled"]


def test_a_trial_has_the_calls_strides_scaled_weights_and_part_of_a_large_batch(monkeypatch):
    wide = torch.zeros(7, 8, 12)
    weight = torch.nn.Parameter(torch.zeros(64, 400))
    bias = torch.nn.Parameter(torch.zeros(400))
    arguments = wide[:, :, ::3], wide[:, 2:4].bfloat16(), weight, bias, 3, None
    call = {"op": "any", "device": "cpu", "autocast": "", "arguments": [
        choose.layout(x) if isinstance(x, torch.Tensor) else x for x in arguments]}
    x, second, matrix, vector, *others = trial.made(call, 2, CPU)
    assert (x.shape, x.stride(), second.dtype) == ((7, 8, 4), (96, 12, 3), torch.bfloat16)
    assert matrix.requires_grad and vector.requires_grad and not x.requires_grad and others == [3, None]
    assert matrix.std().item() == pytest.approx(400**-0.5, rel=0.05)
    assert vector.std().item() == pytest.approx(1, rel=0.2) and x.std().item() == pytest.approx(1, rel=0.2)

    monkeypatch.setattr(trial, "LARGEST", 5 * 8 * 4)                   # elements: five of the seven rows
    assert [len(x) for x in trial.made(call, 2, CPU)[:4]] == [5, 5, 64, 400]
    assert [len(x) for x in trial.made(call, 1, CPU)[:4]] == [5, 7, 64, 400]
    monkeypatch.setattr(trial, "LARGEST", 1)
    assert [len(x) for x in trial.made(call, 2, CPU)[:4]] == [1, 1, 64, 400]


def test_times_are_medians_of_alternating_rounds_after_a_first_that_sets_the_repeats(monkeypatch):
    ms = {"a": [100.0, 1.0, 9.0, 2.0, 3.0, 4.0], "b": [200.0, 0.5, 0.5, 0.5, 7.0, 8.0]}
    launched = []

    def launches(_, name, repeats):
        launched.append((name, repeats))
        return ms[name].pop(0)

    monkeypatch.setattr(trial, "launches", launches)
    on_a_gpu = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    assert trial.times(on_a_gpu, {"a": "a", "b": "b"}) == ({"a": 3.0, "b": 0.5}, {})
    assert launched == [("a", 1), ("b", 1), ("b", 1), ("a", 1), ("a", 3), ("b", 6), ("b", 6), ("a", 1),
                        ("a", 1), ("b", 6), ("b", 1), ("a", 1)]
    monkeypatch.undo()
    monkeypatch.setattr(trial, "time", SimpleNamespace(perf_counter=iter([2.0, 3.0]).__next__))
    calls = []
    one = SimpleNamespace(device=CPU, call=lambda function: calls.append(function))
    assert trial.launches(one, "f", repeats=4) == 250.0 and calls == ["f"] * 4


def test_a_variant_that_fails_while_it_is_timed_is_left_out_with_the_reason(scaled, monkeypatch):
    turns = []

    def launches(_, function, repeats):
        turns.append(function)
        if function == "b" and turns.count("b") == 2:
            raise RuntimeError("an illegal address")
        return 1.0 if function == "a" else 0.5

    monkeypatch.setattr(trial, "launches", launches)
    row = trial.timed({"call": call_of(scaled(exact)), "ms": {}, "left_out": {}, "chosen": "plain"},
                      {"a": "a", "b": "b"}, CPU)
    assert row["ms"] == {"a": 1.0} and row["chosen"] == "a"
    assert row["left_out"] == {"b": "RuntimeError: an illegal address"}


class Gpu:
    """A GPU's queue, in ms: what Python launches starts when Python has launched it and the GPU is free."""

    def __init__(self):
        self.python = 0.0
        self.done = 0.0                                    # when the GPU has finished all launches so far

    def launch(self, ms):
        self.done = max(self.done, self.python) + ms

    def event(self, **_):
        made = SimpleNamespace(at=None, synchronize=lambda: setattr(self, "python", self.done))
        made.record = lambda: setattr(made, "at", max(self.done, self.python))
        made.query = lambda: made.at <= self.python
        made.elapsed_time = lambda other: other.at - made.at
        return made


@pytest.mark.parametrize("python,gpu", [(0.3, 0.01), (3.0, 0.01), (0.3, 2.0)])
def test_on_a_gpu_a_variants_time_is_the_gpus_even_if_python_launches_more_slowly(python, gpu, monkeypatch):
    queue = Gpu()
    monkeypatch.setattr(torch.cuda, "Event", queue.event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: queue.launch(cycles / 1.7e6))

    def call(function):
        queue.python += python
        queue.launch(gpu)

    on_a_gpu = SimpleNamespace(device=SimpleNamespace(type="cuda"), call=call)
    assert trial.launches(on_a_gpu, "f", repeats=20) == pytest.approx(gpu)


def test_a_variant_that_waits_for_the_gpu_is_timed_after_a_few_tries(monkeypatch):
    queue = Gpu()
    monkeypatch.setattr(torch.cuda, "Event", queue.event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: queue.launch(cycles / 1.7e6))

    def call(function):
        queue.launch(0.5)
        queue.python = queue.done

    on_a_gpu = SimpleNamespace(device=SimpleNamespace(type="cuda"), call=call)
    assert trial.launches(on_a_gpu, "f", repeats=2) == pytest.approx(0.5)


def call_of(op, **changes):
    found = []

    def watch(op, arguments, result):
        found.append(choose.described(op, arguments))

    kernels.WATCH = watch
    op(*inputs(**changes))
    kernels.WATCH = None
    return found[0]


def test_small_operations_are_not_tried(scaled, tries, monkeypatch, tmp_path, capsys):
    op = scaled(exact)
    for smallest, found in ((30, 1), (31, 0)):                         # of 30 elements
        monkeypatch.setattr(choose, "SMALLEST", smallest)
        assert len(choose.choose(lambda: op(*inputs()), tmp_path, CPU)) == found
    assert tries == ["scaled"]
    assert "trying 0" not in capsys.readouterr().out

    @kernels.operation(lambda x, weight: x[..., None] * weight)        # a small input, a large result
    def outer(x, weight):
        return x[..., None] * weight

    assert len(choose.choose(lambda: outer(*inputs()), tmp_path, CPU)) == 1


def test_the_table_has_a_column_for_every_variant_and_a_line_for_each_that_is_slower():
    call = {"op": "linear_gelu", "arguments": [{"shape": [5, 8], "dtype": "bfloat16"}]}
    row = {"call": call, "ms": {"plain": 0.5, "cublas": 0.7}, "left_out": {}, "chosen": "plain"}
    said = choose.table("a card", [row], compiled=False)
    assert "0.500" in said and "cublas is left out: it takes 0.700 ms, plain 0.500" in said
    row = row | {"ms": {"plain": 0.5, "cublas": 0.4}, "chosen": "cublas"}
    assert "0.400" in choose.table("a card", [row], compiled=False)
    variants = {name for op in kernels.OPERATIONS.values() for name in op.variants}
    assert all(name in said.splitlines()[1].split() for name in variants)


def test_gradients_have_the_layout_of_a_variants_own_outputs(scaled):
    """Else a kernel whose outputs are laid out for what comes next would be timed with copies."""
    given = []

    class Transposed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return (x * weight).T.contiguous().T

        @staticmethod
        def backward(ctx, dout):
            given.append(dout.stride())
            x, weight = ctx.saved_tensors
            return dout * weight, (dout * x).sum(0)

    op = scaled(lambda x, weight: Transposed.apply(x, weight))
    found = trial.Trial(call_of(op), CPU)
    assert found.verdict(op_of(op).variants["kernel"]) == ""
    assert found.verdict(op_of(op).variants["plain"]) == ""
    assert given == [(1, 5)]


def op_of(run):
    return kernels.OPERATIONS[run.__name__]


def test_without_gradients_no_backward_pass_is_tried(scaled, tries, tmp_path):
    """So sampling may use a kernel whose backward pass is wrong."""
    op = scaled(FAULTS["backward wrong by 1 %"][0])

    def forward():
        with torch.no_grad():
            op(*inputs())

    assert choose.choose(forward, tmp_path, CPU)[0]["chosen"] == "kernel"


def test_inside_compiled_code_the_specification_is_compiled_before_it_is_timed(
        scaled, tries, monkeypatch, tmp_path):
    compiled = []

    def by_compiler(function):
        compiled.append(function)
        return function

    monkeypatch.setattr(trial, "by_compiler", by_compiler)
    op = scaled(exact)
    row, = choose.choose(lambda: op(*inputs()), tmp_path, CPU, compiled=True)
    variants = kernels.OPERATIONS["scaled"].variants
    assert compiled[-1] == variants["plain"]
    assert row["ms"].keys() == {"plain", "kernel"}


# ---------------------------------------------------------------- models


def test_losses_with_faulty_kernels_equal_those_without_kernels_bit_for_bit(
        finetune_config, tries, monkeypatch, tmp_path, read_log, capsys):
    """Every operation of a LightningDiT has a fault."""
    def nan(x, *others):
        return kernels.OPERATIONS["norm_modulate"].variants["plain"](x, *others) * math.nan

    def wrong(x, *others):
        x_new, h = kernels.OPERATIONS["add_norm_modulate"].variants["plain"](x, *others)
        return x_new, h * 1.01

    faults = {"norm_modulate": nan, "add_norm_modulate": wrong, "swiglu": fails, "patch_embed": slow,
              "qknorm_rope": fails}
    for name, fault in faults.items():
        kernels.OPERATIONS[name].variants["kernel"] = fault
    for backend in ("flash", "math"):
        kernels.OPERATIONS["sdpa"].variants[backend] = lambda q, k, v: v.transpose(1, 2)
    finetune.main(finetune_config(tmp_path / "auto", label_dropout=0.5))
    said = capsys.readouterr().out
    for name in faults:
        assert f"  {name}: kernel is left out: " in said
    assert "sdpa: math is left out: wrong by" in said
    assert json.loads((tmp_path / "auto" / "kernels.json").read_text())["rows"]

    monkeypatch.setattr(kernels, "KERNELS", "ref")
    finetune.main(finetune_config(tmp_path / "ref", label_dropout=0.5))
    losses = [[row["loss"] for row in read_log(tmp_path / name)] for name in ("auto", "ref")]
    assert losses[0] == losses[1]
    assert not (tmp_path / "ref" / "kernels.json").exists()


def test_a_models_operations_are_recorded_once_with_which_inputs_are_trained(make_dit):
    model = make_dit(D=4, qk_norm=True).train()
    z = torch.zeros(3, 8, 4, 4)
    calls = choose.recorded(lambda: model(z, torch.zeros(3), torch.zeros(3, dtype=torch.long)), CPU)
    found = {call["op"]: call["arguments"] for call in calls}
    assert [call["op"] for call in calls] == [
        "patch_embed", "norm_modulate", "qknorm_rope", "sdpa", "add_norm_modulate", "swiglu"]
    assert [x["trained"] for x in found["patch_embed"]] == [False, False, True, True, True, False]
    assert found["patch_embed"][1]["shape"] == [3, 4, 4, 4]
    assert found["patch_embed"][1]["stride"][0] == 8 * 16                              # a slice of z_all
    assert found["qknorm_rope"][0]["shape"] == [3, 16, 3, 4, 8]
    assert kernels.WATCH is None


def test_recording_operations_draws_no_random_number_and_ends_if_the_model_fails():
    before = torch.get_rng_state()
    choose.recorded(lambda: torch.randn(3), CPU)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ZeroDivisionError):
        choose.recorded(lambda: 1 / 0, CPU)
    assert kernels.WATCH is None


def test_recording_operations_keeps_nothing_for_a_backward_pass():
    """A batch that fits only with a kernel must get through once without it."""
    kept = []

    def forward():
        x = torch.ones(4, requires_grad=True) * 2                  # torch.sin's derivative needs this
        kept.extend([weakref.ref(x), torch.sin(x)])

    choose.recorded(forward, CPU)
    assert kept[1].requires_grad
    assert kept[0]() is None


def test_text_tokens_are_tried_with_gradients_even_if_the_first_block_has_none():
    """With adapters, the text has no gradient in the first block, but has one in the second."""
    cfg = dit.MMDiTConfig(C=4, D=4, E=48, A=3, depth=3, dual=1, context=12, pooled=8, pos_size=6, lora=2)
    model = dit.MMDiT(cfg)
    args = torch.zeros(2, 8, 4, 6), torch.zeros(2), torch.zeros(2, 7, 12), torch.zeros(2, 8)
    calls = choose.recorded(lambda: model(*args), CPU)
    texts = [c for c in calls if c["op"] == "norm_modulate" and c["arguments"][0]["shape"] == [2, 7, 48]]
    assert [text["arguments"][0]["trained"] for text in texts] == [True]


def test_a_sampler_is_tried_as_it_runs_under_autocast_without_gradients(make_dit):
    model = make_dit(D=4)
    z = torch.zeros(3, 8, 4, 4)

    def forward():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(z, torch.zeros(3), torch.zeros(3, dtype=torch.long))

    calls = choose.recorded(forward, CPU)
    assert {call["autocast"] for call in calls} == {"bfloat16"}
    assert not any(choose.trained(call) for call in calls)
    assert {call["arguments"][0]["dtype"] for call in calls if call["op"] != "patch_embed"} == {"bfloat16"}


@pytest.mark.parametrize("mode,interpreted", [("auto", False), ("ref", True), ("triton", True)])
def test_nothing_is_tried_on_a_cpu_or_with_kernels_set(mode, interpreted, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(kernels, "KERNELS", mode)
    monkeypatch.setattr(kernels, "INTERPRETED", interpreted)
    run = SimpleNamespace(cfg=SimpleNamespace(out=str(tmp_path / "run"), compile=False))
    choose.before_training(run, CPU, (2, 8, 4, 4), lambda x, y: pytest.fail("the model ran"))
    choose.before_sampling(tmp_path / "run", CPU, False, lambda: pytest.fail("the model ran"))
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- the cache


@pytest.fixture
def chosen(scaled, tries, tmp_path):
    """chosen() -> how many trials the choice took, with a cache in cache/da-vae."""
    op = scaled(exact)

    def again():
        tries.clear()
        row, = choose.choose(lambda: op(*inputs()), tmp_path, CPU)
        assert row["chosen"] == "kernel"
        return len(tries)
    return again


def test_the_same_call_on_the_same_machine_is_timed_once(chosen):
    assert [chosen(), chosen(), chosen()] == [1, 0, 0]


def test_the_cache_keeps_earlier_calls_and_what_another_program_wrote_meanwhile(
        scaled, tries, monkeypatch, tmp_path):
    op = scaled(exact)
    in_place = choose.try_apart

    def beside_another(calls, rows, device, compiled):
        found = choose.read_cache(choose.cache_file())
        choose.write_cache(choose.cache_file(), found | {"another machine": {}})
        return in_place(calls, rows, device, compiled)

    choose.choose(lambda: op(*inputs()), tmp_path, CPU)
    with monkeypatch.context() as m:
        m.setattr(choose, "try_apart", beside_another)
        choose.choose(lambda: op(*inputs(dtype=torch.bfloat16)), tmp_path, CPU)
    assert choose.read_cache(choose.cache_file()).keys() == {choose.machine(CPU), "another machine"}
    choose.choose(lambda: (op(*inputs()), op(*inputs(dtype=torch.bfloat16))), tmp_path, CPU)
    assert tries == ["scaled"] * 2                                 # each call once


@pytest.mark.parametrize("changed", ["driver", "triton_version"])
def test_another_driver_or_triton_counts_as_another_machine_and_the_old_one_is_kept(
        changed, chosen, monkeypatch):
    assert chosen() == 1
    with monkeypatch.context() as m:
        m.setattr(choose, changed, lambda: "another")
        assert [chosen(), chosen()] == [1, 0]
    assert chosen() == 0


def test_edited_kernels_are_tried_again(chosen, monkeypatch, tmp_path):
    assert chosen() == 1
    for file in Path(choose.__file__).parent.glob("*.py"):
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / "swiglu.py").write_text("# another kernel\n")
    monkeypatch.setattr(choose, "__file__", str(tmp_path / "choose.py"))
    assert chosen() == 1


def test_a_cached_kernel_that_is_wrong_today_is_not_used(chosen, scaled, tries, tmp_path):
    assert chosen() == 1
    op = scaled(FAULTS["wrong by 1 %"][0])
    row, = choose.choose(lambda: op(*inputs()), tmp_path, CPU)
    assert tries == ["scaled"]                             # the first trial: no other since
    assert row["chosen"] == "plain"
    assert "(in process 0)" in row["left_out"]["kernel"]
    assert kernels.OPERATIONS["scaled"].chosen == {}


def rows_replaced(text, row):
    """The cache with every row replaced by this."""
    return json.dumps({here: dict.fromkeys(rows, row) for here, rows in json.loads(text).items()})


def with_changes(text, **changes):
    cache = json.loads(text)
    for rows in cache.values():
        for row in rows.values():
            row |= changes
    return json.dumps(cache)


DAMAGE = {
    "cut off": lambda text: text[:len(text) // 2],
    "empty": lambda text: "",
    "a list": lambda text: "[]",
    "a list of machines": lambda text: json.dumps([json.loads(text)]),
    "nested without end": lambda text: "[" * 200_000,
    "binary": lambda text: "\x00\x01",
    "machines without rows": lambda text: json.dumps(dict.fromkeys(json.loads(text), 3)),
    "rows are numbers": lambda text: rows_replaced(text, 1),
    "rows are empty": lambda text: rows_replaced(text, {}),
    "another variant": lambda text: with_changes(text, chosen="best"),
    "times are words": lambda text: with_changes(text, ms={"plain": "1", "kernel": "2"}),
    "times of other variants": lambda text: with_changes(text, ms={"kernel": 1.0, "assembler": 2.0}),
    "another call": lambda text: with_changes(text, call={"op": "swiglu"}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_ignored_and_rewritten(damage, chosen, tmp_path):
    assert chosen() == 1
    file = tmp_path / "cache" / "da-vae" / "kernels.json"
    file.write_text(DAMAGE[damage](file.read_text()))
    assert [chosen(), chosen()] == [1, 0]
    assert list(file.parent.iterdir()) == [file]


def test_a_cache_that_is_not_utf8_is_ignored_and_rewritten(chosen, tmp_path):
    assert chosen() == 1
    (tmp_path / "cache" / "da-vae" / "kernels.json").write_bytes(b"\xff\xfe{")
    assert [chosen(), chosen()] == [1, 0]


def test_an_unwritable_cache_folder_costs_a_line_and_a_trial_each_time(chosen, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file")
    assert [chosen(), chosen()] == [1, 1]
    assert "not written" in capsys.readouterr().out


@pytest.mark.parametrize("given,wanted", [
    ("", "home/.cache"), ("relative/path", "home/.cache"), ("{tmp}/elsewhere", "elsewhere")])
def test_the_cache_is_where_the_xdg_rules_say(given, wanted, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", given.format(tmp=tmp_path))
    assert choose.cache_file() == tmp_path / wanted / "da-vae" / "kernels.json"


# ---------------------------------------------------------------- ranks, and the trial process


def test_what_fails_on_one_rank_is_plain_on_all(chosen, scaled, tries, monkeypatch, tmp_path, capsys):
    def from_all(x):
        """From two ranks: this one's table, and the other's failure."""
        return [x, None] if isinstance(x, list) else [x, {0: "RuntimeError: no compiler"}]

    monkeypatch.setattr(ranks, "from_all", from_all)
    op = scaled(exact)
    row, = choose.choose(lambda: op(*inputs()), tmp_path, CPU)
    assert row["chosen"] == "plain"
    assert kernels.OPERATIONS["scaled"].chosen == {}
    assert "kernel is left out: RuntimeError: no compiler (in process 1)" in capsys.readouterr().out


def test_other_ranks_take_the_first_ranks_table_and_try_nothing(scaled, tries, monkeypatch, tmp_path, capsys):
    op = scaled(exact)
    theirs = [{"call": call_of(op), "ms": {"plain": 2.0, "kernel": 1.0}, "left_out": {}, "chosen": "kernel"}]
    monkeypatch.setattr(ranks, "this_rank", lambda: 1)
    monkeypatch.setattr(ranks, "from_all", lambda x: [theirs, x] if x is None else [{}, x])
    choose.choose(lambda: op(*inputs()), tmp_path / "run", CPU)
    assert tries == []
    assert len(kernels.OPERATIONS["scaled"].chosen) == 1
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "run").exists()


CHILD = """
import json, os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1]).parent
job = json.loads((folder / "job.json").read_text())
lines = open(folder / "lines", "w", buffering=1)
say = lambda **line: lines.write(json.dumps(line) + "\\n")
for n, call, known in job["tries"]:
    for name in ("plain", "kernel"):
        say(number=n, starts=name)
        if call == "bad" and name not in known:
            {end}
say(judged=True)
while not pathlib.Path(job["go"]).exists():
    time.sleep(0.01)
for n, call, known in job["tries"]:
    since = time.time()
    {timing}
    say(number=n, row={"call": call, "left_out": known, "from": since, "to": time.time()})
"""


def child(end="pass", timing="pass"):
    """COMMAND of a process that only says that it tries: `end` happens in a bad call, `timing` in each."""
    return [sys.executable, "-c", CHILD.replace("{end}", end).replace("{timing}", timing)]


def found(rows):
    return [(row["call"], row["left_out"]) if isinstance(row, dict) else row for row in rows]


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("end,why", [
    ("if name == 'kernel': os.abort()", "its process ended with -6"),
    ("if name == 'kernel': print('illegal memory access', file=sys.stderr); sys.exit(1)",
     "its process ended with 1: illegal memory access"),
    ("if name == 'kernel': time.sleep(60)", "did not end within 1 s"),
])
def test_a_kernel_that_kills_or_hangs_its_process_is_left_out_and_the_others_are_tried(
        end, why, at_once, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(trial, "COMMAND", child(end))
    monkeypatch.setattr(trial, "PATIENCE", 1)
    rows = [None, "known before", None, None]
    assert trial.try_apart(["good", "known", "bad", "good"], rows, CPU, False, at_once) == ""
    assert found(rows) == [("good", {}), "known before", ("bad", {"kernel": why}), ("good", {})]


def test_times_are_taken_by_one_process_at_a_time_after_all_have_judged(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    slow = "if name == 'kernel': time.sleep(1)"
    monkeypatch.setattr(trial, "COMMAND", child(slow, timing="time.sleep(0.05)"))
    rows = [None] * 6
    begin = time.time()
    assert trial.try_apart(["good", "good", "bad", "good", "good", "good"], rows, CPU, False, 3) == ""
    spans = sorted((row["from"], row["to"]) for row in rows)
    assert spans[0][0] > begin + 1
    for (_, end), (start, _) in zip(spans, spans[1:]):
        assert start >= end


def test_a_call_that_ran_out_of_memory_beside_others_is_tried_alone(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    beside = "if call == 'bad' and len(list(folder.parent.parent.iterdir())) > 1"
    monkeypatch.setattr(trial, "COMMAND", child(timing=beside + ": known = {'plain': 'OutOfMemoryError'}"))
    rows = [None, None]
    assert trial.try_apart(["bad", "good"], rows, CPU, False, 2) == ""
    assert found(rows) == [("bad", {}), ("good", {})]


def test_the_time_limit_is_per_variant(monkeypatch):
    says = "        say(number=n, starts"
    slow = child()
    slow[2] = slow[2].replace(says, f"        time.sleep(0.7)\n{says}")
    monkeypatch.setattr(trial, "COMMAND", slow)
    monkeypatch.setattr(trial, "PATIENCE", 2)
    rows = [None, None]
    assert trial.try_apart(["good", "good"], rows, CPU, False, 1) == ""           # in 2.8 s
    assert found(rows) == [("good", {}), ("good", {})]


@pytest.mark.parametrize("name,why,kept", [
    ("kernel", "OutOfMemoryError: tried to allocate 2 GiB", False),
    ("math", "OutOfMemoryError: tried to allocate 600 GiB", True),         # always, of large attention
    ("kernel", "did not end within 180 s", False), ("math", "did not end within 180 s", False),
    ("kernel", "its process ended with -9", False),
    ("kernel", "its process ended with 1: illegal memory access", True), ("kernel", "wrong by 0.1", True)])
def test_failures_that_may_not_recur_are_not_cached(name, why, kept, scaled, monkeypatch, tmp_path):
    def tried(calls, rows, device, compiled):
        rows[:] = [{"call": call, "ms": {"plain": 1.0}, "left_out": {name: why}, "chosen": "plain"}
                   for call in calls]
        return ""

    monkeypatch.setattr(choose, "try_apart", tried)
    op = scaled(exact)
    choose.choose(lambda: op(*inputs()), tmp_path, CPU)
    assert bool(choose.read_cache(choose.cache_file())[choose.machine(CPU)]) == kept


def test_a_call_whose_specification_kills_the_process_is_not_tried_again(monkeypatch):
    monkeypatch.setattr(trial, "COMMAND", child("sys.exit(9)"))
    rows = [None, None]
    assert trial.try_apart(["bad", "good"], rows, CPU, False) == ""
    assert rows[0] == trial.untried("bad", "its process ended with 9")
    assert found(rows)[1] == ("good", {})


def test_after_four_processes_that_died_the_rest_of_their_calls_is_given_up(monkeypatch):
    monkeypatch.setattr(trial, "COMMAND", child("if name == 'kernel': sys.exit(9)"))
    rows = [None] * 5
    why = trial.try_apart(["bad"] * 5, rows, CPU, False, at_once=1)
    assert why == "4 processes failed, the last one: its process ended with 9"
    assert rows == [None] * 5


def test_without_a_trial_process_everything_is_plain_and_the_reason_printed(
        scaled, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(trial, "COMMAND", [sys.executable, "-c", "raise SystemExit('all GPUs are busy')"])
    op = scaled(exact)
    row, = choose.choose(lambda: op(*inputs()), tmp_path, CPU)
    assert row["chosen"] == "plain"
    assert "not tried: its process ended with 1: all GPUs are busy" in capsys.readouterr().out
    assert not choose.read_cache(choose.cache_file())[choose.machine(CPU)]


def test_the_trial_process_finds_attentions_fastest_backend(tmp_path):
    """The real process; on a CPU PyTorch has no cuDNN and no memory-efficient attention."""
    from kernels.attention import sdpa
    q, k, v = torch.randn(3, 1, 2, 8, 16)
    before = sdpa(q, k, v)
    row, = choose.choose(lambda: sdpa(q, k, v), tmp_path, CPU)
    assert {"plain", "flash", "math"} <= row["ms"].keys()
    assert {"cudnn", "efficient"} <= row["left_out"].keys()
    assert row["chosen"] == min(row["ms"], key=row["ms"].get)
    assert torch.allclose(sdpa(q, k, v), before, atol=1e-6)


@pytest.mark.gpu
def test_on_a_gpu_the_fastest_correct_variant_is_chosen_and_computes_the_same(monkeypatch, tmp_path):
    from kernels.attention import sdpa
    from kernels.norm_modulate import norm_modulate
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    cuda = torch.device("cuda", 0)
    x = torch.randn(8, 256, 1152, device=cuda, dtype=torch.bfloat16, requires_grad=True)
    shift, scale = torch.randn(8, 2 * 1152, device=cuda, dtype=torch.bfloat16).chunk(2, dim=-1)
    q, k, v = torch.randn(3, 8, 16, 256, 72, device=cuda, dtype=torch.bfloat16)

    def forward():
        return norm_modulate(x, shift, scale), sdpa(q, k, v)

    before = forward()
    rows = choose.choose(forward, tmp_path, cuda)
    assert [row["call"]["op"] for row in rows] == ["norm_modulate", "sdpa"]
    assert rows[0]["ms"].keys() == {"plain", "compiled", "kernel"}
    for row in rows:
        assert row["chosen"] == min(row["ms"], key=row["ms"].get)
    for a, b in zip(forward(), before, strict=True):
        assert (a - b).abs().max() < 0.02 * b.abs().max()


# ---------------------------------------------------------------- goals.py: verdicts on a measurement


def measured(**changes):
    """Rows as bench.py makes them, that meet G2 to G7 and G13."""
    what = goals.TRAINING
    rows = [
        {"what": what, "variant": goals.OURS, "ms": [200, 199, 201], "MFU": 0.45, "img/s": 640, "GiB": 40},
        {"what": what, "variant": goals.COMPILED, "ms": [240, 239, 241]},
        {"what": "decode 1024 px", "variant": goals.OURS, "ms": [30, 29, 31]},
        {"what": "decode 1024 px", "variant": "diffusers", "ms": [90, 89, 91]},
        {"what": "norm_modulate (8, 2)", "variant": "kernel", "ms": [1, 1, 1], "of the ceiling": 0.86},
        {"what": "norm_modulate (8, 2), and back", "variant": "kernel", "ms": [1, 1, 1],
         "of the ceiling": 0.8},
    ]
    for back, times in (("", (1.0, 1.2, 1.6)), (", and back", (1.1, 1.0, 1.4))):
        what = f"norm, rotation, attention (8, 2){back}"
        for variant, ms in zip(("kernel, flash", "kernel, cudnn", "cudnn, compiled"), times):
            rows.append({"what": what, "variant": variant, "ms": [ms, ms, ms]})
        rows.append({"what": what, "variant": "flash, compiled", "error": "not built"})
    rows[0] |= changes
    return rows


def verdicts(rows, machine="NVIDIA H100 80GB HBM3"):
    return {row["goal"]: row for row in goals.verdicts(rows, machine)}


def test_goals_are_judged_by_their_rows_and_the_rest_are_not_measured():
    found = verdicts(measured())
    assert list(found) == [f"G{n}" for n in range(1, 17)]
    met = {name for name, row in found.items() if row["verdict"] == "met"}
    assert met == {"G2", "G3", "G4", "G5", "G6", "G7", "G13"}
    assert {row["verdict"] for name, row in found.items() if name not in met} == {"not measured"}
    assert found["G2"]["number"] == "1.20x"
    assert found["G6"]["number"] == "1.60x, 1.40x"         # against PyTorch's fastest
    assert found["G9"]["number"] == "its row is missing"
    assert "8 GPUs" in found["G16"]["number"]


@pytest.mark.parametrize("changes,missed", [
    (dict(ms=[220, 219, 221]), "G2"), (dict(MFU=0.42), "G3"), ({"img/s": 589}, "G4"), (dict(GiB=47), "G7")])
def test_a_number_short_of_its_goal_misses_it(changes, missed):
    found = verdicts(measured(**changes))
    assert [name for name, row in found.items() if row["verdict"] == "missed"] == [missed]


MORE = [                                                   # G9 to G12, G14 and G15, just met
    {"what": goals.SAMPLING, "variant": goals.OURS, "img/s (estimate)": 3.0},
    {"what": goals.LARGE, "variant": goals.OURS, "img/s (estimate)": 0.58},
    {"what": goals.SAMPLING, "variant": "diffusers", "img/s (estimate)": 3.0 / 1.36},
    {"what": goals.SAMPLING, "variant": "diffusers, compiled", "img/s (estimate)": 3.0 / 1.09},
    {"what": goals.NATIVE, "variant": "diffusers", "img/s (estimate)": 3.0 / 5.1},
    {"what": goals.NATIVE, "variant": "diffusers, compiled", "img/s (estimate)": 3.0 / 4.3},
    {"what": goals.LARGE_NATIVE, "variant": "diffusers", "img/s (estimate)": 0.08},
    {"what": goals.SINGLE, "variant": f"{goals.OURS}, graph", "ms": [21.6, 21.5, 22]},
    {"what": "patch_embed (8, 2)", "variant": "kernel", "ms": [1, 1, 1], "of the ceiling": 0.77},
    {"what": "patch_embed (8, 2), and back", "variant": "kernel", "ms": [1, 1, 1]},
    {"what": "patch_embed (8, 2), and back", "variant": "ref", "ms": [3, 3, 3]},
]


@pytest.mark.parametrize("what,variant,changes,missed", [
    ("norm_modulate (8, 2)", "kernel", {"of the ceiling": 0.84}, "G5"),
    ("norm_modulate (8, 2), and back", "kernel", {"of the ceiling": 0.74}, "G5"),
    ("norm, rotation, attention (8, 2)", "cudnn, compiled", dict(ms=[1.49, 1, 2]), "G6"),
    ("norm, rotation, attention (8, 2), and back", "cudnn, compiled", dict(ms=[1.29, 1, 2]), "G6"),
    (goals.SAMPLING, goals.OURS, {"img/s (estimate)": 2.99}, "G9"),
    (goals.LARGE, goals.OURS, {"img/s (estimate)": 0.57}, "G12"),
    (goals.NATIVE, "diffusers", {"img/s (estimate)": 0.61}, "G10"),
    (goals.NATIVE, "diffusers, compiled", {"img/s (estimate)": 0.72}, "G10"),
    (goals.SAMPLING, "diffusers", {"img/s (estimate)": 2.3}, "G11"),
    (goals.SAMPLING, "diffusers, compiled", {"img/s (estimate)": 2.8}, "G11"),
    (goals.LARGE_NATIVE, "diffusers", {"img/s (estimate)": 0.084}, "G12"),
    ("decode 1024 px", goals.OURS, dict(ms=[36.1, 36, 37]), "G13"),
    ("decode 1024 px", "diffusers", dict(ms=[74, 74, 74]), "G13"),
    (goals.SINGLE, f"{goals.OURS}, graph", dict(ms=[21.8, 21, 22]), "G14"),
    ("patch_embed (8, 2)", "kernel", {"of the ceiling": 0.76}, "G15"),
    ("patch_embed (8, 2), and back", "ref", dict(ms=[2.99, 2.9, 3.1]), "G15"),
])
def test_a_goal_is_missed_by_any_one_of_its_numbers(what, variant, changes, missed):
    rows = measured() + [dict(row) for row in MORE]
    assert "missed" not in {row["verdict"] for row in verdicts(rows).values()}
    row, = [row for row in rows if (row["what"], row["variant"]) == (what, variant)]
    row |= changes
    found = verdicts(rows)
    assert [name for name, row in found.items() if row["verdict"] == "missed"] == [missed]
    assert [name for name, row in found.items() if row["verdict"] == "not measured"] == ["G1", "G8", "G16"]


def test_an_h200_is_held_to_its_own_goals():
    found = verdicts(measured(), "NVIDIA H200")
    assert [name for name, row in found.items() if row["verdict"] == "missed"] == ["G3", "G4"]
