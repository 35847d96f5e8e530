"""The sampled class layer: which centres are trained, their gradients, the optimizer's state."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gkd.trainer.head.fused import grouped_margin_loss
from gkd.trainer.head.margin import HeadSpec, Margin
from gkd.trainer.head.partial_fc import ClassSample, SampledCenters, borrowed, sample_classes
from gkd.trainer.head.targets import GroupTargets
from tests.trainer.faces import run
from tests.trainer.runs import losses

BATCH, CLASSES, DIM = 6, 400, 16


class Case:
    """A batch in float64, groups of five classes, at a common scale."""

    def __init__(self) -> None:
        rng = np.random.default_rng(11)
        self.embeddings = torch.from_numpy(rng.normal(size=(BATCH, DIM))).requires_grad_()
        self.centers = torch.from_numpy(rng.normal(size=(CLASSES, DIM))).requires_grad_()
        self.labels = torch.from_numpy(rng.integers(0, CLASSES, BATCH))
        log_probs = torch.from_numpy(rng.normal(size=(BATCH, CLASSES)) * 2).log_softmax(1)
        groups = torch.zeros(BATCH, CLASSES, dtype=torch.bool)
        groups.scatter_(1, log_probs.topk(5, 1).indices, True)
        groups[2] = False  # the teacher skipped it
        indices = groups.nonzero(as_tuple=True)[1]
        rest = log_probs.masked_fill(groups, -math.inf).logsumexp(1)
        self.targets = GroupTargets(
            offsets=nn.functional.pad(groups.sum(1).cumsum(0), (1, 0)),
            indices=indices,
            log_probs=log_probs[groups],
            log_secondary=torch.where(groups.any(1), rest, 0.0),
        )
        self.wanted = torch.unique(torch.cat([self.labels, indices]))

    def sample(self, rate: float, seed: int) -> ClassSample:
        return sample_classes(self.wanted, range(CLASSES), rate, seed=(seed,))

    def loss(self, sample: ClassSample | None) -> tuple[Tensor, Tensor]:
        """The loss, and the centres that are trained."""
        trained = self.centers if sample is None else self.centers[sample.rows]
        loss = grouped_margin_loss(
            self.embeddings,
            self.centers,
            self.labels,
            self.targets,
            HeadSpec(margin=Margin(m2=0.3, m3=0.1)),
            sampled=None if sample is None else SampledCenters(sample, trained),
        )
        return loss.total, trained

    def gradients(self, sample: ClassSample | None) -> tuple[Tensor, Tensor]:
        """By embeddings [B, D] and by all centres [C, D], zero at those that are not trained."""
        total, trained = self.loss(sample)
        by_embeddings, by_trained = torch.autograd.grad(total, (self.embeddings, trained))
        if sample is None:
            return by_embeddings, by_trained
        return by_embeddings, torch.zeros_like(self.centers).index_add_(0, sample.rows, by_trained)


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def test_wanted_classes_are_always_included_and_others_equally_often(case: Case) -> None:
    rows, draws, rate = range(100, 300), 1000, 0.3
    wanted = case.wanted[(case.wanted >= 100) & (case.wanted < 300)]
    others = len(rows) - len(wanted)
    counts = torch.zeros(CLASSES)
    for seed in range(draws):
        part = sample_classes(case.wanted, rows, rate, seed=(seed,))
        assert torch.equal(part.rows[: part.certain] + rows.start, wanted)
        drawn = part.rows[part.certain :] + rows.start
        assert len(drawn) == math.ceil(rate * others)
        assert part.weight == pytest.approx(others / len(drawn))
        counts[drawn] += 1
    assert counts[wanted].sum() == 0
    assert counts[:100].sum() == counts[300:].sum() == 0
    often = np.setdiff1d(np.arange(100, 300), wanted.numpy())
    share = math.ceil(rate * others) / others
    z = (counts[often] - draws * share) / math.sqrt(draws * share * (1 - share))
    assert z.abs().max() < 4.5
    assert (z.square().mean() - 1).abs() < 0.4


def test_equal_seeds_draw_equal_samples(case: Case) -> None:
    first, same, other = (case.sample(0.3, seed).rows for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_positions_outside_are_located_past_the_end(case: Case) -> None:
    sample = case.sample(0.3, 0)
    unknown = np.setdiff1d(np.arange(-5, CLASSES + 5), sample.rows[: sample.certain].numpy())
    assert (sample.locate(torch.from_numpy(unknown)) == len(sample.rows)).all()
    assert torch.equal(sample.locate(case.wanted), torch.arange(sample.certain))


@pytest.mark.parametrize(("rate", "chunk"), [(0.05, 1024), (0.3, 7), (0.3, 1024), (1.0, 7)])
def test_loss_is_exact_and_the_gradient_of_drawn_centres_is_weighted(
    case: Case, rate: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gkd.trainer.head.class_lookup.CHUNK_CLASSES", chunk)
    sample = case.sample(rate, 5)
    torch.testing.assert_close(case.loss(sample)[0], case.loss(None)[0], rtol=1e-12, atol=0)
    weights = torch.zeros(CLASSES, 1, dtype=torch.float64)
    weights[sample.rows] = sample.weight
    weights[sample.rows[: sample.certain]] = 1.0
    ours, full = case.gradients(sample)[1], case.gradients(None)[1]
    torch.testing.assert_close(ours, weights * full, rtol=1e-9, atol=1e-13)


def test_at_rate_one_it_is_the_full_layer(case: Case) -> None:
    sample = case.sample(1.0, 0)
    assert len(sample.rows) == CLASSES
    for ours, full in zip(case.gradients(sample), case.gradients(None), strict=True):
        torch.testing.assert_close(ours, full, rtol=1e-9, atol=1e-13)


def test_the_mean_gradient_over_many_samples_is_the_full_layers(case: Case) -> None:
    """Over 250 draws, within the standard error of the mean."""
    draws = [case.gradients(case.sample(0.1, seed)) for seed in range(250)]
    for gradients, full in zip(zip(*draws, strict=True), case.gradients(None), strict=True):
        stacked = torch.stack(gradients)
        error = stacked.std(0) / math.sqrt(len(stacked))
        assert 0 < (stacked.mean(0) - full).norm() < 1.2 * error.norm()


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_borrowed_rows_step_like_rows_with_their_own_optimizer(kind: str) -> None:
    """Each row has an optimizer that takes only the steps in which the row is borrowed."""

    def make(parameter: nn.Parameter) -> torch.optim.Optimizer:
        if kind == "adamw":
            return torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.1)
        return torch.optim.SGD([parameter], 0.1, momentum=0.9, weight_decay=0.1, nesterov=True)

    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(5, 3))
    alone = [nn.Parameter(row.detach().clone()) for row in weight]
    optimizer, optimizers = make(weight), [make(row) for row in alone]
    for rows in ([0, 1, 3], [1, 2, 3], [0, 1, 2, 3]):
        grads = torch.randn(len(rows), 3)
        with borrowed(optimizer, weight, torch.tensor(rows)) as subset:
            subset.grad = grads.clone()
            optimizer.step()
        for row, grad in zip(rows, grads, strict=True):
            alone[row].grad = grad.clone()
            optimizers[row].step()
    if kind == "sgd":  # AdamW counts steps for a whole parameter, so only rows 1 and 3 agree
        torch.testing.assert_close(weight.detach(), torch.stack([r.detach() for r in alone]))
    for row in (1, 3):
        torch.testing.assert_close(weight[row].detach(), alone[row].detach())
    assert optimizer.param_groups[0]["params"] == [weight]
    assert list(optimizer.state) == [weight]
    assert torch.equal(weight[4], alone[4])  # never borrowed, never decayed


def test_training_with_sampled_centres_reduces_the_loss(faces: Path, tmp_path: Path) -> None:
    """AdamW has two tensors for the centres and a number; half of the other classes are drawn."""
    overrides = ("head.sample_rate=0.5", "optimizer.kind=adamw", "optimizer.lr=0.01")
    run(faces, tmp_path / "out", *overrides, "train.epochs=4")
    steps = losses(tmp_path / "out")
    assert np.mean([line[2] for line in steps[-5:]]) < np.mean([line[2] for line in steps[:5]])
