"""The fused loss against the plain one, and against numbers worked out by hand."""

import math
from dataclasses import replace

import pytest
import torch

from drafters import fused_loss as module
from drafters.fused_loss import chunk_rows, fused_loss
from drafters.losses import RowInputs, Vocabulary, plain_loss

CPU = torch.device("cpu")
ROWS, HIDDEN, VOCAB, RANK = 13, 6, 37, 5


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Four rows a chunk, so that 13 rows make three whole chunks and a rest."""
    monkeypatch.setattr(module, "CPU_CHUNK_BYTES", 4 * VOCAB * 4)
    assert chunk_rows(VOCAB, CPU) == 4


def make(dtype=torch.float32, *, markov=True, softcap=None, l1_alpha=0.9, scale=1.0):
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    rows = RowInputs(
        hidden=normal(ROWS, HIDDEN).requires_grad_(),
        latent=normal(ROWS, RANK).requires_grad_() if markov else None,
        labels=torch.randint(VOCAB, (ROWS,), generator=generator),
        target_states=normal(ROWS, HIDDEN).to(torch.bfloat16),
        ce_weights=torch.rand(ROWS, generator=generator),
        l1_weights=l1_alpha * torch.rand(ROWS, generator=generator),
    )
    return rows, Vocabulary(normal(VOCAB, HIDDEN), normal(VOCAB, RANK).requires_grad_() if markov else None, softcap)


def gradients(compute, rows, vocabulary, factor=1.0):
    leaves = [leaf for leaf in (rows.hidden, rows.latent, vocabulary.markov) if leaf is not None]
    loss, terms = compute(rows, vocabulary)
    return loss, terms, torch.autograd.grad(loss * factor, leaves)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("markov", [True, False])
@pytest.mark.parametrize("l1_alpha", [0.9, 0.0])
def test_fused_equals_plain_in_float32(softcap, markov, l1_alpha):
    rows, vocabulary = make(markov=markov, softcap=softcap, l1_alpha=l1_alpha)
    loss, terms, ours = gradients(fused_loss, rows, vocabulary, factor=3.0)
    expected_loss, expected_terms, theirs = gradients(plain_loss, rows, vocabulary, factor=3.0)
    torch.testing.assert_close(loss, expected_loss)
    for name, term, expected in zip(terms._fields, terms, expected_terms, strict=True):
        torch.testing.assert_close(term, expected, msg=lambda text, name=name: f"{name}: {text}")
        assert not term.requires_grad
    for gradient, expected in zip(ours, theirs, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_fused_is_as_near_to_float32_as_plain_in_bf16(softcap):
    rows, vocabulary = make(torch.bfloat16, softcap=softcap)
    exact_rows = replace(
        rows,
        hidden=rows.hidden.detach().float().requires_grad_(),
        latent=rows.latent.detach().float().requires_grad_(),
    )
    exact_vocabulary = Vocabulary(
        vocabulary.head.float(), vocabulary.markov.detach().float().requires_grad_(), vocabulary.softcap
    )
    exact_loss, _, exact = gradients(plain_loss, exact_rows, exact_vocabulary)
    loss, terms, ours = gradients(fused_loss, rows, vocabulary)
    plain, _, theirs = gradients(plain_loss, rows, vocabulary)
    assert {term.dtype for term in (loss, *terms)} == {torch.float32}
    assert {gradient.dtype for gradient in ours} == {torch.bfloat16}
    assert loss.item() == pytest.approx(plain.item(), rel=1e-3)
    assert loss.item() == pytest.approx(exact_loss.item(), rel=1e-2)
    for gradient, other, expected in zip(ours, theirs, exact, strict=True):
        error, plain_error = ((one.float() - expected).norm() / expected.norm() for one in (gradient, other))
        assert error < max(1.2 * plain_error, 5e-3)


def test_loss_of_one_row_by_hand():
    # Head and states are such that the logits are their logarithms: p = (0.5, 0.3, 0.2), q = (0.1, 0.6, 0.3).
    log_p, log_q = (torch.tensor([[math.log(x) for x in row]]) for row in ((0.5, 0.3, 0.2), (0.1, 0.6, 0.3)))
    rows = RowInputs(log_p.requires_grad_(), None, torch.tensor([1]), log_q, torch.tensor([2.0]), torch.tensor([0.5]))
    loss, terms = fused_loss(rows, Vocabulary(torch.eye(3)))
    assert terms.cross_entropy.item() == pytest.approx(-math.log(0.3), rel=1e-5)
    assert terms.l1.item() == pytest.approx(0.8, rel=1e-5)
    assert terms.acceptance.item() == pytest.approx(0.6, rel=1e-5)
    assert loss.item() == pytest.approx(2 * -math.log(0.3) + 0.5 * 0.8, rel=1e-5)
    loss.backward()
    # s = (1, −1, −1), ⟨s, p⟩ = 0: CE gives 2·(p − onehot), L1 gives 0.5·p ⊙ s.
    assert log_p.grad[0].tolist() == pytest.approx([1.0 + 0.25, 0.6 - 2 - 0.15, 0.4 - 0.1], rel=1e-4)


def test_a_label_that_the_drafter_holds_impossible_has_a_finite_loss_and_gradient():
    rows = RowInputs(
        torch.tensor([[200.0, -200.0]]).requires_grad_(),
        None,
        torch.tensor([1]),
        torch.tensor([[-200.0, 200.0]]),
        torch.ones(1),
        torch.ones(1),
    )
    loss, terms = fused_loss(rows, Vocabulary(torch.eye(2)))
    loss.backward()
    assert terms.cross_entropy.item() == pytest.approx(400.0)
    assert (terms.l1.item(), terms.acceptance.item()) == (2.0, 0.0)
    assert rows.hidden.grad.tolist() == [[1.0, -1.0]]


def test_no_rows_give_zero_loss_and_zero_gradients():
    rows, vocabulary = make()
    none = {name: getattr(rows, name)[:0] for name in RowInputs.__dataclass_fields__}
    loss, terms = fused_loss(RowInputs(**none), vocabulary)
    assert loss.item() == 0
    assert terms.l1.shape == (0,)
    loss.backward()
    assert vocabulary.markov.grad.abs().max() == 0


def test_no_tensor_over_the_vocabulary_is_larger_than_a_chunk():
    rows, vocabulary = make()
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            outputs = result if isinstance(result, tuple | list) else [result]
            seen.extend(tuple(one.shape) for one in outputs if isinstance(one, torch.Tensor))
            return result

    with Watch():
        loss, _ = fused_loss(rows, vocabulary)
        loss.backward()
    heights = {shape[0] for shape in seen if len(shape) == 2 and shape[1] == VOCAB and shape[0] not in (HIDDEN, RANK)}
    assert heights == {1, 4}


def test_without_gradients_none_are_formed(monkeypatch):
    rows, vocabulary = make()
    with_gradients, _ = fused_loss(rows, vocabulary)

    def refuse(*_):
        raise AssertionError("a gradient was formed")

    monkeypatch.setattr(module._Gradients, "write", refuse)
    with torch.no_grad():
        loss, _ = fused_loss(rows, vocabulary)
    assert loss.item() == with_gradients.item()
    assert not loss.requires_grad


def test_only_gradients_that_are_asked_for_are_formed():
    rows, vocabulary = make()
    frozen = replace(vocabulary, markov=vocabulary.markov.detach())
    loss, _ = fused_loss(rows, frozen)
    loss.backward()
    _, _, theirs = gradients(plain_loss, rows, vocabulary)
    torch.testing.assert_close(rows.hidden.grad, theirs[0], rtol=1e-5, atol=1e-6)
    assert frozen.markov.grad is None


def test_a_second_backward_is_refused():
    rows, vocabulary = make()
    loss, _ = fused_loss(rows, vocabulary)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed out"):
        loss.backward()


def test_a_head_that_is_to_be_trained_is_refused():
    rows, vocabulary = make()
    with pytest.raises(ValueError, match="freeze it"):
        fused_loss(rows, replace(vocabulary, head=vocabulary.head.requires_grad_()))
