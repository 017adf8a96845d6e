import pytest
import torch

from drafters import eagle3_loss
from drafters.eagle3_loss import Cut, StepRows, fused_soft_loss, plain_soft_loss, plain_soft_losses
from drafters.losses import Vocabulary

VOCAB, HIDDEN = 19, 3
TARGETS = [range(11), range(2, 11), [0, 3, 4, 9], []]
"""Target rows of four steps: all, all but the first, some, none."""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of four rows: two whole ones and a rest."""
    monkeypatch.setattr(eagle3_loss, "chunk_rows", lambda vocab_size, device: 4)


def inputs(dtype=torch.float32, softcap=None):
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    steps = [
        StepRows(
            draw(len(targets), HIDDEN).to(dtype).requires_grad_(),
            torch.tensor(list(targets), dtype=torch.long),
            torch.rand(len(targets), generator=generator),
        )
        for targets in TARGETS
    ]
    return steps, draw(11, HIDDEN), Vocabulary(draw(VOCAB, HIDDEN).to(dtype), softcap=softcap)


def cut_of(vocabulary, tokens):
    return Cut(torch.tensor(tokens), vocabulary.head[tokens])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("tokens", [None, [1, 2, 5, 9, 10, 14, 18]])
def test_fused_equals_plain_in_values_and_gradients(dtype, tolerance, softcap, tokens):
    steps, target_states, vocabulary = inputs(dtype, softcap)
    cut = tokens and cut_of(vocabulary, tokens)
    results = []
    for compute in (fused_soft_loss, plain_soft_loss):
        loss, terms = compute(steps, target_states, vocabulary, cut)
        gradients = torch.autograd.grad(3 * loss, [step.hidden for step in steps])
        results.append((loss, terms, gradients))
    (loss, terms, gradients), (plain, plain_terms, plain_gradients) = results
    assert loss.item() == pytest.approx(plain.item(), rel=tolerance)
    for ours, theirs in zip(terms, plain_terms, strict=True):
        for term, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(term, expected, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(gradients, plain_gradients, strict=True):
        assert ours.dtype == dtype
        assert (ours - theirs).float().norm() <= tolerance * theirs.float().norm()


def test_terms_of_known_distributions():
    draft = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]))
    target = torch.log(torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.6, 0.2]]))
    terms = plain_soft_losses(draft, target)
    log = torch.log
    expected = [
        -(0.25 * log(torch.tensor(0.5)) + 0.75 * log(torch.tensor(0.25))),
        -(0.4 * log(torch.tensor(0.1)) + 0.6 * log(torch.tensor(0.8))),
    ]
    torch.testing.assert_close(terms.cross_entropy, torch.stack(expected))
    torch.testing.assert_close(terms.acceptance, torch.tensor([0.75, 0.8]))
    assert terms.agreement.tolist() == [0, 1]


def test_terms_of_known_distributions_over_a_cut_vocabulary():
    draft = torch.log(torch.tensor([[0.5, 0.5], [0.25, 0.75]]))
    target = torch.log(torch.tensor([[0.6, 0.2, 0.2], [0.1, 0.8, 0.1]]))
    terms = plain_soft_losses(draft, target, torch.tensor([0, 2]))
    log = torch.log
    assert terms.cross_entropy[0].item() == pytest.approx(-log(torch.tensor(0.5)).item())
    assert terms.cross_entropy[1] == 0, "what the target prefers there is not kept"
    # Σ min(p, q) with the draft's other tokens at 0: 0.5 + 0.2 and 0.1 + 0.1.
    torch.testing.assert_close(terms.acceptance, torch.tensor([0.7, 0.2]))
    assert terms.agreement.tolist() == [1, 0]


@pytest.mark.parametrize("compute", [fused_soft_loss, plain_soft_loss])
def test_cut_that_keeps_every_token_changes_nothing(compute):
    steps, target_states, vocabulary = inputs()
    whole, whole_terms = compute(steps, target_states, vocabulary)
    cut, cut_terms = compute(steps, target_states, vocabulary, cut_of(vocabulary, list(range(VOCAB))))
    torch.testing.assert_close(cut, whole)
    for ours, theirs in zip(cut_terms, whole_terms, strict=True):
        for term, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(term, expected)


def test_rows_whose_preferred_token_is_cut_away_have_no_gradient():
    steps, target_states, vocabulary = inputs()
    choices = vocabulary.target_logits(target_states).argmax(-1)
    tokens = sorted(set(range(VOCAB)) - {int(choices[0])})
    loss, terms = fused_soft_loss(steps, target_states, vocabulary, cut_of(vocabulary, tokens))
    (gradient,) = torch.autograd.grad(loss, [steps[0].hidden])
    outside = choices == choices[0]
    assert (gradient[outside] == 0).all()
    assert (gradient[~outside].abs().sum(1) > 0).all()
    assert (terms[0].cross_entropy[outside] == 0).all()
    assert (terms[0].agreement[outside] == 0).all()


def test_nothing_of_the_vocabularys_width_outlives_its_chunk():
    steps, target_states, vocabulary = inputs()
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == VOCAB:
                seen.append(out.shape[0])
            return out

    with Watch():
        fused_soft_loss(steps, target_states, vocabulary)[0].backward()
    assert seen
    assert max(seen) == 8


def test_each_row_is_projected_once():
    steps, target_states, vocabulary = inputs()
    projected = []
    linear = torch.nn.functional.linear

    def count(rows, weight):
        projected.append(len(rows))
        return linear(rows, weight)

    eagle3_loss.functional.linear, before = count, linear
    try:
        fused_soft_loss(steps, target_states, vocabulary)
    finally:
        eagle3_loss.functional.linear = before
    assert sum(projected) == 11 + sum(len(targets) for targets in TARGETS)


def test_backward_runs_once():
    steps, target_states, vocabulary = inputs()
    loss, _ = fused_soft_loss(steps, target_states, vocabulary)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="ran before"):
        loss.backward()


def test_trainable_head_is_refused():
    steps, target_states, vocabulary = inputs()
    vocabulary.head.requires_grad_()
    with pytest.raises(ValueError, match="freeze it"):
        fused_soft_loss(steps, target_states, vocabulary)


def test_no_gradients_are_formed_without_need():
    steps, target_states, vocabulary = inputs()
    with torch.no_grad():
        loss, _ = fused_soft_loss(steps, target_states, vocabulary)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(plain_soft_loss(steps, target_states, vocabulary)[0].item())
