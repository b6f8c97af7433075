"""Reconstruction on the tiny model: it solves the least squares that it says, and brings students closer to the teacher."""

import pytest
import torch

from compressor.bank import Bank
from compressor.executor import Reference
from compressor.network import loaded
from compressor.plan import DROP, Action, Plan
from compressor.recovery.reconstruct import RIDGE, _Fitting, _LeastSquares, reconstruct
from compressor.student import full_plan


def changed(tiny, table: str, format: str, changes: dict[str, Action]) -> Plan:
    return Plan(tuple((n, changes.get(n, a)) for n, a in full_plan(tiny.decoder, format, table).items()))


def kl(teacher, student, tokens) -> float:
    return Reference(teacher, tokens).kl(loaded(teacher, student))


@pytest.fixture
def bank(tiny, windows, tmp_path) -> Bank:
    return Bank(tmp_path / "bank", tiny, windows[:16], windows[:4])


def test_least_squares_against_the_normal_equations_of_everything_at_once():
    torch.manual_seed(0)
    w, x, y, c = torch.randn(5, 7), torch.randn(6, 10, 7), torch.randn(6, 10, 5), torch.rand(6, 10)
    fit = _LeastSquares(w)
    for windows in (slice(0, 4), slice(4, 6)):
        x_TI, y_TO = x[windows].flatten(0, 1), y[windows].flatten(0, 1)
        fit.add(x_TI, y_TO - x_TI @ w.T, c[windows].flatten())
    x, y, c = x.flatten(0, 1).double(), y.flatten(0, 1).double(), c.flatten()[:, None].double() / float(c.sum())
    moment = (x * c).T @ x
    ridge = RIDGE * moment.diagonal().mean() * torch.eye(7).double()
    wanted = ((y * c).T @ x + w.double() @ ridge) @ torch.linalg.inv(moment + ridge)
    solution, found = fit.solution()
    torch.testing.assert_close(solution.double(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.double(), moment, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers.0.ffn": Action(64, "w4"), "layers.1.attention": Action(1, "w4"), "layers.2.ffn": Action(96, "int8")},
        {"layers.0.attention": DROP, "layers.1.ffn": DROP},
    ],
    ids=["bits", "pruned", "dropped"],
)
def test_a_student_comes_closer_on_text_that_was_not_fitted(tiny, windows, bank, changes):
    plan = changed(tiny, "w8", "w2", changes)
    assert kl(tiny, reconstruct(bank, plan, windows[:16]), windows[16:]) < 0.95 * kl(
        tiny, bank.realize(plan), windows[16:]
    )


def test_the_teacher_itself_stays_as_it_is(tiny, windows, bank):
    student = reconstruct(bank, full_plan(tiny.decoder, "fp32", "fp32"), windows[:16])
    assert kl(tiny, student, windows[16:]) < 1e-6
    for name, weight in student.matrices.items():
        torch.testing.assert_close(weight.dequantize(), tiny.matrix(name).detach(), rtol=1e-3, atol=1e-4)


def test_formats_and_widths_are_those_of_the_plan(tiny, windows, bank):
    plan = changed(
        tiny,
        "w8",
        "w4",
        {"layers.0.ffn": Action(64, "w2+w4"), "layers.1.attention": DROP, "layers.2.attention": Action(2, "w2+w8")},
    )
    student, plain = reconstruct(bank, plan, windows[:16]), bank.realize(plan)
    assert student.plan == plan and student.vectors.keys() == plain.vectors.keys()
    assert student.matrices.keys() == plain.matrices.keys()
    for name, weight in plain.matrices.items():
        assert (student.matrices[name].format, student.matrices[name].shape) == (weight.format, weight.shape)


def test_the_stream_is_what_a_whole_forward_pass_computes(tiny, windows):
    stream, hidden = tiny.stream(windows[:6]), tiny.every_hidden(windows[:6])
    seen: dict[str, torch.Tensor] = {}
    with tiny.watch_inputs(lambda name, x: seen.setdefault(name, x)):
        tiny.hidden(windows[:6])
    for layer in range(tiny.decoder.layers):
        torch.testing.assert_close(stream.hidden_NLD, hidden[layer])
        for kind in ("attention", "ffn"):
            name = f"layers.{layer}.{kind}"
            (site,) = stream.sites
            assert site.name == name
            for read in (f"{name}.in", f"{name}.out"):
                for batch, _, x in stream.inputs(site, read):
                    torch.testing.assert_close(x, seen[read][batch].flatten(0, 1))
            stream.advance()
    torch.testing.assert_close(tiny.module("norm")(stream.hidden_NLD), hidden[-1])


def test_a_fit_that_was_cut_off_goes_on_where_it_stopped(tiny, windows, bank, tmp_path, monkeypatch):
    plan = changed(tiny, "w8", "w4", {"layers.0.ffn": Action(64, "w2"), "layers.1.attention": DROP})
    whole = {name: tensor.clone() for name, tensor in reconstruct(bank, plan, windows[:16]).tensors().items()}
    for path in (tmp_path / "bank").glob("*/fits/*/layers.2.*"):
        path.unlink()
    again = Bank(tmp_path / "bank", tiny, windows[:16], windows[:4])
    fitted, fit = [], _Fitting.fit
    monkeypatch.setattr(_Fitting, "fit", lambda self, *given: (fitted.append(self.site.name), fit(self, *given))[1])
    resumed = reconstruct(again, plan, windows[:16]).tensors()
    assert fitted == ["layers.2.attention", "layers.2.ffn"]
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
